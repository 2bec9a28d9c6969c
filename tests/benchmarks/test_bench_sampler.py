"""The latency harness counts what a sampling call does; no time is asserted."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
STEPS, IMAGES = 6, 4


@pytest.fixture(scope="module")
def bench():
    """benchmarks/bench_sampler.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_sampler")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def course(bench, tmp_path_factory):
    """A case of two batches of two on the tiny Stable Diffusion and a small index of random images."""
    import amg

    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/integrations/conftest.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    embedder = tiny.TinyEmbedder().eval().requires_grad_(False)
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions = [f"caption {i % 20}" for i in range(60)]
    path = tmp_path_factory.mktemp("bench") / "index.amg"
    index = amg.Index.build(pictures, captions, embedder, path, progress=False)
    jobs = {"ordinary": [(text, seed) for seed, text in enumerate(("cat", "dog", "hat", "cup"))]}
    counts, pipe = Counter(), tiny.tiny_sd()
    model = bench.Model("tiny", pipe, index, 4.0, jobs)
    bench.count_pipeline(pipe, counts)
    case = bench.Case("tiny", "ordinary", 2, IMAGES, 1)
    return bench.Course(case, model, counts, STEPS, "cpu")


def draw(bench, course, **overrides):
    """One turn with options chosen so that every gate opens or none does."""
    from sampling.contestants import guided

    options = {
        "check_at": (),
        "rewind_at": (),
        "on_memorized": "flag",
        "step_length": "constant",
        **overrides,
    }
    return course.first(bench.Contestant("this", "", guided("main", **options)))


OPEN = {"terms_from": 0.0, "lambda_min": -1.0, "lambda_max": -1.0, "c1": 0.0, "c2": 0.0}
CLOSED = {"lambda_min": 1.0, "lambda_max": 1.0}


def test_plain_is_cfg_and_one_decode(bench, course):
    entry = course.first(bench.CONTESTANTS[0])
    assert entry.contestant.name == "plain"
    assert entry.counted == {"unet_evaluations": 2 * STEPS * IMAGES, "vae_decodes": IMAGES}


def test_closed_gates_add_a_measurement_a_step_and_the_final_check(bench, course):
    entry = draw(bench, course, **CLOSED)
    assert entry.counted == {
        "unet_evaluations": 2 * STEPS * IMAGES,
        "vae_decodes": (STEPS + 1) * IMAGES,
        "embeddings": (STEPS + 1) * IMAGES,
        "searches": (STEPS + 1) * IMAGES,
    }


@pytest.mark.parametrize("gradient", ["frozen", "full"])
def test_open_gates_add_a_gradient_a_step(bench, course, gradient):
    entry = draw(bench, course, **OPEN, gradient=gradient)
    through = 2 * STEPS * IMAGES if gradient == "full" else 0
    assert entry.counted["unet_evaluations"] == 2 * STEPS * IMAGES + through
    assert entry.counted["unet_gradients"] == through
    assert entry.counted["gradients"] == STEPS * IMAGES
    assert entry.counted["vae_decodes"] == entry.counted["embeddings"] == (2 * STEPS + 1) * IMAGES
    assert entry.counted["searches"] == (STEPS + 1) * IMAGES


def test_counts_agree_with_the_verdicts_and_with_every_round(bench, course):
    ours = [one for one in bench.CONTESTANTS if one.name in ("promise", "check schedule", "final check only")]
    for entry in bench.run_case(course, ours, 1):
        assert entry.counted["unet_evaluations"] == sum(verdict.evaluations for verdict in entry.verdicts)
        assert len(entry.seconds) == 1


def test_lines_have_every_column_and_make_the_tables(bench, course):
    chosen = (bench.CONTESTANTS[0], bench.CONTESTANTS[-1])
    lines = bench.lines_of(course, bench.run_case(course, chosen, 1), "cpu", "")
    assert [line["contestant"] for line in lines] == ["plain", "final check only"]
    assert all(tuple(line) == bench.COLUMNS for line in lines)
    assert lines[1]["changed_pct"] == "0" and lines[0]["unet_evaluations"] == str(2 * STEPS)
    assert "final check only" in bench.waterfall(lines) and "not run" in bench.judged(lines)
