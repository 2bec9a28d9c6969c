"""The serving benchmark does the same work both ways and refuses results that differ; no time is asserted."""

from __future__ import annotations

import copy
import csv
import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

import amg

ROOT = Path(__file__).resolve().parents[2]
COUNT = 4


@pytest.fixture(scope="module")
def bench():
    """benchmarks/bench_serving.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_serving")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def served(bench, tmp_path_factory):
    """One round of four short requests on the tiny Stable Diffusion."""
    from sampling.models import Model

    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/integrations/conftest.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    embedder = tiny.TinyEmbedder().eval().requires_grad_(False)
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions = [f"caption {i % 20}" for i in range(60)]
    path = tmp_path_factory.mktemp("bench") / "index.amg"
    index = amg.Index.build(pictures, captions, embedder, path, progress=False)
    jobs = {"ordinary": [("cat", 0), ("dog", 1)], "memorised": [("hat", 5), ("cup", 6)]}
    model = Model("tiny", tiny.tiny_sd(), index, 4.0, jobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STEPS", (3, 4, 5))
        return bench.run(model, COUNT, COUNT, 1)


def test_requests_are_mixed(bench):
    class Prompts:
        @staticmethod
        def prompts(kind, count):
            assert kind == "mixed"
            return [str(i) for i in range(count)], list(range(count))

    requests = bench.mixed_requests(Prompts, 16)
    kinds = {(one.num_inference_steps, one.guidance_scale, int(one.prompt) % 2) for one in requests}
    assert len(kinds) >= 10 and len({one.seed for one in requests}) == 16


def test_both_ways_do_the_same_work(bench, served):
    solo, joined = served[bench.ONE_BY_ONE], served[bench.SUBMIT]
    assert sum(joined.calls) == sum(solo.calls) and len(joined.calls) < len(solo.calls)
    assert max(solo.calls) == 2 and max(joined.calls) == 2 * COUNT
    for own in served.values():
        assert len(own.seconds) == 1 and len(own.latencies) == COUNT
        assert 0 < max(own.latencies) <= own.seconds[0]


def test_a_result_that_is_not_its_solo_run_s_is_refused(bench, served):
    solo = served[bench.ONE_BY_ONE].outputs
    assert bench.differences(solo, solo) == (0, 0, 0)
    brighter = [copy.copy(out) for out in solo]
    brighter[2].images = solo[2].images.clone()
    brighter[2].images[0, 0, 0, 0] += 2 / 255 if solo[2].images[0, 0, 0, 0] < 0.5 else -2 / 255
    with pytest.raises(AssertionError, match="request 2 differs by 2 levels of 255"):
        bench.differences(brighter, solo)
    other = [copy.copy(out) for out in solo]
    other[1].amg = [replace(solo[1].amg[0], rewinds=9)]
    with pytest.raises(AssertionError, match=r"request 1: `rewinds` is \(9,\), alone"):
        bench.differences(other, solo)


def test_the_tables_say_what_the_csv_holds(bench, served, tmp_path):
    path = tmp_path / "serving.csv"
    for note in ("first", "second"):
        bench.append(path, bench.lines_of(served, COUNT, COUNT, note), bench.COLUMNS)
    with path.open(newline="") as file:
        line = list(csv.DictReader(file))[-1]
    text = bench.tables(path)
    for cells in (f"| {COUNT} | 1 | one by one |", f"| {COUNT} | {COUNT} | submit |"):
        assert text.count(cells) == 1, "only the last run's"
    solo, joined = (own.seconds[0] for own in (served[bench.ONE_BY_ONE], served[bench.SUBMIT]))
    assert float(line["throughput"]) == pytest.approx(solo / joined, rel=1e-3)
    assert float(line["p50"]) == pytest.approx(joined, rel=1e-3)
    assert f"{float(line['throughput']):.2f}×" in text and f"{float(line['p50']):.2f}" in text
    assert f"at most {float(line['most_levels']):g} level of 255" in text
