"""`amg bench`: turns, counts and what is written; no time is asserted."""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from amg.cli import main
from amg.commands.bench import (
    COLUMNS,
    PLAIN,
    Contestant,
    append,
    count_rows,
    percentiles,
    prompts_of,
    take_turns,
    text_of,
)

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def tiny():
    spec = importlib.util.spec_from_file_location(
        "tiny", Path(__file__).parents[1] / "integrations/conftest.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """A text model, a class-conditional and an unconditional pixel model, with an index for either kind."""
    import amg
    from amg.embed.photos import load_photos

    folder = tmp_path_factory.mktemp("models")
    tiny.tiny_sd().save_pretrained(folder / "text")
    tiny.tiny_ddpm().save_pretrained(folder / "pixels")
    tiny.tiny_ddpm(classes=5).save_pretrained(folder / "classes")
    pictures = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    captions = ["rare", *["common"] * 59]
    amg.Index.build(pictures, captions, load_photos(), folder / "photos.amg", progress=False)
    amg.Index.build(pictures, captions, None, folder / "pixels.amg", progress=False)
    return folder


def bench(models, name, *more):
    index = ["photos.amg", "--embedder", "photos"] if name == "text" else ["pixels.amg"]
    fixed = ["bench", str(models / name), "--index", str(models / index[0]), *index[1:], "--steps", "3"]
    return main([*fixed, "--rounds", "2", *map(str, more)])


def lines_of(path):
    return list(csv.DictReader(path.open(newline="")))


def test_contestants_are_timed_and_counted(models, tmp_path, capsys):
    path = tmp_path / "bench.csv"
    assert bench(models, "text", "--batch-size", 1, "--batch-size", 2, "--csv", path) == 0
    lines = lines_of(path)
    assert [(line["contestant"], line["batch"]) for line in lines] == [
        (name, size) for size in "12" for name in (PLAIN, "off", "main", "strong")
    ]
    assert all(float(line["p20"]) <= float(line["p50"]) <= float(line["p80"]) for line in lines)
    assert {line["evaluations"] for line in lines if line["contestant"] in (PLAIN, "off")} == {"6"}
    assert all(line["torch"] == torch.__version__ and line["device"] and line["date"] for line in lines)
    assert "× plain diffusers" in capsys.readouterr().out


def test_lines_are_added_to_the_same_file_and_to_no_other(models, tmp_path, capsys):
    path = tmp_path / "bench.csv"
    for _ in range(2):
        assert bench(models, "pixels", "--guidance", "off", "--batch-size", 1, "--csv", path) == 0
    assert [line["contestant"] for line in lines_of(path)] == [PLAIN, "off"] * 2
    path.write_text("a,b\n1,2\n")
    assert bench(models, "pixels", "--guidance", "off", "--batch-size", 1, "--csv", path) == 2
    assert "`--csv` must be a file of `amg bench`" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def test_a_class_model_has_no_plain_contestant_and_says_so(models, tmp_path, capsys):
    path = tmp_path / "bench.csv"
    assert bench(models, "classes", "--guidance", "off", "--batch-size", 1, "--csv", path) == 0
    assert [line["contestant"] for line in lines_of(path)] == ["off"]
    assert "no plain diffusers: its pipeline takes no classes" in capsys.readouterr().out


def test_turns_rotate_after_one_untimed_turn_and_share_their_seeds():
    calls, counted = [], [0]

    def draw(name, rows):
        def call(seeds):
            calls.append((name, list(seeds)))
            counted[0] += rows

        return call

    contestants = [Contestant("a", draw("a", 8)), Contestant("b", draw("b", 6))]
    take_turns(contestants, 2, 2, counted, "cpu")
    first, second = [0, 1], [2, 3]
    assert calls[:2] == [("b", first), ("a", first)] or calls[:2] == [("a", first), ("b", first)]
    assert calls[2:] == [("a", first), ("b", first), ("b", second), ("a", second)]
    assert [len(one.seconds) for one in contestants] == [2, 2]
    assert [one.evaluations for one in contestants] == [[4.0, 4.0], [3.0, 3.0]]


def test_percentiles_are_numpys():
    import numpy as np

    samples = [0.3, 0.1, 0.7, 0.2, 0.9, 0.4]
    assert percentiles(samples) == pytest.approx(np.percentile(samples, [20, 50, 80]))
    assert percentiles([0.5]) == (0.5, 0.5, 0.5)


def test_the_default_prompts_are_the_most_repeated_captions(models, tiny):
    import amg

    index = amg.Index.open(models / "pixels.amg")
    assert prompts_of(None, tiny.tiny_sd(), index)[0][0] in ("common", "rare")
    assert prompts_of(None, tiny.tiny_ddpm(classes=5), index) == (["0", "1", "2", "3"], "classes")
    assert prompts_of(None, tiny.tiny_ddpm(), index) == ([""], "no prompts")


def test_rows_are_counted(tiny):
    unet = tiny.tiny_ddpm().unet
    counted = count_rows(unet)
    unet(torch.rand(3, 3, 8, 8), 10)
    unet(torch.rand(2, 3, 8, 8), 10)
    assert counted == [5]


def test_the_table_compares_with_the_first(tmp_path):
    line = dict.fromkeys(COLUMNS, "") | {"p20": "1", "p80": "3", "evaluations": "60"}
    lines = [{**line, "contestant": "plain", "p50": "2"}, {**line, "contestant": "main", "p50": "5"}]
    assert text_of(lines).splitlines()[-1].split() == ["main", "5", "1–3", "2.50", "60.0"]
    append(tmp_path / "a.csv", lines)
    assert lines_of(tmp_path / "a.csv") == lines


@pytest.mark.parametrize(
    ("more", "message"), [(("--rounds", 0), "`--rounds`"), (("--batch-size", 0), "`--batch-size`")]
)
def test_bad_input(models, more, message, capsys):
    assert bench(models, "pixels", *more) == 2
    assert f"{message} must be >= 1, got 0" in capsys.readouterr().err


def test_arguments_are_those_of_the_command_line():
    from amg.commands.bench import add_parser

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["bench", "m", "--index", "i"])
    assert (parsed.rounds, parsed.steps, parsed.batch_size, parsed.guidance) == (5, 50, None, None)
