"""The interval's benchmark: its formula against the network's rows, its resampling by hand, its tables."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
STEPS = 11


@pytest.fixture(scope="module")
def bench():
    """benchmarks/bench_interval.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_interval")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def tiny(bench, tmp_path_factory):
    """The tiny Stable Diffusion and a small index of random images, 11 steps."""
    from engine.setup import Bench
    from sampling.models import Model

    import amg

    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/integrations/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    embedder = module.TinyEmbedder().eval().requires_grad_(False)
    pictures = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    path = tmp_path_factory.mktemp("bench") / "index.amg"
    index = amg.Index.build(pictures, [f"caption {i}" for i in range(20)], embedder, path, progress=False)
    pipe = module.tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    jobs = {"ordinary": [("cat", 0), ("dog", 1)], "memorised": [("hat", 5), ("cup", 6)]}
    return Bench(Model("tiny", pipe, index, 4.0, jobs), steps=STEPS)


def test_evaluations_of_thirty_steps(bench):
    found = [bench.expected_evaluations(interval, 30) for interval in bench.INTERVALS]
    assert found == [60, 51, 45, 48, 51], "0…29, 0…20, 0…14, 3…20 and 9…29 are guided"


def test_the_formula_counts_the_rows_of_the_network(bench, tiny):
    from engine.setup import counted_rows

    asked = bench.asked_of(tiny.model, "memorised", 3, {})
    assert asked.prompts == ["hat", "cup", "hat"] and asked.seeds == [130_000, 130_001, 130_002]
    for interval in bench.INTERVALS:
        with counted_rows(tiny.model.pipe) as rows:
            drawn = bench.draw(tiny, "off", interval, asked)
        assert sum(rows) == 3 * bench.expected_evaluations(interval, STEPS) == drawn.evaluations.sum()


def test_a_count_that_is_not_the_formula_s_is_refused(bench, tiny, monkeypatch):
    monkeypatch.setattr(bench, "expected_evaluations", lambda interval, steps: 2 * steps)
    with pytest.raises(AssertionError, match="22 evaluations an image expected, got"):
        bench.draw(tiny, "off", (0.0, 0.5), bench.asked_of(tiny.model, "memorised", 1, {}))


def test_what_breaks_the_promise_is_found_anew(bench, tiny):
    """A picture of the index itself, whatever its verdict says, and one that is blank."""
    from dataclasses import replace

    asked = bench.asked_of(tiny.model, "memorised", 2, {})
    drawn = bench.draw(tiny, "off", (0.0, 1.0), asked)
    known = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(4))[:1]
    verdicts = [replace(one, threshold=0.999, guard=None, memorized=False) for one in drawn.verdicts]
    verdicts[1] = replace(verdicts[1], blocked=True)
    images = torch.cat([known, torch.zeros_like(known)])

    class Judge:
        def copy_probability(self, images):
            return torch.tensor([0.4, 0.6])

    scores = bench.scored(tiny, bench.Drawn(images, verdicts, drawn.evaluations), asked, Judge())
    assert scores.values[bench.OVER].tolist() == [1.0, 0.0]
    assert scores.values[bench.COPIES].tolist() == [0.0, 1.0]
    assert scores.values[bench.BLOCKED].tolist() == [0.0, 1.0]
    assert scores.delivered.tolist() == [True, False] and scores.features is None


def test_means_of_resamples_are_those_of_the_repeated_values(bench):
    values, counts = np.array([0.25, 1.0, 4.0]), np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
    by_hand = [np.repeat(values, row).mean() for row in counts]
    assert bench.weighted_means(values, counts) == pytest.approx(by_hand, rel=1e-15)


def test_the_interval_is_the_percentiles_of_all_resamples(bench):
    """Two prompts of one image each have four resamples: every one is known."""
    counts = np.array([[2, 0], [1, 1], [1, 1], [0, 2]])
    figure = bench.mean_figure("m", np.array([1.0, 3.0]), None, counts)
    assert figure.value == 2.0 and figure.ends == pytest.approx((1 + 0.075, 3 - 0.075), rel=1e-12)
    assert figure.difference is None and figure.difference_ends is None


def test_a_paired_difference_is_taken_image_by_image(bench):
    """Prompts differ widely, the arms by 0.1 or 0.2: the interval of the difference lies between these."""
    base = np.random.default_rng(0).random(60)
    own = base + np.where(np.arange(60) % 2, 0.1, 0.2)
    counts = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=500)
    figure = bench.mean_figure("m", own, base, counts, 100)
    assert figure.difference == pytest.approx(15, rel=1e-12) and figure.value == pytest.approx(
        100 * own.mean()
    )
    low, high = figure.difference_ends
    half = 1.96 * 5 / math.sqrt(60)
    assert (low, high) == pytest.approx((15 - half, 15 + half), abs=0.25)
    assert figure.ends[1] - figure.ends[0] > 4 * (high - low)


