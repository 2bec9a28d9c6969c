"""Pictures added and taken out, indexes joined: the same as a build of what is there then."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from amg.cli import main
from amg.index import Index, IndexBuildError, IndexCorrupt, extend, gc, merge, remove
from amg.index.journal import Journal

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*with fewer, its usual threshold", "ignore:.* were taken out of"
)


@pytest.fixture
def many(pictures):
    """[110, 3, 8, 8]: distinct ones, exact copies and near ones, in any order."""
    noise = torch.randint(-2, 3, (20, 3, 8, 8))
    near = (pictures[:20].int() + noise).clamp(0, 255).to(torch.uint8)
    return torch.cat([pictures, near, pictures[30:40]])[torch.randperm(110)]


IDS = [f"p{number}.png" for number in range(110)]
TEXTS = [None if number % 9 == 0 else f"caption {number % 5}" for number in range(110)]


@pytest.fixture(params=["nl2", "cosine"])
def build(request, tmp_path, many, embedder, monkeypatch):
    """A function that builds an index of some of the pictures."""
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 16)
    used = embedder if request.param == "cosine" else None

    def made(name, some):
        numbers = [*range(110)[some]] if isinstance(some, slice) else some
        texts, ids = [TEXTS[one] for one in numbers], [IDS[one] for one in numbers]
        return Index.build(
            many[numbers], texts, used, tmp_path / name, ids=ids, progress=False, batch_size=16
        )

    made.embedder = used
    return made


def assert_same(index, other):
    """Everything that a reader sees, and the files themselves."""
    assert torch.equal(index.rows, other.rows) and index.ids == other.ids and index.captions == other.captions
    assert torch.equal(index.counts, other.counts)
    assert torch.equal(index.caption_counts(), other.caption_counts())
    assert torch.equal(index.guard.rows, other.guard.rows)
    assert index.manifest.coverage == other.manifest.coverage
    assert index.manifest.members == other.manifest.members > 0
    assert torch.equal(index.members.vectors, other.members.vectors)
    assert torch.equal(index.members.rows, other.members.rows)
    queries = other.embed(torch.rand(5, 3, 8, 8)) if index.metric == "nl2" else torch.randn(5, 24)
    assert torch.equal(index.nearest(queries).similarity, other.nearest(queries).similarity)
    index.verify()
    index.seal.check()


@pytest.mark.parametrize("first", [1, 50, 109])
def test_extending_is_building_of_both(build, many, first):
    index, whole = build("i", slice(0, first)), build("whole", slice(0, 110))
    longer = index.extend(many[first:], TEXTS[first:], ids=IDS[first:], progress=False, batch_size=16)
    assert_same(longer, whole)
    assert longer.manifest.generation == 1 and longer.data == longer.path / "generation-1"
    assert index.count <= first and index.ids[0] == "p0.png"
    index.seal.check()  # who opened the earlier generation keeps it


def test_several_times_and_gc(build, many):
    index = build("i", slice(0, 30))
    for start in (30, 60, 90):
        some = slice(start, min(start + 30, 110))
        index = index.extend(many[some], TEXTS[some], ids=IDS[some], progress=False, batch_size=16)
    assert_same(index, build("whole", slice(0, 110)))
    before = {path.name for path in index.path.iterdir()}
    assert {"generation-1", "generation-2", "generation-3", "meta.parquet"} <= before
    gone = gc(index.path)
    assert {"generation-1", "generation-2", "meta.parquet", "guard.f16"} <= set(gone)
    assert {path.name for path in index.path.iterdir()} == {"manifest.json", "generation-3"}
    assert gc(index.path) == []
    assert_same(Index.open(index.path, build.embedder), build("again", slice(0, 110)))


@pytest.mark.parametrize("gone", [[0], [5, 6, 7, 50, 109], [*range(0, 110, 2)], [*range(1, 110)]])
def test_removing_is_building_of_the_rest(build, many, gone):
    index = build("i", slice(0, 110))
    kept = [number for number in range(110) if number not in gone]
    shorter = index.remove(ids=[IDS[number] for number in gone], retrained=True, progress=False)
    whole = build("whole", kept)
    if whole.manifest.members:
        assert_same(shorter, whole)
    assert torch.equal(shorter.rows, whole.rows) and shorter.ids == whole.ids
    assert shorter.manifest.coverage == whole.manifest.coverage
    with pytest.raises(IndexCorrupt, match="open the index again"):
        index.seal.check()


def test_nothing_of_a_removed_picture_stays(build, many):
    index = build("i", slice(0, 110))
    whole = build("whole", [*range(110)])
    number = next(n for n in range(110) if int((many == many[n]).flatten(1).all(1).sum()) == 1)
    vector = next(iter(_contents(whole, number)))
    assert any(vector in path.read_bytes() for path in index.path.rglob("*") if path.is_file())
    shorter = index.remove(ids=[IDS[number]], progress=False)
    for path in shorter.path.rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert vector not in held and IDS[number].encode() not in held, path


def test_pictures_themselves_say_what_is_to_go(build, many, tmp_path, png):
    """As another decoder gives them; copies go with them, and near-duplicates stay."""
    index = build("i", slice(0, 110))
    number = next(n for n in range(110) if int((many == many[n]).flatten(1).all(1).sum()) == 2)
    same = [n for n in range(110) if bool((many[n] == many[number]).all())]
    (tmp_path / "shown.png").write_bytes(png(many[number]))
    shorter = index.remove(pictures=tmp_path / "shown.png", retrained=True, progress=False)
    whole = build("whole", [n for n in range(110) if n not in same])
    assert shorter.manifest.images == 108 and torch.equal(shorter.rows, whole.rows)
    assert shorter.ids == whole.ids
    stranger = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(IndexBuildError, match="`pictures`: the index does not hold tensor#0"):
        shorter.remove(pictures=stranger)
    if build.embedder is not None:
        with pytest.raises(IndexBuildError, match="need its `embedder`, got None"):
            remove(shorter.path, pictures=many[:1])


def _contents(index, number):
    """The bytes of a picture's own vector."""
    from amg.index.change.contents import Contents

    contents, at = Contents(index.data, index.manifest), 0
    for part in contents.parts(200):
        for entry in part.entries:
            if entry.position == number:
                yield part.rows[at].numpy().tobytes()
            at += 1


