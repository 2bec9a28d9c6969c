"""Start, find and stop a served index."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

from amg.index.coverage import warn_of_no_guard
from amg.index.errors import IndexNotFound, IndexUnavailable
from amg.index.exact import warn_of_few_rows
from amg.index.index import Index
from amg.index.ray.actor import Actor
from amg.index.ray.calls import Calls, import_ray
from amg.index.ray.served import Everyone, Served, ServedIndex
from amg.index.ray.shard import parts_of
from amg.index.store import MANIFEST, file_record, read_manifest

NAMESPACE = "amg"
TIMEOUT = 120.0


def serve(
    path: str | os.PathLike,
    embedder: Any = None,
    *,
    shards: int,
    name: str | None = None,
    address: str | None = None,
    cpus: float | None = None,
    timeout: float = TIMEOUT,
) -> Index:
    """Hold the index at `path` in `shards` actors of a Ray cluster, and connect to it.

    Every machine must have the same index at `path` (a shared disk, or a copy) and the same amg. Each actor
    has an equal share of the rows, of the folded pictures and of the guard, reads the index whole once
    against its sha256, and is started again, on the same generation, where it dies. They stay until `stop`.
    name: by which others connect; by default the directory's. address: of the cluster, as ray.init takes it;
    None: the one this process is in, or RAY_ADDRESS says, or a new one on this machine alone. cpus: that each
    actor reserves, and searches on as many threads; None: none is reserved, and it searches on an equal
    share of the cluster's. embedder, timeout: see
    `connect`. Raises ValueError for an argument, IndexNotFound, IndexCorrupt, IndexUnavailable.
    """
    _require_timeout(timeout)
    directory = Path(path).absolute()
    manifest = read_manifest(directory)
    name = _require_name(directory.name if name is None else name)
    parts = tuple(parts_of(manifest, shards))
    if cpus is not None and not (math.isfinite(cpus) and cpus > 0):
        raise ValueError(f"`cpus` must be above 0 or None, got {cpus!r}")
    ray = import_ray()
    _join(address)
    threads = int(ray.cluster_resources().get("CPU", 1) / shards if cpus is None else cpus)
    served = Served(name, directory, manifest, file_record(directory / MANIFEST).sha256, parts)
    started: list[Any] = []
    try:
        for shard in range(shards):
            started.append(_start(served, shard, cpus or 0, max(1, threads)))
        Calls(served, started, timeout).ask("check", {shard: () for shard in range(shards)})
    except BaseException:
        for actor in started:
            ray.kill(actor)
        raise
    return connect(name, embedder, timeout=timeout)


def connect(
    name: str, embedder: Any = None, *, address: str | None = None, timeout: float = TIMEOUT
) -> Index:
    """The index that is served as `name`: an Index for `protect`, `Sampler`, `check` and `search`.

    `amg.Index.open("ray:NAME", embedder)` is the same. address: of the Ray cluster; None: the one this
    process is in, or RAY_ADDRESS says, or runs on this machine. timeout: seconds that a question waits for
    every shard, a restart included (reading the index against its sha256 is most of one: allow for it).
    Raises IndexNotFound where none is served, IndexUnavailable, EmbedderMismatch.
    """
    _require_timeout(timeout)
    served, actors = _find(_require_name(name), address, timeout)
    again = functools.partial(connect, name, address=address, timeout=timeout)
    index = ServedIndex(Everyone(served, Calls(served, actors, timeout)), again)
    warn_of_few_rows(served.path, served.manifest)
    warn_of_no_guard(served.path, served.manifest)
    return index if embedder is None else index.attach(embedder)


def stop(name: str, *, address: str | None = None) -> None:
    """End the actors of the index that is served as `name`. Raises IndexNotFound where none is."""
    _, actors = _find(_require_name(name), address, TIMEOUT)
    for actor in actors:
        import_ray().kill(actor)


def _join(address: str | None) -> None:
    ray = import_ray()
    if not ray.is_initialized():
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)


def _find(name: str, address: str | None, timeout: float) -> tuple[Served, list[Any]]:
    """What is served under a name, and its actors."""
    ray = import_ray()

    def actor(shard: int) -> Any:
        return ray.get_actor(f"{name}/{shard}", namespace=NAMESPACE)

    try:
        _join(address or os.environ.get("RAY_ADDRESS") or "auto")
        served = ray.get(actor(0).record.remote(), timeout=timeout)
        return served, [actor(shard) for shard in range(len(served.parts))]
    except ConnectionError as error:
        raise IndexNotFound(f"no index is served as {name!r}: no Ray cluster is found ({error})") from error
    except ValueError as error:  # get_actor's
        raise IndexNotFound(f"no index is served as {name!r} in this Ray cluster ({error})") from error
    except ray.exceptions.GetTimeoutError as error:
        raise IndexUnavailable(
            f"shard 0 of the index served as {name!r} did not answer within {timeout:g} s"
        ) from error


def _start(served: Served, shard: int, cpus: float, threads: int) -> Any:
    """The actor of one shard, which outlives this process. Raises ValueError for a name that is taken."""
    options = {"name": f"{served.name}/{shard}", "namespace": NAMESPACE, "lifetime": "detached"}
    made = import_ray().remote(
        num_cpus=cpus, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD", **options
    )(Actor)
    try:
        return made.remote(served, shard, threads)
    except ValueError as error:
        raise ValueError(
            f"`name` must be free, {served.name!r} is served already: stop({served.name!r}), or give another"
        ) from error


def _require_name(name: Any) -> str:
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"`name` must be a str without '/', got {name!r}")
    return name


def _require_timeout(timeout: Any) -> None:
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not (number and 0 < timeout < math.inf):
        raise ValueError(f"`timeout` must be seconds above 0, got {timeout!r}")
