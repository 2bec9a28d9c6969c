"""An index built by several workers: each indexes a stretch of the pictures, then all are merged."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from amg.embed.precision import full_precision
from amg.index.build import opened, require_new, require_place
from amg.index.change import merge
from amg.index.claim import MARKER, claimed, remove
from amg.index.errors import IndexBuildError
from amg.index.index import Index
from amg.index.notes import Tally
from amg.index.plan import make_plan
from amg.index.ray.calls import import_ray
from amg.index.ray.segments import build_stretch


def build(
    images: str | os.PathLike | Sequence[str | os.PathLike],
    captions: Any = None,
    embedder: Any = None,
    path: str | os.PathLike = "",
    *,
    workers: int | None = None,
    address: str | None = None,
    size: int | tuple[int, int] | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    near_duplicate: float | bool = True,
    progress: bool = True,
    on_error: str = "skip",
    background: str = "white",
    image_column: str | None = None,
) -> Index:
    """`Index.build` by `workers` tasks of a Ray cluster: the same index, of pictures named by paths.

    Each worker embeds and folds an equal stretch of them into an index in `path`.segments, one that dies is
    started again where it stopped, and `merge` makes one index of these, on this machine: what a build of all
    would be. images and `path` must be the same on every machine. embedder: one that can be pickled, or what
    `amg.embed.load` takes, loaded by each worker. workers: by default one for each CPU. address: as for
    `serve`. The same call goes on where it was stopped. Other arguments, errors: Index.build.
    """
    paths = images if isinstance(images, (list, tuple)) else [images]
    if not paths or not all(isinstance(one, (str, os.PathLike)) for one in paths):
        raise IndexBuildError(f"`images` must be paths, which every machine has, got {images!r:.100}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise IndexBuildError(f"`workers` must be an int of at least 1 or None, got {workers!r}")
    place, own = require_place(path).absolute(), _loaded(embedder)
    require_new(place)
    options = (None, size, dtype, batch_size, near_duplicate, on_error, background, image_column)
    plan = make_plan(own, *options)
    ray = import_ray()
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    source, table = opened(images, captions, plan)
    total = sum(1 for _ in source.read(0)) if source.length is None else source.length
    plan.check_totals(table, total)
    number = min(workers or int(ray.cluster_resources().get("CPU", 1)), total)
    if number < 2:
        raise IndexBuildError(
            f"`workers` must be 2 or more for {total} images, got {number}: use Index.build"
        )
    cuts = [*itertools.pairwise(total * at // number for at in range(number + 1))]
    identity = {**plan.identity(source, table), "cuts": cuts}
    with claimed(_folder(place), lambda: False, IndexBuildError):
        parts = _parts(_folder(place), identity, number)
        _run(images, captions, embedder, options, (cuts, source.passed_over), parts)
        merge(parts, place, progress=progress)
        remove(_folder(place))
    return Index.open(place, own)


def _folder(place: Path) -> Path:
    return place.with_name(f"{place.name}.segments")


def _loaded(embedder: Any) -> Any:
    if not isinstance(embedder, str):
        return embedder
    from amg import embed

    return embed.load(embedder)


def _parts(folder: Path, identity: dict[str, Any], number: int) -> list[Path]:
    """Where the stretches of a build lie, after removing those of another one."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    for entry in folder.iterdir():
        if entry.name not in (digest, MARKER):
            shutil.rmtree(entry)
    (folder / digest).mkdir(exist_ok=True)
    return [folder / digest / f"{at:05}" for at in range(number)]


def _run(
    images: Any,
    captions: Any,
    embedder: Any,
    options: tuple,
    cuts: tuple[list[tuple[int, int]], Tally],
    parts: list[Path],
) -> None:
    """Every stretch, by a task. Raises what a worker raised."""
    ray = import_ray()
    task = ray.remote(num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD")(_work)
    shared = ray.put((images, captions, embedder, options, os.getcwd()))
    passed_over = [cuts[1], *[Tally()] * (len(parts) - 1)]
    calls = [task.remote(shared, *each) for each in zip(cuts[0], passed_over, parts, strict=True)]
    try:
        ray.get(calls)
    except ray.exceptions.RayTaskError as error:
        for call in calls:
            ray.cancel(call)
        raise error.cause from error


@full_precision()
def _work(shared: tuple, cut: tuple[int, int], passed_over: Tally, path: Path) -> None:
    images, captions, embedder, options, directory = shared
    os.chdir(directory)  # paths mean what they mean to who builds
    torch.set_num_threads(1)
    plan = make_plan(_loaded(embedder), *options)
    build_stretch(images, captions, plan, cut, passed_over, path)