def test_coverage_says_what_the_model_may_still_know(build):
    index = build("i", slice(0, 110))
    with pytest.warns(
        UserWarning, match=r"2 pictures were taken out of .*: a model that was trained on them"
    ):
        shorter = index.remove(ids=["p3.png", "p4.png"], progress=False)
    assert shorter.coverage == pytest.approx(108 / 110) and shorter.manifest.coverage.seen == 110
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*with fewer")
        again = shorter.remove(ids=["p5.png"], retrained=True, progress=False)
    assert again.coverage == pytest.approx(107 / 109)


@pytest.mark.parametrize("prefix", [False, True])
def test_merging_is_building_of_all(build, tmp_path, prefix):
    parts = [build("a", slice(0, 40)), build("b", slice(40, 47)), build("c", slice(47, 110))]
    merge([part.path for part in parts], tmp_path / "m", prefix=prefix, progress=False)
    joined, whole = Index.open(tmp_path / "m", build.embedder), build("whole", slice(0, 110))
    if prefix:
        assert joined.ids[:2] == ["a/p0.png", "a/p1.png"] and joined.ids[-1].startswith("c/")
        assert torch.equal(joined.rows, whole.rows)
    else:
        assert_same(joined, whole)


def test_what_cannot_be_changed_is_refused(build, many, tmp_path, embedder):
    index, other = build("i", slice(0, 60)), build("o", slice(50, 110))
    files = {path: path.read_bytes() for path in index.path.rglob("*") if path.is_file()}
    for act, message in (
        (
            lambda: index.extend(many[:5], ids=IDS[58:63]),
            "the index has a picture with the id 'p58.png' already",
        ),
        (lambda: index.extend(many[:5], ids=IDS[:4]), "`ids` do not match `images`"),
        (lambda: index.remove(ids=["nobody"]), "`ids`: no picture has the id 'nobody'"),
        (lambda: index.remove(sources=["nowhere"]), "`sources`: no picture has the source 'nowhere'"),
        (lambda: index.remove(), "must name the pictures that are to go, got none"),
        (lambda: index.remove(ids="p1.png"), "`ids` must be a list of texts"),
        (lambda: index.remove(ids=IDS[:60]), "no picture would be left"),
        (
            lambda: merge([index.path, other.path], tmp_path / "m"),
            "both have a picture 'p50.png': pass prefix=True",
        ),
        (lambda: merge([index.path], tmp_path / "m"), "`paths` must be two indexes or more"),
        (lambda: merge([index.path, other.path], index.path), "`path` exists already"),
    ):
        with pytest.raises(IndexBuildError, match=message):
            act()
    assert {path: path.read_bytes() for path in index.path.rglob("*") if path.is_file()} == files
    (index.path / "pictures.parquet").unlink()
    with pytest.raises(IndexBuildError, match=r"does not say which pictures it holds .* build it again"):
        extend(index.path, many[:5], embedder=build.embedder)


