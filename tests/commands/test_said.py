"""The command line speaks of its own options, not of the library's arguments."""

from __future__ import annotations

import argparse

import pytest
import torch

import amg
from amg.cli import main, make_parser
from amg.commands.said import as_said, options_of

SAMPLE = {
    "index": "--index",
    "also": "--also",
    "steps": "--steps",
    "label": "--class",
    "ordinary": "--ordinary",
    "model": "MODEL",
}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("`index` must be x, got `y`", "`--index` must be x, got `y`"),
        ("`also[1]` must be x", "`--also` must be x"),
        ("`num_inference_steps` must be >= 1", "`--steps` must be >= 1"),
        ("`class_labels` must be x", "`--class` must be x"),
        ("`pipe.unet` must be x", "`MODEL`'s unet must be x"),
        ("with `captions=`, or give `ordinary_prompts=`", "with `--captions`, or give `--ordinary`"),
        ("`AMGConfig.threshold` and `other` stay", "`AMGConfig.threshold` and `other` stay"),
    ],
)
def test_arguments_become_options(said, shown):
    assert as_said(said, SAMPLE) == shown


def test_options_are_those_of_the_command_that_was_given():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    one, two = commands.add_parser("one"), commands.add_parser("two")
    one.add_argument("-k", "--near", dest="k")
    one.add_argument("images", metavar="IMAGES")
    two.add_argument("--index")
    found = options_of(parser, parser.parse_args(["one", "x"]))
    assert found["k"] == "--near" and found["images"] == "IMAGES" and "index" not in found


def parsers(parser, name="amg"):
    """Every command's parser."""
    yield pytest.param(parser, id=name)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for key, inner in action.choices.items():
                yield from parsers(inner, f"{name} {key}")


@pytest.mark.parametrize("parser", [*parsers(make_parser())])
def test_help_says_no_default_that_is_none_and_none_twice(parser):
    text = " ".join(parser.format_help().split())
    assert "None)" not in text and "[])" not in text and ") (default" not in text


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """The same pictures under photos-embedder and as pixels."""
    pytest.importorskip("skimage")
    from amg.embed.photos import load_photos

    folder = tmp_path_factory.mktemp("indexes")
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions = [f"caption {n % 20}" for n in range(60)]
    amg.Index.build(pictures, captions, load_photos(), folder / "photos.amg", progress=False)
    amg.Index.build(pictures, captions, None, folder / "pixels.amg", progress=False)
    return folder


WITHOUT = ("photos-sd", "--index", "photos.amg", "--out", "o")
PROMPTED = ("--prompts", "p.txt")
WRONG = {
    ("sample", *WITHOUT, "--prompt", "x"): "`--embedder` must name the embedder that made photos.amg (photos",
    ("sample", *WITHOUT): "`--prompt` or `--prompts` must be given for a text-to-image model",
    ("sample", *WITHOUT, "--class", "1", "--embedder", "photos"): "`--prompt` or `--prompts` must be given",
    ("sample", "photos-ddpm", "--index", "pixels.amg", "--out", "o", "--prompt", "x"): (
        "`--prompt` must be left out for photos-ddpm, which takes no text"
    ),
    ("sample", "photos-ddpm", "--index", "pixels.amg", "--out", "o", "--class", "99"): (
        "`--class` must be in [0, "
    ),
    ("sample", "photos-ddpm", "--index", "pixels.amg", "--out", "o", "--embedder", "photos"): (
        "`--embedder` must be pixels, or left out, for "
    ),
    ("sample", "photos-ddpm", "--index", "pixels.amg", "--out", "o", "--embedder", "nonsense"): (
        "`--embedder` must be pixels, or left out, for "
    ),
    ("sample", *WITHOUT, "--prompt", "x", "--embedder", "nonsense"): "`--embedder` must be one of",
    ("sample", "photos-ddpm", "--index", "pixels.amg", "--out", "o", "--also", "photos.amg"): (
        "`--also-embedder` must name the embedder that made photos.amg (photos"
    ),
    ("sample", "photos-ddpm", "--index", "pixels.amg", "--out", "o", "--also-embedder", "photos"): (
        "`--also-embedder` must be given once per `--also`, or not at all, got 1 for 0"
    ),
    ("check", "x.png", "--index", "photos.amg"): "`--embedder` must name the embedder that made photos.amg",
    ("check", "x.png", "--index", "pixels.amg", "--threshold", "3"): "`--threshold` must be an nL2 in",
    ("audit", *WITHOUT, *PROMPTED): "`--embedder` must name the embedder that made photos.amg",
    ("bench", *WITHOUT[:3]): "`--embedder` must name the embedder that made photos.amg",
    ("calibrate", *WITHOUT[:3], "--ordinary", "p.txt", "--out", "o.json"): "`--embedder` must name",
    ("distill", *WITHOUT[:3], "--embedder", "pixels", "--out", "o"): "`--embedder` must name",
}


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(words)[:60])
def test_errors_name_the_option_and_nothing_is_written(words, indexes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("photos.amg", "pixels.amg"):
        (tmp_path / name).symlink_to(indexes / name)
    (tmp_path / "p.txt").write_text("a cat\n")
    pytest.importorskip("PIL.Image").new("RGB", (16, 16)).save(tmp_path / "x.png")
    assert main([*words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert WRONG[words] in said and "Index.open" not in said
    assert not (tmp_path / "o").exists()


def test_also_takes_embedders(indexes, tmp_path, capsys):
    out = tmp_path / "o"
    words = ["photos-ddpm", "--index", indexes / "pixels.amg", "--steps", 4, "--scheduler", "ddim"]
    words += ["--also", indexes / "photos.amg", "--also-embedder", "photos", "--out", out]
    assert main(["sample", *map(str, words)]) == 0
    record = (out / "verdicts.jsonl").read_text()
    assert '"metric": "nl2"' in record and '"metric": "cosine"' in record
    assert "1/1" in capsys.readouterr().err  # of pictures


def test_a_second_run_in_the_same_folder_is_refused(indexes, tmp_path, capsys):
    from amg.replacing import held

    words = ["photos-ddpm", "--index", indexes / "pixels.amg", "--steps", 4, "--out", tmp_path / "o"]
    with held(tmp_path / "o"):
        assert main(["sample", *map(str, words)]) == 2
    assert "no other run writes to" in capsys.readouterr().err and not list((tmp_path / "o").iterdir())


OPENING = "amg.commands.sample.open_model"


@pytest.mark.parametrize(
    ("command", "words", "where", "goes_on"),
    [
        ("demo", (), "amg.commands.demo.load_judge", "draws anew, on the indexes"),
        (
            "sample",
            ("photos-ddpm", "--index", "x"),
            "amg.commands.sample.open_model",
            "goes on where it stopped",
        ),
        (
            "audit",
            ("photos-sd", "--index", "x"),
            "amg.commands.sample.open_model",
            "goes on where it stopped",
        ),
    ],
)
def test_an_interrupted_command_ends_with_one_line(
    command, words, where, goes_on, tmp_path, monkeypatch, capsys
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    assert main([command, *words, "--out", str(tmp_path / "o")]) == 130
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"amg {command}: interrupted; the same command")
    assert goes_on in said[0]
