"""Stretches of a training set, indexed each by itself and merged, are what one build makes; without Ray."""

import io
import tarfile

import pytest
import torch

from amg.index import Index, merge
from amg.index.build import opened
from amg.index.notes import Tally
from amg.index.plan import make_plan
from amg.index.ray.segments import build_stretch

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


@pytest.fixture
def archive(tmp_path, png):
    """A tar of 70 pictures, of which 9 repeat others, one is no picture, and some have captions."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randint(0, 256, (61, 3, 8, 8), generator=generator, dtype=torch.uint8)
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for at in range(70):
            content = b"no picture" if at == 33 else png(pictures[at % 61])
            members = {f"{at:03}.png": content, f"{at:03}.txt": f"number {at}".encode()}
            for name, content in members.items() if at % 3 else [*members.items()][:1]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("notes.pdf")
        tar.addfile(info, io.BytesIO(b""))
    return path


def in_stretches(images, captions, path, cuts, embedder=None):
    plan = make_plan(embedder, None, None, "float16", 64, True, "skip", "white")
    source, _ = opened(images, captions, plan)
    for _ in source.read(0):
        pass
    parts = [path.with_name(f"{path.name}.{at}") for at in range(len(cuts))]
    for at, (cut, part) in enumerate(zip(cuts, parts, strict=True)):
        build_stretch(images, captions, plan, cut, Tally() if at else source.passed_over, part)
    merge(parts, path, progress=False)
    return Index.open(path, embedder)


@pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
@pytest.mark.parametrize("kind", ["tar", "folder"])
@pytest.mark.parametrize("embedded", [False, True])
def test_merged_they_are_what_one_build_makes(kind, embedded, archive, tmp_path, embedder, alike):
    images, captions = archive, None
    if kind == "folder":
        images, captions = tmp_path / "set", [f"given {at}" for at in range(70)]
        with tarfile.open(archive) as tar:
            tar.extractall(images, filter="data")
    made = embedder if embedded else None
    whole = Index.build(images, captions, made, tmp_path / "whole.amg", progress=False)
    cuts = [(0, 20), (20, 41), (41, 70)]
    found = in_stretches(images, captions, tmp_path / "merged.amg", cuts, made)
    alike(found, whole)
    assert whole.count == 60 and sum(whole.manifest.covered.skipped.values()) == 1
