"""Imported vectors compared with pictures: what makes an index of them a verified one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from amg.index.decode import UnreadableImage
from amg.index.encode import check_embedder, embedder_record, resize_to_embed, unit_vectors
from amg.index.errors import IndexBuildError
from amg.index.shards import to_float
from amg.index.sources import open_source
from amg.index.store import Imported, Manifest, map_rows, read_manifest, read_meta, write_manifest

LEAST_COSINE = 0.98  # of a picture embedded again with its row: other decoders and resizers are a little off


def verify(path: Path, embedder: Any, pictures: Any, least: float) -> Imported:
    """See `Index.verify_embeddings`: what is recorded in the manifest, with what the embedder is. Raises
    IndexBuildError naming the picture that is least alike to its row; EmbedderMismatch."""
    if isinstance(least, bool) or not isinstance(least, (int, float)) or not 0 < least <= 1:
        raise IndexBuildError(f"`least` must be a cosine in (0, 1], got {least!r}")
    manifest = read_manifest(path)
    if manifest.imported is None:
        raise IndexBuildError(f"`path` must be an index of imported vectors, {path} was built of pictures")
    check_embedder(embedder, manifest)
    compared, worst, name = _compared(path / manifest.folder, manifest, embedder, pictures)
    if compared == 0:
        raise IndexBuildError(f"`pictures` must be of rows of {path}: none has the id of one, or its name")
    if not worst >= least:
        raise IndexBuildError(
            f"`pictures`: {name} is at cosine {worst:.4f} from its row, at least {least:g} was asked "
            f"for: {path} was not made by this embedder, or of other pictures"
        )
    found = Imported(compared, min(worst, 1.0))
    if read_manifest(path) != manifest:
        raise IndexBuildError(f"`path`: {path} was changed while its pictures were embedded: do it again")
    sure = dataclasses.replace(manifest, imported=found, embedder=embedder_record(embedder))
    for place in dict.fromkeys((path / manifest.folder, path)):
        write_manifest(place, sure)
    return found


def _compared(data: Path, manifest: Manifest, embedder: Any, pictures: Any) -> tuple[int, float, str]:
    """How many pictures are of rows, the least cosine with one, and whose it is."""
    rows, known = map_rows(data, manifest), _row_by_name(read_meta(data, manifest)["id"])
    compared, worst = 0, (2.0, "")
    for name, picture in _named(pictures):
        row = known.get(name, known.get(Path(name).stem))
        if row is None:
            continue
        with torch.no_grad():
            pixels = resize_to_embed(to_float(picture)[None], manifest.image_size)
            vector = unit_vectors(pixels, embedder)[0].to("cpu", torch.float64)
        worst = min(worst, (float(vector @ rows[row].double()), name))
        compared += 1
    return compared, *worst


def _row_by_name(ids: list[str]) -> dict[str, int]:
    """Rows by id, and by its name without folder and suffix where only one has it."""
    by_stem: dict[str, int] = {}
    for row, name in enumerate(ids):
        stem = Path(name).stem
        by_stem[stem] = -1 if stem in by_stem else row
    return {stem: row for stem, row in by_stem.items() if row >= 0} | {
        name: row for row, name in enumerate(ids)
    }


def _named(pictures: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and pixels [3, H, W]: of a dict of pictures by id, or of what `Index.build` takes. Raises
    IndexBuildError."""
    names = [str(name) for name in pictures] if isinstance(pictures, Mapping) else None
    if names == []:
        raise IndexBuildError("`pictures` must be some pictures by id, got none")
    source = open_source([*pictures.values()] if isinstance(pictures, Mapping) else pictures)
    for at, image in enumerate(source.read(0)):
        name = image.id if names is None else names[at]
        try:
            pixels = image.load().pixels
        except UnreadableImage as error:
            raise IndexBuildError(f"`pictures`: {name} cannot be read: {error}") from error
        yield name, pixels
