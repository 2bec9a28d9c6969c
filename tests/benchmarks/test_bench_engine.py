"""The engine's benchmark counts reads, fits lines and makes tables as it says; no time is asserted."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """benchmarks/bench_engine.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_engine")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def tiny(bench, tmp_path_factory):
    """A bench of the tiny Stable Diffusion and a small index of random images."""
    from sampling.models import Model

    import amg

    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/integrations/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    embedder = module.TinyEmbedder().eval().requires_grad_(False)
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    path = tmp_path_factory.mktemp("bench") / "index.amg"
    index = amg.Index.build(pictures, [f"caption {i}" for i in range(60)], embedder, path, progress=False)
    jobs = {"ordinary": [("cat", 0), ("dog", 1)], "memorised": [("hat", 5), ("cup", 6)]}
    pipe = module.tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    return bench.Bench(Model("tiny", pipe, index, 4.0, jobs), steps=4, rounds=2)


def read_ten_times(values):
    """tolist, item, bool, int, float, index, cpu, numpy, nonzero, and torch.equal."""
    one = values[0]
    found = values.tolist(), one.item(), bool(one), int(one), float(one), [7, 8, 9][one]
    return found, values.cpu(), values.numpy(), values.nonzero(), torch.equal(values, values)


def test_a_known_function_has_its_known_number_of_reads(bench):
    from engine.reads import METHODS, counted_reads

    values = torch.tensor([1, 2])
    before = {name: getattr(torch.Tensor, name) for name in METHODS}
    with counted_reads() as reads:
        read_ten_times(values)
        assert reads.total == 10 and set(reads.counted.values()) == {1}
        (values + values).sum()
        assert reads.total == 10, "what stays a tensor is no read"
        with reads.paused():
            values.tolist()
        assert reads.total == 10
        thread = threading.Thread(target=read_ten_times, args=(values,))
        thread.start()
        thread.join()
        assert reads.total == 20, "of any thread"
        assert 2 in values and reads.total == 21, "what reads by other means inside counts once"
    assert {name: getattr(torch.Tensor, name) for name in METHODS} == before
    values.tolist()
    assert reads.total == 21


def test_reads_inside_what_is_left_out_do_not_count(bench):
    from engine.reads import counted_reads, unread

    class Encoder:
        def encode(self, values):
            return values.tolist()

    encoder, values = Encoder(), torch.tensor([1, 2])
    with counted_reads() as reads, unread(reads, encoder, "encode"):
        assert encoder.encode(values) == [1, 2] and reads.total == 0
        values.tolist()
        assert reads.total == 1
    assert "encode" not in vars(encoder)


def test_a_line_through_two_step_counts(bench):
    from engine.arithmetic import line_through

    cost = line_through(10, 0.05 + 10 * 0.003, 50, 0.05 + 50 * 0.003)
    assert cost.step == pytest.approx(0.003, rel=1e-12) and cost.fixed == pytest.approx(0.05, rel=1e-12)
    with pytest.raises(ValueError, match="`few` and `many` must differ"):
        line_through(10, 1.0, 10, 2.0)


def test_every_round_of_a_linear_contestant_gives_its_line(bench, monkeypatch):
    from engine import cost

    now, order = [0.0], []

    def drawing(name, fixed, step):
        def draw(steps):
            order.append(name)
            now[0] += fixed + steps * step

        return draw

    monkeypatch.setattr(cost, "CLOCKS", {"": lambda: now[0]})
    found = cost.alternate({"plain": drawing("plain", 0.01, 1e-4), "main": drawing("main", 0.1, 3e-4)}, 3)
    assert [one.step for one in found["", "plain"]] == pytest.approx([1e-4] * 3, rel=1e-9)
    assert [one.step for one in found["", "main"]] == pytest.approx([3e-4] * 3, rel=1e-9)
    assert [one.fixed for one in found["", "main"]] == pytest.approx([0.1] * 3, rel=1e-9)
    assert order[::2] == ["plain", "main", "main", "plain", "plain", "main"], "they take turns"


def test_the_interval_of_a_median_is_drawn_the_same_each_time(bench):
    from engine.arithmetic import bootstrap

    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98, 1.2, 0.8]
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values) and 0.8 < low <= 1.0 <= high < 1.2
    assert bootstrap([2.0] * 5) == (2.0, 2.0)
    with pytest.raises(ValueError, match="`values` must not be empty"):
        bootstrap([])


def test_grey_levels_are_those_of_the_delivered_bits(bench):
    from engine.arithmetic import grey_levels

    theirs = torch.full((4, 3, 2, 2), 102 / 255)
    ours = theirs.clone()
    ours[1, 0, 0, 0] += 3 / 255
    ours[2, 2, 1, 1] -= 0.6 / 255
    ours[3] += 0.4 / 255
    assert grey_levels(ours, theirs) == [0, 3, 1, 0]
    with pytest.raises(ValueError, match="must be finite"):
        grey_levels(ours * float("nan"), theirs)


def test_free_networks_make_a_call_of_its_steps_alone_and_are_put_back(bench, tiny):
    from engine import cost
    from engine.setup import free_networks

    pipe, embedder = tiny.model.pipe, tiny.model.index.embedder
    prompts, seeds = tiny.model.prompts("ordinary", 2)
    before = tiny.plain(prompts, seeds)
    with free_networks(tiny.model) as calls:
        tiny.ours(tiny.sampler("main"), prompts, seeds, 10)
        assert calls["unet"] == 10 and calls["decoder"] and calls["embedder"]
        with pytest.raises(
            AssertionError, match="plain: 11 calls of the U-Net and one of the decoder expected"
        ):
            cost.require_plain_work("plain", lambda steps: tiny.plain(prompts, seeds, 10), 11, calls)
    assert torch.equal(tiny.plain(prompts, seeds), before)
    assert not any("forward" in vars(one) for one in (pipe.unet, embedder)) and "decode" not in vars(pipe.vae)