def test_images_of_one_prompt_are_drawn_together(bench):
    """Eight images of two prompts are two units: a resample holds four or none of each."""
    hits = np.array([1.0] * 4 + [0.0] * 4)
    figure = bench.share_figure("m", hits, np.ones(8, bool), ["a"] * 4 + ["b"] * 4)
    assert figure.value == 50 and figure.ends == (0, 100)


def test_shares_at_the_edge_have_the_binomial_bound_over_prompts(bench):
    prompts, every = ["a", "b", "c", "d", "a", "b"], np.ones(6, bool)
    bound = 100 * 0.025 ** (1 / 4)
    none, whole = (bench.share_figure("m", np.full(6, hit), every, prompts) for hit in (0.0, 1.0))
    assert none.value == 0 and none.ends == pytest.approx((0, 100 - bound), rel=1e-12)
    assert whole.value == 100 and whole.ends == pytest.approx((bound, 100), rel=1e-12)
    assert bench.share_figure("m", np.ones(6), ~every, prompts) is None
    among = np.array([1, 1, 0, 0, 0, 0], bool)
    half = bench.share_figure("m", np.array([1.0, 0, 1, 1, 1, 1]), among, prompts)
    assert half.value == 50, "of the delivered alone"


def test_a_share_s_difference_is_of_the_images_that_both_delivered(bench):
    hits, base = np.array([1.0, 1, 0, 0, 1]), np.array([0.0, 1, 0, 0, 0])
    here, there = np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 1, 0, 1], bool)
    figure = bench.share_figure("m", hits, here, list("abcde"), (base, there))
    assert figure.value == 50 and figure.difference == pytest.approx(100 / 3, rel=1e-12)
    assert figure.difference_ends == pytest.approx((0, 100), rel=1e-12), "one of three prompts, with repeats"
    alike = bench.share_figure("m", base, here, list("abcde"), (base, there))
    assert alike.difference == 0 and alike.difference_ends == (0, 0)
    assert bench.share_figure("m", hits, here, list("abcde"), (base, ~here)).difference is None


def test_fid_s_interval_is_centred_and_pairs_its_resamples(bench):
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(0)
    references, base = (torch.randn(200, 4, generator=generator).double() for _ in range(2))
    counts = np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), size=40)
    same = bench.fid_figure(base, base, references, counts)
    assert same.difference == 0 and same.difference_ends == (0, 0)
    moved = bench.fid_figure(base + 3, base, references, counts)
    means = [features.mean(0) for features in (base, references)]
    apart = 4 * 9 + 6 * float((means[0] - means[1]).sum())
    assert moved.difference == pytest.approx(apart, rel=1e-4), "a shift adds |shift|² + 2·shift·(means apart)"
    assert sum(moved.ends) / 2 == pytest.approx(moved.value, rel=1e-12)
    assert sum(moved.difference_ends) / 2 == pytest.approx(moved.difference, rel=1e-12)


def test_the_tables_say_what_the_csv_holds(bench, tiny, tmp_path):
    figures = {
        "ordinary": [
            bench.Figure(bench.EVALUATIONS, 51.0, (51.0, 51.0)),
            bench.Figure(bench.FID, 187.04, (180.0, 194.1), -10.0, (-16.0, -4.0)),
            bench.Figure(bench.ALIGNMENT, 0.8123, (0.78, 0.84), 0.01, (-0.02, 0.043)),
            bench.Figure(bench.OVER, 1.5625, (0.0, 4.6875), 0.78, (0.0, 2.0)),
        ],
        "memorised": [bench.Figure(bench.EVALUATIONS, 76.25, (71.0, 81.0)), bench.Figure(bench.BLOCKED, 2.0)],
    }
    lines = [
        bench.line_of(one, tiny, ("main", 0.0, 0.7, kind, 4, 2))
        for kind, own in figures.items()
        for one in own
    ]
    with (tmp_path / "interval.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, bench.COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    text = bench.tables(tmp_path / "interval.csv")
    fid, alignment = (
        "187.0 [180.0, 194.1] | -10.0 [-16.0, -4.0]",
        "0.812 [0.780, 0.840] | +0.010 [-0.020, +0.043]",
    )
    for row in (
        f"| main | (0, 0.7) | 51.0 | {fid} | {alignment} | – | – |",
        "| memorised | main | (0, 0.7) | 76.2 [71.0, 81.0] | – | – | – | 2.0 |",
        "| ordinary | main | (0, 0.7) | 51.0 | 1.6 [0.0, 4.7] | +0.8 [+0.0, +2.0] | – | – |",
    ):
        assert text.count(row) == 1, row
    assert "4 ordinary images of 2 prompts; 4 memorised images of 2 prompts." in text


def test_the_sheet_holds_every_arm_in_a_row(bench, tmp_path):
    from PIL import Image

    rows = [torch.full((3, 3, 8, 8), value / 10) for value in range(10)]
    bench.sheet(rows, tmp_path / "sheet.png")
    page = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert page.size == (3 * 10 - 2, 10 * 10)
    tops = [10 * row + (2 if row >= 5 else 0) for row in range(10)]
    assert [page.getpixel((11, top + 1))[0] for top in tops] == [round(25.5 * row) for row in range(10)]