def test_an_index_of_another_kind_is_not_joined(tmp_path, many, embedder):
    Index.build(many, path=tmp_path / "a", progress=False)
    Index.build(many, None, embedder, tmp_path / "b", progress=False)
    with pytest.raises(IndexBuildError, match=r"be alike in `metric`: nl2 in .*a, cosine in .*b"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


SCRIPT = """
import sys, numpy, torch
import amg.index.plan
from amg.index import Index, extend, merge, remove
amg.index.plan.SHARD_IMAGES = 16
act, path = sys.argv[1:]
pictures = torch.from_numpy(numpy.load(path + "/pictures.npy"))
ids = [f"p{number}.png" for number in range(len(pictures))]
print("go", flush=True)
if act == "extend":
    extend(path + "/i", pictures[60:], ids=ids[60:], progress=False, batch_size=16)
elif act == "remove":
    remove(path + "/i", ids=ids[0:60:3], progress=False)
else:
    merge([path + "/i", path + "/o"], path + "/m", progress=False)
"""


@pytest.mark.parametrize("shards", [1, 2])
def test_a_merge_that_was_stopped_takes_every_picture_once(tmp_path, build, monkeypatch, shards):
    """At the end of the first index, and of the second."""
    build("i", slice(0, 60)), build("o", slice(60, 110))
    paths, commit = [tmp_path / "i", tmp_path / "o"], Journal.commit

    def stopping(self, *arguments):
        commit(self, *arguments)
        if self.state.shards == shards:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "commit", stopping)
        merge(paths, tmp_path / "m", progress=False)
    for name in ("m", "whole"):
        merge(paths, tmp_path / name, progress=False)
    assert_same(Index.open(tmp_path / "m"), Index.open(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("act", ["extend", "remove", "merge"])
def test_killed_at_any_moment_nothing_is_lost(tmp_path, many, act, monkeypatch):
    """Four times each here; more by `python benchmarks/kill_index.py`."""
    import numpy

    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 16)  # as in the script, whose change goes on here
    numpy.save(tmp_path / "pictures.npy", many.numpy())
    for name, some in (("i", slice(0, 60)), ("o", slice(60, 110))):
        Index.build(many[some], path=tmp_path / name, ids=IDS[some], progress=False)
    script, moments = tmp_path / "s.py", random.Random(act)
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(4):
        command = [sys.executable, "-W", "ignore", str(script), act, str(tmp_path)]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        running.stdout.readline()
        time.sleep(moments.uniform(0, 0.4))
        running.send_signal(signal.SIGKILL)
        running.wait()
        index = Index.open(tmp_path / "i")
        index.verify()
        assert index.manifest.images in {60, 110, 40}
        if index.manifest.generation or (tmp_path / "m").exists():
            break
    if act == "merge":
        if not (tmp_path / "m").exists():
            merge([tmp_path / "i", tmp_path / "o"], tmp_path / "m", progress=False)
        assert Index.open(tmp_path / "m").manifest.images == 110
    elif Index.open(tmp_path / "i").manifest.generation == 0:
        if act == "extend":
            extend(tmp_path / "i", many[60:], ids=IDS[60:], progress=False, batch_size=16)
        else:
            remove(tmp_path / "i", ids=IDS[0:60:3], progress=False)
    gc(tmp_path / "i")
    done = Index.open(tmp_path / "i", verify=True)
    assert done.manifest.images == {"extend": 110, "remove": 40, "merge": 60}[act]


def test_the_commands(tmp_path, folder, capsys):
    index = str(tmp_path / "i.amg")
    assert main(["index", "build", str(folder / "a"), "--out", index, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["index", "extend", index, str(folder / "b"), "--quiet"]) == 0
    assert "generation       1" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="no longer kept from copying"):
        assert main(["index", "remove", index, "--id", "3.png", "--quiet"]) == 0
    assert "removed 1 picture\n" in capsys.readouterr().out
    assert main(["index", "build", str(folder / "b"), "--out", str(tmp_path / "o.amg"), "--quiet"]) == 0
    capsys.readouterr()
    merged = ["index", "merge", index, str(tmp_path / "o.amg"), "--out", str(tmp_path / "m.amg"), "--quiet"]
    assert main(merged) == 2
    assert "both have a picture" in capsys.readouterr().err
    assert main([*merged, "--prefix"]) == 0
    assert main(["index", "gc", index]) == 0
    assert "nothing to delete" in capsys.readouterr().out
