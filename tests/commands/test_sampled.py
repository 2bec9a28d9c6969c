"""`amg sample`'s folder: only the same request goes on, and no picture is there without its verdict."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import amg
from amg.cli import main
from amg.commands import sampled
from amg.index.store import TEMPORARY
from amg.verdict import GuardVerdict, Neighbour, Verdict

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")
JOBS = [{"seed": seed, "prompt": f"cat {seed}", "class": None} for seed in range(4)]


def verdict(seed, similarity=0.1, name="a"):
    return Verdict("cosine", similarity, 0.5, Neighbour(seed, name, None), similarity > 0.5)


def picture(seed):
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values)


def keep(folder, seed, **options):
    sampled.keep(folder, JOBS[seed], picture(seed), verdict(seed, **options))


def lines(folder):
    path = folder / "verdicts.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def assert_each_picture_has_its_mark(folder):
    marked = {record["file"]: record["sha256"] for record in lines(folder)}
    for path in folder.glob("*.png"):
        assert sampled.file_fingerprint(path) == marked[path.name]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(image, path, **_):
    Path(path).write_bytes(b"half a picture")
    full()


FAULTS = {
    "picture": ("PIL.Image.Image.save", half),
    "picture reaching the disk": ("os.fsync", full),
    "its digest": ("amg.commands.sampled.file_fingerprint", full),
    "line": ("json.dumps", full),
    "line reaching the disk": ("os.fsync", "second"),
    "name": ("os.replace", full),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_point_leaves_no_picture_without_its_mark(tmp_path, monkeypatch, fault):
    where, act = FAULTS[fault]
    keep(tmp_path, 0)
    if act == "second":
        calls, fsync = [], os.fsync

        def act(handle):
            calls.append(handle)
            return fsync(handle) if len(calls) == 1 else full()

    with monkeypatch.context() as patch:
        patch.setattr(where, act)
        with pytest.raises(OSError, match="No space left"):
            keep(tmp_path, 1, similarity=0.9)
    assert {path.name for path in tmp_path.glob("*.png*")} == {"000000.png"}
    assert_each_picture_has_its_mark(tmp_path)
    assert [record["seed"] for record in lines(tmp_path)] == ([0, 1] if fault == "name" else [0])
    assert list(sampled.take_up(tmp_path, JOBS)) == [0]
    keep(tmp_path, 1, similarity=0.8)
    assert [(record["seed"], record["verdict"]["similarity"]) for record in lines(tmp_path)] == [
        (0, 0.1),
        (1, 0.8),
    ]
    assert_each_picture_has_its_mark(tmp_path)
    assert sampled.take_up(tmp_path, JOBS) == {0: (verdict(0), None), 1: (verdict(1, 0.8), None)}


@pytest.mark.parametrize("written", [0, 7])
def test_a_line_that_is_cut_short_is_taken_back(tmp_path, written):
    path = tmp_path / "verdicts.jsonl"
    path.write_bytes(b"one\n")

    class Short:
        """A raw file that takes a few bytes, as a disk that is about to be full."""

        def __init__(self, *_, **__):
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, line):
            return self.file.write(line[:written])

        def __getattr__(self, name):
            return getattr(self.file, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amg.commands.sampled.open", Short, raising=False)
        with pytest.raises(OSError, match="only a part of a line"):
            sampled._append(path, b"another line\n")
    assert path.read_bytes() == b"one\n"


def test_what_does_not_belong_together_is_sampled_again(tmp_path):
    for seed in range(4):
        keep(tmp_path, seed, name="caf\u00e9 \u2028 \udc80")
    keep(tmp_path, 2, similarity=0.4)  # an earlier version could write a second line
    (tmp_path / "000000.png").unlink()
    (tmp_path / "000001.png").write_bytes(b"another picture")
    (tmp_path / "000003.png.partial").write_bytes(b"half")
    with (tmp_path / "verdicts.jsonl").open("ab") as file:
        file.write(b'{"seed": 3, "sha256": "0", "verdict": {}}\n[]\nnonsense\n\xff\n{"seed": 3')
    assert list(sampled.take_up(tmp_path, JOBS)) == [2, 3]
    assert [record["seed"] for record in lines(tmp_path)] == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002.png", "000003.png", "verdicts.jsonl"]


def test_what_the_safety_checker_said_is_kept_and_taken_up(tmp_path):
    for seed, flag in enumerate((None, True, False)):
        sampled.keep(tmp_path, JOBS[seed], picture(seed), verdict(seed), flag)
    assert [record["nsfw"] for record in lines(tmp_path)] == [None, True, False]
    assert [known.nsfw for known in sampled.take_up(tmp_path, JOBS).values()] == [None, True, False]


def test_a_picture_whose_line_is_gone_is_removed(tmp_path):
    keep(tmp_path, 0)
    (tmp_path / "verdicts.jsonl").unlink()
    (tmp_path / "000099.png").write_bytes(b"nobody asked for it")
    assert sampled.take_up(tmp_path, JOBS) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["000099.png"]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """The pixel index of photos-ddpm, and small ones of other pictures."""
    from amg import zoo

    folder = tmp_path_factory.mktemp("indexes")
    zoo.build_index("photos-ddpm", folder / "photos.amg", progress=False)
    for name, seed in (("small.amg", 0), ("other.amg", 1)):
        build_small(folder / name, seed)
    return folder


def build_small(path, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (60, 3, 32, 32), generator=generator, dtype=torch.uint8)
    amg.Index.build(pictures, path=path, progress=False)


@pytest.fixture
def asked(indexes, tmp_path):
    """A function that samples two pictures into a folder, and the files it is told of."""
    (tmp_path / "prompts.txt").write_text("1\n2\n")
    for name in ("small.amg", "other.amg"):
        shutil.copytree(indexes / name, tmp_path / name)

    def run(*more, out="out", index=indexes / "photos.amg"):
        command = ["sample", "photos-ddpm", "--index", str(index), "--steps", "2", "--scheduler", "ddim"]
        return main([*command, "--images", "2", "--out", str(tmp_path / out), *map(str, more)])

    return run


def delivered(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


CHANGES = {
    "--index": ((), {"index": "small.amg"}),
    "--also": (("--also", "other.amg"), {}),
    "--steps": (("--steps", 3), {}),
    "--seed": (("--seed", 1), {}),
    "--images": (("--images", 3), {}),
    "--class": (("--class", 2), {}),
    "--scheduler": (("--scheduler", "euler"), {}),
    "--guidance-scale": (("--guidance-scale", 3), {}),
    "--on-memorized": (("--on-memorized", "flag"), {}),
    "--preset": (("--preset", "strong"), {}),
}


def test_another_request_is_refused_naming_what_differs(asked, tmp_path, capsys):
    assert asked("--also", tmp_path / "small.amg") == 0
    pictures = delivered(tmp_path / "out")
    for name, (more, options) in CHANGES.items():
        here = [tmp_path / word if str(word).endswith(".amg") else word for word in more]
        here = [*(() if name == "--also" else ("--also", tmp_path / "small.amg")), *here]
        options = {key: tmp_path / value for key, value in options.items()}
        assert asked(*here, **options) == 2, name
        error = capsys.readouterr().err
        assert "`--out` must be empty or hold the same request" in error and f"`{name}` was" in error
        assert "config." not in error, name  # a preset by its name, not by each of its fields
    assert asked() == 2 and "`--also` was ['nl2, 60 rows, " in capsys.readouterr().err
    assert asked("--also", tmp_path / "small.amg", "--batch-size", 1) == 0
    assert delivered(tmp_path / "out") == pictures


def test_also_takes_pixels_and_what_the_embedder_made(tmp_path):
    from argparse import Namespace

    from amg.commands.indexes import open_also
    from amg.embed.photos import load_photos

    pictures = torch.rand(60, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, embedder in (("pixels", None), ("photos", load_photos())):
        amg.Index.build(pictures, None, embedder, tmp_path / name, progress=False)
    both = [tmp_path / "pixels", tmp_path / "photos"]

    def opened(embedder, *also_embedder):
        given = {"embedder": embedder, "also_embedder": [*also_embedder], "device": "cpu"}
        return [index.embedder is not None for index in open_also(Namespace(also=both, **given))]

    assert opened("photos") == opened(None, "pixels", "photos") == [False, True]
    for also in ((), ("pixels", "pixels"), ("photos", "photos")):
        with pytest.raises(
            ValueError, match=r"`--also-embedder` must (name the embedder that made|be pixels)"
        ):
            opened(None, *also)
    with pytest.raises(ValueError, match="must be given once per `--also`, or not at all, got 1 for 2"):
        opened(None, "photos")


@pytest.mark.parametrize("rebuilt", ["index", "also"])
def test_an_index_rebuilt_at_the_same_path_is_another_request(asked, tmp_path, capsys, rebuilt):
    options = {"index": tmp_path / "small.amg"}
    assert asked("--also", tmp_path / "other.amg", **options) == 0
    changed = tmp_path / ("small.amg" if rebuilt == "index" else "other.amg")
    shutil.rmtree(changed)
    build_small(changed, 7)
    assert asked("--also", tmp_path / "other.amg", **options) == 2
    assert f"`--{rebuilt}` was" in capsys.readouterr().err
    shutil.rmtree(changed)
    build_small(changed, 0 if rebuilt == "index" else 1)  # the very bytes again
    assert asked("--also", tmp_path / "other.amg", **options) == 0


def test_the_content_of_a_prompts_file_counts_and_not_its_path(indexes, tmp_path):
    from amg import zoo

    pipe, index = zoo.load("photos-ddpm"), amg.Index.open(indexes / "small.amg")
    config = amg.AMGConfig.preset("main").for_metric("nl2")
    sampler = SimpleNamespace(pipe=pipe, index=index, also=(), config=config)

    def kept(*texts):
        jobs = [{"seed": n, "prompt": text, "class": None} for n, text in enumerate(texts)]
        return sampled.request_of(sampler, jobs, 4, "cpu")

    sampled.hold_to(tmp_path / "out", kept("a cat", "a dog"))
    (tmp_path / "out/000000.png").write_bytes(b"a picture")
    sampled.hold_to(tmp_path / "out", kept("a cat", "a dog"))
    for other in (("a dog", "a cat"), ("a cat", "a dog ")):
        with pytest.raises(
            ValueError, match=r"where `--prompts` was '[0-9a-f]{16}' and is now '[0-9a-f]{16}'$"
        ):
            sampled.hold_to(tmp_path / "out", kept(*other))
    with pytest.raises(ValueError, match="`--images` was 2 and is now 1; `--prompts` was"):
        sampled.hold_to(tmp_path / "out", kept("a cat"))
    newer = {**kept("a cat", "a dog"), "amg": "another version"}
    sampled.hold_to(tmp_path / "out", newer)  # for information only


def test_prompts_are_lines_of_text(tmp_path):
    from amg.guidance.prompts import read_prompts

    path = tmp_path / "prompts.txt"
    path.write_bytes('\ufeffa cat\r\n\r\n{"caption": "a\u2028dog"}\n'.encode())
    assert read_prompts(path) == ["a cat", "a\u2028dog"]


@pytest.mark.parametrize("caption", ["null", "3", '["a"]', "{}", "[" * 100_000])
def test_a_caption_that_is_no_text_is_refused_naming_the_line(tmp_path, caption):
    from amg.guidance.prompts import read_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_text(f'a cat\n\n{{"caption": {caption}}}\n')
    with pytest.raises(
        ValueError, match=r"`--prompts` must hold JSON with `caption`, a text.* in .*jsonl:3$"
    ):
        read_prompts(path)


def old_request(folder):
    names = ("model", "index", "embedder", "prompt", "prompts", "label", "preset", "steps", "scheduler")
    (folder / "request.json").write_text(json.dumps({name: "None" for name in names}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (old_request, "request.json of another version of amg, which does not say all that was checked"),
        (lambda folder: (folder / "request.json").write_text('{"ver'), "request.json is damaged"),
        (lambda folder: (folder / "request.json").unlink(), "with 000000.png and no request.json"),
    ],
)
def test_a_folder_that_does_not_say_what_was_checked_is_refused(asked, tmp_path, capsys, make, message):
    assert asked() == 0
    pictures = delivered(tmp_path / "out")
    make(tmp_path / "out")
    assert asked() == 2
    assert message in capsys.readouterr().err
    assert delivered(tmp_path / "out") == pictures


FOREIGN = ("000001.png.partial", "request.json.tmp", "verdicts.jsonl.tmp", "notes.txt", ".hidden", "7.png")


@pytest.mark.parametrize("name", FOREIGN)
def test_nothing_is_touched_in_a_folder_that_is_not_ours(asked, tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert asked() == 2
    assert (
        f"must be empty or hold the same request, got {tmp_path}/out with {name}" in capsys.readouterr().err
    )
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {name: "mine"}


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"version": 3}', "\xff", "null"])
def test_a_request_that_is_none_of_ours_is_named_and_left_alone(asked, tmp_path, capsys, text):
    (tmp_path / "out").mkdir()
    for name in ("request.json", "000001.png.partial"):
        (tmp_path / "out" / name).write_text(text, encoding="latin-1")
    assert asked() == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/out/request.json" in error and "give another folder" in error
    for path in (tmp_path / "out").iterdir():
        assert path.read_text(encoding="latin-1") == text


def test_our_own_leftovers_are_removed(asked, tmp_path):
    assert asked() == 0
    for name in ("000001.png.partial", f"{TEMPORARY}0123456789abcdef"):
        (tmp_path / "out" / name).write_text("half")
    (tmp_path / "out/notes.txt").write_text("mine")
    assert asked() == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("000000.png", "000001.png", "request.json", "verdicts.jsonl", "notes.txt")
    }


def test_a_file_is_no_folder_and_a_request_that_delivered_nothing_binds_nobody(asked, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert asked() == 2 and "`--out` must be a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    assert asked("--prompt", "a cat") == 2  # this model takes none
    assert asked() == 0


def test_what_was_blocked_and_what_was_flagged_is_said(asked, tmp_path, monkeypatch, capsys):
    from amg.engine.sampler import Sampler

    call = Sampler.__call__
    guard = GuardVerdict(0.9124, 0.8, Neighbour(5, "id\x1b[2J\u202e", None))

    def judged(self, *arguments, **options):
        out = call(self, *arguments, **options)
        verdicts = [replace(out.amg[0], blocked=True, guard=guard), out.amg[1]]
        return replace(out, amg=verdicts, nsfw_content_detected=[False, True])

    monkeypatch.setattr(Sampler, "__call__", judged)
    assert asked() == 0
    said = capsys.readouterr()
    assert "seed 0: blocked, guard 0.912 > 0.8 to 'id\\x1b[2J\\u202e'\n" in said.err
    assert said.out.endswith("delivered marked as memorised, 1 flagged by the safety checker\n")
    assert [record["nsfw"] for record in lines(tmp_path / "out")] == [False, True]
    monkeypatch.undo()
    assert asked() == 0 and capsys.readouterr().out == said.out  # taken up
    assert asked(out="another") == 0 and "flagged" not in capsys.readouterr().out
    assert [record["nsfw"] for record in lines(tmp_path / "another")] == [None, None]


def test_every_scheduler_of_the_command_line_is_one_that_the_sampler_runs():
    pytest.importorskip("diffusers")
    from amg import zoo
    from amg.commands.sample import SCHEDULERS, scheduler_named
    from amg.engine.table import Tables

    config = zoo.load("photos-sd").scheduler.config
    for name in SCHEDULERS:
        scheduler = scheduler_named(name, config)
        assert type(scheduler).__name__ == SCHEDULERS[name]
        assert Tables()(scheduler, num_inference_steps=10).states <= 3
