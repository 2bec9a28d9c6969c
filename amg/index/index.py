"""Index: the training set, opened from disk, embedded and searched."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from amg.embed.precision import full_precision
from amg.index.change import extend, remove
from amg.index.codes import codes_on, map_codes
from amg.index.coverage import warn_of_a_name_alone, warn_of_no_guard
from amg.index.encode import check_embedder, embedded_directions, resize_images, resize_to_embed
from amg.index.exact import Nearest, Searcher, make_searcher, warn_of_few_rows
from amg.index.guard import Guard, map_guard
from amg.index.hits import Closest, Hits
from amg.index.imported.embeddings import from_embeddings
from amg.index.imported.verify import LEAST_COSINE, verify
from amg.index.members import Members, map_members, member_rows
from amg.index.seal import Seal
from amg.index.store import (
    MANIFEST,
    META,
    Manifest,
    check_hashes,
    check_sizes,
    file_record,
    map_rows,
    read_manifest,
    read_meta,
)
from amg.index.usable import require_directions, require_searchable, searchable
from amg.kernels import Codes, Panels

SERVED = "ray:"  # before the name of a served index, where a path is asked for


class Index:
    """A training set on disk, memory-mapped. Build or open one with Index.build and Index.open.

    metric: "cosine" (unit vectors of an embedder) or "nl2" (pixels). rows: [count, dimension] on `device`,
    fp16 or fp32 unit vectors, or uint8 pixels in CHW order. image_size: (H, W) of a pixel index, else None.
    manifest: what the index says of itself (store.Manifest). guard: sketches of every picture (guard.Guard),
    None in an index of an earlier version or of imported vectors. members: folded pictures, None where there
    are none. similarity is larger = closer everywhere: the cosine, or −nL2. Nothing in it changes after
    opening, so threads may share one.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        rows: torch.Tensor,
        codes: Codes | Panels | None,
        trust: str = "hashes",
    ):
        self.path, self.manifest, self.rows, self.codes = path, manifest, rows, codes
        self.data = path / manifest.folder  # where this generation's files lie
        self.guard: Guard | None = map_guard(self.data, manifest, member_rows(self.data, manifest))
        self.members: Members | None = map_members(self.data, manifest)
        self.seal = Seal(self.data, manifest, trust)
        self.embedder: Any = None
        self.searcher_spec = "exact"
        self.searcher: Searcher = make_searcher("exact", rows, manifest.metric, codes)

    @staticmethod
    @full_precision()
    def build(
        images: Any,
        captions: Sequence[str | None] | str | os.PathLike | None = None,
        embedder: Any = None,
        path: str | os.PathLike = "",
        *,
        ids: Sequence[str] | None = None,
        size: int | tuple[int, int] | None = None,
        dtype: str = "float16",
        batch_size: int = 64,
        near_duplicate: float | bool = True,
        progress: bool = True,
        resume: bool = True,
        on_error: str = "skip",
        background: str = "white",
        image_column: str | None = None,
    ) -> Index:
        """Build an index of `images` at `path` and open it; streams, resumes after a kill.

        images: a folder (recursive, links followed) of pictures told by content, tar (WebDataset), Parquet or
        Arrow files, as img2dataset and Hugging Face write them too; one such file; `{000..009}.tar`; a .npy
        file; a JSONL, CSV or text file of paths; a list of these; a dataset or iterable of PIL images,
        tensors, arrays, bytes, paths, dicts or pairs of these; uint8 [N, 3, H, W] or float [N, 3, H, W] in
        [0, 1]; an array uint8 [N, H, W, 3]: docs/training-sets.md. What is passed over, skipped or changed is
        counted in the manifest: passed_over, skipped, notes; coverage: the share that is indexed.
        captions: a list as long as images, a dict {path or id: caption}, a .json file of one, a JSONL path
        ({"file" | "id" | "index": …, "caption": …}; of several keys the first that fits the images), the name
        of a column, field or key, or None: what comes with the images (name.png.txt or name.txt beside
        name.png, metadata.jsonl, a column, field or key caption, text or prompt). Of several captions the
        first that is not empty is taken. image_column: which column or key holds the pictures.
        embedder: None for a pixel index (metric "nl2", uint8 rows), else see encode.Embedder ("cosine").
        ids: one distinct name per image; by default the path, or the position.
        size: (H, W) or an int, images (and later queries) are resized to it; a pixel index needs it where
        images differ in size. dtype: "float16" or "float32" rows under an embedder; pixels are uint8.
        near_duplicate: exact copies are always folded into one row with a count; near copies too, at cosine
        ≥ 0.98 or RMS pixel distance ≤ 0.02 on [0, 1] (True), at another threshold (a float), or not (False).
        A folded row keeps its first image and the most frequent caption.
        on_error: an unreadable image is "skip"ped, counted and named in skipped.jsonl, or "raise"s.
        background: "white", "black" or "#rrggbb", which transparent images (and queries) are shown over.
        resume: False discards what a killed build left. Raises IndexBuildError, IndexStorageError.
        """
        from amg.index.build import build_index, require_place
        from amg.index.plan import make_plan

        directory = require_place(path)
        plan = make_plan(
            embedder, ids, size, dtype, batch_size, near_duplicate, on_error, background, image_column
        )
        build_index(images, captions, directory, plan, progress=progress, resume=resume)
        return Index.open(path, embedder)

    from_embeddings = staticmethod(from_embeddings)

    def verify_embeddings(self, pictures: Any, least: float = LEAST_COSINE) -> Index:
        """This index of imported vectors, verified: some of its pictures are embedded and compared with
        their rows, and the manifest says how many and the least cosine.

        pictures: what `Index.build` takes, or a dict {id: picture}; a row is found by its id, or by the name
        without folder and suffix where one row alone has it; others are passed over. From then on the index
        is held to all that this embedder says of itself. Raises IndexBuildError naming the picture that is
        least alike to its row where it is below `least`, or one that cannot be read, or where none is of a
        row; ValueError without an embedder.
        """
        if self.embedder is None:
            raise ValueError("`verify_embeddings` needs the embedder: pass it to Index.open(path, embedder)")
        verify(self.path, self.embedder, pictures, least)
        return self._anew()

    @staticmethod
    def open(
        path: str | os.PathLike,
        embedder: Any = None,
        *,
        searcher: str = "exact",
        device: str | torch.device = "cpu",
        verify: bool = False,
        trust: str = "hashes",
    ) -> Index:
        """Open an index: memory-mapped; checks version and sizes, with verify=True every hash.

        trust: "hashes": before the first check of a picture every file is read against its sha256, once in
        a process. "size": none is, which every verdict says (`Verdict.trust`); codes, which cannot be told
        from those of other rows, then serve the sampling loop alone, and the final check reads all rows.

        path: its directory, or "ray:NAME" of one that is served (`amg.index.ray.connect`). embedder: the one
        it was built with; without one a cosine index takes vectors but no images. searcher: "exact" or
        "faiss:<index factory string>[;nprobe=16]". device: where rows are searched.
        Raises IndexNotFound, IndexCorrupt, IndexVersionError, EmbedderMismatch.
        """
        if str(path).startswith(SERVED):
            from amg.index.ray import connect

            served = connect(str(path).removeprefix(SERVED), embedder).to(device).with_searcher(searcher)
            if verify:
                served.verify()
            return served
        directory = Path(path).absolute()  # the program may change its directory
        manifest = read_manifest(directory)
        data = directory / manifest.folder
        (check_hashes if verify else check_sizes)(data, manifest)
        warn_of_few_rows(directory, manifest)
        warn_of_no_guard(directory, manifest)
        index = Index(directory, manifest, map_rows(data, manifest), map_codes(data, manifest), trust)
        index = index.to(device)
        if embedder is not None:
            index = index.attach(embedder)
        return index if searcher == "exact" else index.with_searcher(searcher)

    def extend(self, images: Any, captions: Any = None, **options: Any) -> Index:
        """This index with more pictures (`amg.index.extend`); what is open stays what it was."""
        extend(self.path, images, captions, self.embedder, **options)
        return self._anew()

    def remove(self, **options: Any) -> Index:
        """This index without some pictures (`amg.index.remove`)."""
        remove(self.path, embedder=self.embedder, **options)
        return self._anew()

    def _anew(self) -> Index:
        return self._opening()(self.path, self.embedder)

    def _opening(self) -> Callable[..., Index]:
        """Index.open with the options of this one."""
        return functools.partial(
            Index.open, searcher=self.searcher_spec, device=str(self.device), trust=self.trust
        )

    def attach(self, embedder: Any) -> Index:
        """This index with an embedder. Raises EmbedderMismatch unless it is the one it was built with; warns
        where only its name says so (`from_embeddings`)."""
        check_embedder(embedder, self.manifest)
        warn_of_a_name_alone(self.path, self.manifest)
        attached = copy.copy(self)
        attached.embedder = embedder
        return attached

    def with_searcher(self, searcher: str) -> Index:
        """This index with another searcher: "exact" or "faiss:<index factory string>[;name=value]"."""
        if searcher == self.searcher_spec:
            return self
        other = copy.copy(self)
        other.searcher_spec = searcher
        other.searcher = make_searcher(searcher, self.rows, self.metric, self.codes)
        return other

    def to(self, device: str | torch.device) -> Index:
        """This index with its rows on another device; queries must be there too."""
        target = torch.device(device)
        if target == self.device:
            return self
        moved = copy.copy(self)
        moved.rows = self.rows.to(target)
        moved.codes = None if self.codes is None else codes_on(target, self.codes, moved.rows)
        moved.guard = None if self.guard is None else self.guard.to(target)
        moved.members = None if self.members is None else self.members.to(target)
        moved.searcher = make_searcher(self.searcher_spec, moved.rows, self.metric, moved.codes)
        return moved

    def __copy__(self) -> Index:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: Any) -> Index:
        return copy.copy(self)  # rows are mapped and never change: shared

    def __reduce__(self) -> Any:
        """Pickled by its path: opened again where it is unpickled."""
        return self._opening(), (self.path, self.embedder)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    @property
    def manifest_sha256(self) -> str:
        """Of manifest.json, which holds that of every file. Raises ValueError where it is no longer what was
        opened."""
        if read_manifest(self.path) != self.manifest:
            raise ValueError(
                f"{self.path} must not change while it is open: it was built again, open it anew"
            )
        return file_record(self.path / MANIFEST).sha256

    @property
    def metric(self) -> str:
        """ "cosine" or "nl2"."""
        return self.manifest.metric

    @property
    def dimension(self) -> int:
        """Length of a row."""
        return self.manifest.dimension

    @property
    def count(self) -> int:
        """Rows, after folding duplicates."""
        return self.manifest.count

    @property
    def coverage(self) -> float:
        """Share of the training images seen that are in the index, as rows or folded into one, in [0, 1]."""
        return self.manifest.covered.share

    @property
    def verified(self) -> bool:
        """False for imported vectors that were compared with no picture (`from_embeddings`)."""
        return self.manifest.verified

    @property
    def trust(self) -> str:
        """What the final check takes the files on: "hashes" or "size" (`Index.open`)."""
        return self.seal.trust

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of a pixel index, None under an embedder."""
        return self.manifest.image_size if self.metric == "nl2" else None

    @functools.cached_property
    def _meta(self) -> dict[str, list]:
        self.seal.require_whole(META)  # else ids of another index that took this one's place
        return read_meta(self.data, self.manifest)

    @property
    def ids(self) -> list[str]:
        """Id of each row: that of the first image folded into it."""
        return self._meta["id"]

    @property
    def captions(self) -> list[str | None]:
        """Caption of each row: the most frequent among the images folded into it."""
        return self._meta["caption"]

    @functools.cached_property
    def captioned(self) -> int:
        """Rows that have a caption with a word in it."""
        return sum(caption is not None and bool(caption.strip()) for caption in self.captions)

    @property
    def sources(self) -> list[str]:
        """Where each row's first image lay: a path, a Parquet row, a position."""
        return self._meta["source"]

    @functools.cached_property
    def counts(self) -> torch.Tensor:
        """Training images folded into each row, int64 [count]."""
        return torch.tensor(self._meta["count"], dtype=torch.int64)

    def caption_counts(self) -> torch.Tensor:
        """How often each row's caption occurs among all training images, int64 [count]; 0 for none."""
        return self._caption_counts

    @functools.cached_property
    def _caption_counts(self) -> torch.Tensor:
        return torch.tensor(self._meta["caption_count"], dtype=torch.int64)

    @full_precision()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, 3, H, W] in [0, 1] → vectors [B, dimension] fp32, differentiable.

        Unit vectors of the embedder, or pixels of a pixel index, resized to image_size (antialiased).
        Raises ValueError for another shape or dtype, without an embedder, or for zero or non-finite vectors.
        """
        vectors = self.encode(images)
        if self.metric == "cosine":
            require_directions(vectors, f"embedder {self.embedder.name!r} returned")
        return vectors

    @full_precision()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """`embed` that looks at no value, for the sampling loop: vectors that are zero or not finite are NaN.
        Raises ValueError for another shape or dtype, or without an embedder."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"`images` must be float [B, 3, H, W] in [0, 1], got {list(images.shape)} {images.dtype}"
            )
        images = images.float()
        if self.metric == "nl2":
            return resize_images(images, self.manifest.image_size).flatten(1)
        if self.embedder is None:
            expected = self.manifest.embedder
            raise ValueError(
                f"{self.path} was opened without an embedder and can only be searched with vectors: pass "
                f"{expected.name if expected else 'its embedder'!r} to Index.open(path, embedder)"
            )
        return embedded_directions(resize_to_embed(images, self.manifest.image_size), self.embedder)

    @full_precision()
    def nearest(self, vectors: torch.Tensor) -> Nearest:
        """Closest row of each vector [B, dimension] from encode() → (similarity [B], row [B], extras).

        The cheap call of the sampling loop; it looks at no value (a faiss searcher's does). extras: for nl2
        the amg.kernels.NL2 tuple (distance, denominator …), None for cosine. Of a vector that is not finite,
        or zero under cosine, similarity and extras are NaN and row 0; the others are what they would be
        without it. Raises ValueError for a wrong shape, dtype or device, IndexCorrupt for files that were
        exchanged or cut short.
        """
        self.seal.require_whole()
        return self.searcher.nearest(searchable(self._require_vectors(vectors), self.metric))

    @torch.no_grad()
    @full_precision()
    def closest(self, images: torch.Tensor) -> Closest:
        """The closest of *all* training images to each of `images`, float [B, 3, H, W] in [0, 1].

        The call of the final check, by exact search: folded pictures are looked through as well as the rows
        that stand for them, and the guard is asked. It looks at no value: what could not be measured has a
        similarity of NaN, the guard's too. Raises as encode(), and IndexCorrupt where a file changed (see
        `seal`).
        """
        self.seal.check()
        images = images.to(self.device)
        queries = searchable(self._require_vectors(self.encode(images)), self.metric)
        exact = self.with_searcher("exact").searcher
        if self.trust != "hashes":
            exact = make_searcher("exact", self.rows, self.metric, None)
        found = exact.nearest(queries)
        if self.members is not None:
            found = self.members.nearer(queries, found)
        alike = None if self.guard is None else self.guard.nearest(images)
        return Closest(found.similarity, found.row, alike)

    @full_precision()
    def search(self, queries: Any, k: int = 1) -> Hits:
        """The k closest rows of each query → Hits(similarity, row), [B] for k = 1, else [B, k], best first.

        queries: images, float [B, 3, H, W] in [0, 1], uint8 [B, 3, H, W] or a list of PIL images; or vectors
        [B, dimension] as embed() gives. PIL images become RGB as those of the build did (decode.to_picture:
        upright, over the background of the index, the first frame). Raises ValueError, TypeError.
        """
        if not 1 <= k <= self.count:
            raise ValueError(f"`k` must be in [1, {self.count}] (rows of the index), got {k}")
        self.seal.require_whole()
        vectors = require_searchable(self._require_vectors(self._vectors_of(queries)), self.metric)
        if k == 1:
            found = self.searcher.nearest(vectors)
            return Hits(found.similarity, found.row, self)
        return Hits(*self.searcher.top(vectors, k), self)

    def verify(self) -> None:
        """Check size and sha256 of every file, and read the metadata. Raises IndexCorrupt naming a file that
        is wrong, or is not the one that was opened."""
        self.seal.require_whole(*self.manifest.files)
        check_hashes(self.data, read_manifest(self.data))
        read_meta(self.data, self.manifest)

    def _require_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        expected = f"floating [B, {self.dimension}] on {self.device} (the index's device)"
        got = f"got {list(vectors.shape)} {vectors.dtype} on {vectors.device}"
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension or not vectors.is_floating_point():
            raise ValueError(f"`queries` must be {expected}, {got}")
        if vectors.device != self.device:
            raise ValueError(
                f"`queries` must be {expected}, {got}: move them, or the index with index.to(device)"
            )
        return vectors.detach()

    def _vectors_of(self, queries: Any) -> torch.Tensor:
        if isinstance(queries, torch.Tensor):
            return queries if queries.ndim == 2 else self._embed_queries(queries)
        if not isinstance(queries, (list, tuple)) or not queries:
            raise TypeError(
                "`queries` must be images (float or uint8 [B, 3, H, W], a non-empty list of PIL images) or "
                f"vectors [B, {self.dimension}], got {type(queries).__name__}"
            )
        from amg.index.decode import import_pil, to_picture

        if not all(isinstance(query, import_pil().Image) for query in queries):
            raise TypeError(f"`queries`: a list must hold PIL images, got {type(queries[0]).__name__}")
        pictures = (to_picture(query, self.manifest.background).pixels[None] for query in queries)
        return torch.cat([self._embed_queries(pixels.to(self.device)) for pixels in pictures])

    @torch.no_grad()
    def _embed_queries(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.is_floating_point() and images.numel():
            low, high = images.aminmax()
            if not (low >= -1e-4 and high <= 1 + 1e-4):  # also refuses NaN
                raise ValueError(
                    f"`queries` must be in [0, 1], got values from {low.item():g} to {high.item():g}"
                )
        return self.embed(images)

    def __repr__(self) -> str:
        return (
            f"Index({str(self.path)!r}, {self.metric}, {self.count} rows of {self.dimension}, {self.device})"
        )
