"""The pictures of indexes folded anew, out of what the indexes hold of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from amg.index.build import progress_bar
from amg.index.change.contents import Contents, logs
from amg.index.coverage import REMOVED
from amg.index.finish import finish_index
from amg.index.guard import SKETCH_LENGTH
from amg.index.journal import Journal, State
from amg.index.notes import Tally
from amg.index.plan import BuildPlan, make_plan
from amg.index.store import MANIFEST, Imported, Manifest, check_hashes, read_manifest


def opened(path: str | os.PathLike) -> tuple[Path, Manifest]:
    """An index on disk whose files are what its manifest says. Raises IndexBuildError for one of an earlier
    version."""
    directory = Path(path).absolute()
    manifest = read_manifest(directory)
    next(logs(directory / manifest.folder))
    check_hashes(directory / manifest.folder, manifest)
    return directory, manifest


def plan_of(
    manifest: Manifest, embedder: Any, ids: Any, batch_size: int, on_error: str, image_column: str | None
) -> BuildPlan:
    """How the index was built, for further pictures."""
    checked = make_plan(
        None, ids, None, "float16", batch_size, False, on_error, manifest.background or "white", image_column
    )
    return dataclasses.replace(
        checked,
        embedder=embedder,
        record=manifest.embedder,
        metric=manifest.metric,
        dtype=manifest.dtype,
        size=manifest.image_size,
        near_duplicate=manifest.near_duplicate,
    )


def replay(
    given: Sequence[tuple[Contents, np.ndarray | None, str]],
    manifest: Manifest,
    state: State,
    partial: Path,
    progress: bool,
    removed: int,
    generation: int | None = None,
) -> None:
    """Fold the pictures of indexes anew, one after the other, without those dropped; then the finished
    files."""
    plan = plan_of(manifest, None, None, 64, "skip", None)
    state = dataclasses.replace(state, dimension=manifest.dimension, image_size=manifest.image_size)
    rule = plan.fold_rule(manifest.image_size if manifest.metric == "nl2" else None)
    journal = Journal(partial, state, plan.dtype, rule, SKETCH_LENGTH if manifest.guard else 0)
    offset, passed_over, imported = 0, Tally(), joined([one.manifest for one, _, _ in given])
    total = sum(one.manifest.covered.seen for one, _, _ in given)
    with progress_bar(total, state.position, progress, "picture") as bar:
        for contents, dropped, label in given:
            size = plan.shard_images(manifest.dimension)
            for part in contents.parts(size, dropped, max(state.position - offset, 0)):
                entries = [
                    dataclasses.replace(one, position=one.position + offset, id=label + one.id)
                    for one in part.entries
                ]
                journal.commit(part.rows, part.guard, entries, ("", ""))
                if bar is not None:
                    bar.update(len(entries))
            offset += contents.length(dropped)
            passed_over.join(passed_over_of(contents.manifest), "")
    number = manifest.generation + 1 if generation is None else generation
    finish_index(journal, plan, passed_over, imported, manifest, removed, number)


def joined(manifests: Sequence[Manifest]) -> Imported | None:
    """What is known of imported vectors, of all together."""
    found = [one.imported for one in manifests if one.imported is not None]
    if not found:
        return None
    sure = len(found) == len(manifests) and all(one.pictures for one in found)
    return (
        Imported(sum(one.pictures for one in found), min(one.cosine for one in found)) if sure else Imported()
    )


def digest_of(directory: Path) -> str:
    return blake2b((directory / MANIFEST).read_bytes(), digest_size=16).hexdigest()


def passed_over_of(manifest: Manifest) -> Tally:
    counts = dict(manifest.passed_over)
    return Tally(counts, {what: list(manifest.examples.get(what, ())) for what in counts})


def removed_from(manifest: Manifest) -> int:
    return manifest.covered.skipped.get(REMOVED, 0)