def test_loop_and_fixed_name_every_contestant_and_clock(bench, tiny):
    from engine import cost

    figures = [*cost.loop(tiny), *cost.fixed(tiny)]
    timed = {(one.row, one.case, one.contestant) for one in figures if one.metric.startswith(("µs", "ms"))}
    whos = ("plain", "off", "main")
    assert timed == {("loop", f"batch {batch}", who) for batch in (1, 16) for who in whos} | {
        ("fixed", "batch 1", who) for who in whos
    }
    assert all(len(one.values) == 2 for one in figures if one.metric.startswith(("µs", "ms")))


def test_reads_before_the_last_step_are_not_those_of_the_whole_call(bench, tiny):
    from engine import cost

    prompts, seeds = tiny.model.prompts("ordinary", 2)
    total, before, calls, names = cost.reads_of(tiny, tiny.sampler("off"), prompts, seeds)
    assert calls == tiny.steps and 0 <= before < total == sum(names.values())
    assert "encode_prompt" not in vars(tiny.model.pipe)


def test_rows_are_counted_and_outcomes_searched_for_anew(bench, tiny):
    from engine import streams

    turns, prompts = streams.Turns(), tiny.model.prompts("ordinary", 2)
    streams.take_turn(tiny, turns, streams.in_batches(tiny), *prompts)
    assert turns.rows == 2 * 2 * tiny.steps and len(turns.seconds) == len(turns.cpu_seconds) == 1
    with tiny.sampler("off", threshold=-1.0) as sampler:
        streams.take_turn(tiny, turns, streams.submitted(tiny, sampler), *prompts)
    found = streams.outcome(tiny, turns)
    assert found == {"delivered over the threshold": 2, "blocked": 0, "rewinds": 0, "re-runs": 0}
    assert len(streams.delivered(turns)) == 2


def test_schedulers_that_refuse_say_why(bench, tiny):
    from engine import likeness

    cases = likeness.listed()
    own = tiny.model.pipe.scheduler
    assert {"ddim", "pndm", "unipc"} <= set(cases)
    levels, note = likeness.compared(tiny, cases["ddim"].make, 0.0)
    assert levels is not None and note == ""
    levels, note = likeness.compared(tiny, lambda: cases["flow-mu"].make(), 0.0)
    assert levels is None and note.startswith(("the pipeline refuses: ", "the Sampler refuses: "))
    others = likeness.further({case.kind for case in cases.values()}, own.config)
    assert "DDIMScheduler" not in others and "DDIMInverseScheduler" in others
    levels, note = likeness.compared(tiny, lambda: cases["ddim"].kind.missing, 0.0)
    assert (
        levels is None and note == "cannot be made: AttributeError: 'str' object has no attribute 'missing'"
    )
    tiny.model.pipe.scheduler = own


def test_the_tables_say_what_the_csv_holds(bench, tmp_path):
    from engine.report import COLUMNS, Figure, lines_of

    path = tmp_path / "engine.csv"
    for loop, scale in (("before the engine", 2.0), ("engine", 9.0), ("engine", 1.0)):
        spread, ratios = (
            tuple(scale * value for value in values) for values in ((1, 2, 3), (1.25, 1.5, 1.75))
        )
        figures = [
            Figure("loop", "batch 1", "main", "µs a step", spread),
            Figure("ordinary", "batches of 16", "main", "over plain", ratios, (1.3, 1.7)),
            Figure("reads", "ordinary", "main", "reads", (scale * 17,), note="tolist 17"),
            Figure("schedulers", "ddim", "off", "most grey levels", (0,)),
            Figure("schedulers", "pndm", "off", "most grey levels", (0,)),
            Figure("schedulers", "edm", "off", "most grey levels", note="the Sampler refuses: a | b"),
            Figure("schedulers", "flow", "off", "most grey levels", note="the pipeline refuses: c"),
        ]
        bench.append(path, lines_of(figures, loop, "quick"), COLUMNS)
    text = bench.tables(path)
    for line in (
        "| batch 1 | main | µs a step | 4 (2.8 – 5.2) | 2 (1.4 – 2.6) |",
        "| batches of 16 | main | over plain | 3 [1.3, 1.7] | 1.5 [1.3, 1.7] |",
        "| ordinary | main | reads | 34 | 17 |",
    ):
        assert text.count(line) == 1, line
    for line in (
        "| 0 grey levels | ddim, pndm |",
        r"| the Sampler refuses: a \| b | edm |",
        "| the pipeline refuses | flow |",
    ):
        assert text.count(line) == 2, line
    assert text.index("time a step") < text.index("Host reads") < text.index("Ordinary prompts")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["rounds"], line["p50"], line["low"]) for line in lines[-7:-3]] == [
        ("3", "2", ""),
        ("3", "1.5", "1.3"),
        ("1", "17", ""),
        ("1", "0", ""),
    ]
    rows = [line.split() for line in bench.report.aligned(lines[-7:]).splitlines()]
    assert rows[0] == ["row", "case", "who", "figure", "value"] and rows[3][-1] == "17" and len(rows) == 8


def test_rows_are_chosen_by_name(bench):
    import argparse

    assert bench.chosen("loop,reads") == ["loop", "reads"] and list(bench.rows()) == list(bench.report.TITLES)
    with pytest.raises(argparse.ArgumentTypeError, match="rows are loop, fixed"):
        bench.chosen("loop,speed")
