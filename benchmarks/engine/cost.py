"""What the loop itself costs: seconds a step and a call with the networks free, host reads of values."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from engine.arithmetic import Cost, line_through
from engine.reads import counted_reads, unread
from engine.report import Figure
from engine.setup import BATCH, Bench, free_networks

FEW, MANY = 10, 50
PLAIN, OFF, MAIN = "plain", "off", "main"
EVERYTHING = "main, calibrated, student"
CPU = " (CPU time)"  # of all threads, which other jobs on the machine stretch less
CLOCKS = {"": time.perf_counter, CPU: time.process_time}
Call = Callable[[int], Any]  # of a number of steps


def loop(bench: Bench) -> list[Figure]:
    """Microseconds a step, batch 1 and 16: the slope between 10 and 50 steps with every network free. `main`
    makes its four checks and the final one at both numbers of steps, so that they cancel."""
    figures = []
    for batch in (1, BATCH):
        costs = timed(bench, batch)
        for (clock, name), own in costs.items():
            values = tuple(1e6 * cost.step for cost in own)
            figures.append(Figure("loop", f"batch {batch}", name, f"µs a step{clock}", values))
            if name != PLAIN:
                plain = statistics.median(cost.step for cost in costs[clock, PLAIN])
                over = statistics.median(values) / (1e6 * plain)
                figures.append(Figure("loop", f"batch {batch}", name, f"over plain{clock}", (over,)))
    return figures


def fixed(bench: Bench) -> list[Figure]:
    """Milliseconds of a call at batch 1 beside its steps: where the line through 10 and 50 steps meets none.
    Decoder and embedder are free too; the searches and the rest of the checks are in it."""
    return [
        Figure("fixed", "batch 1", name, f"ms a call{clock}", tuple(1e3 * cost.fixed for cost in own))
        for (clock, name), own in timed(bench, 1).items()
    ]


def timed(bench: Bench, batch: int) -> dict[tuple[str, str], list[Cost]]:
    """The costs by clock and contestant, one per round; contestants take turns."""
    prompts, seeds = bench.model.prompts("ordinary", batch)
    with free_networks(bench.model) as calls:
        draws: dict[str, Call] = {PLAIN: lambda steps: bench.plain(prompts, seeds, steps)}
        for preset in (OFF, MAIN):
            sampler = bench.sampler(preset)
            draws[preset] = lambda steps, sampler=sampler: bench.ours(sampler, prompts, seeds, steps)
        for name, draw in draws.items():
            for steps in (FEW, MANY):
                require_plain_work(name, draw, steps, calls)
        return alternate(draws, bench.rounds_of(40, 12))


def require_plain_work(name: str, draw: Call, steps: int, calls: Counter[str]) -> None:
    """One untimed call; AssertionError unless it was one call of the free U-Net a step and the free decoder
    was used."""
    calls.clear()
    draw(steps)
    if calls["unet"] != steps or not calls["decoder"]:
        raise AssertionError(
            f"{name}: {steps} calls of the U-Net and one of the decoder expected, got {calls}"
        )
    if (calls["embedder"] > 0) != (name != PLAIN):
        raise AssertionError(f"{name}: the free embedder was called {calls['embedder']} times")


def alternate(draws: dict[str, Call], rounds: int) -> dict[tuple[str, str], list[Cost]]:
    """Rounds in which everyone is timed at both numbers of steps, in another order each round."""
    costs: dict[tuple[str, str], list[Cost]] = {(clock, name): [] for clock in CLOCKS for name in draws}
    order = list(draws)
    for number in range(rounds):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            few, many = (seconds_of(draws[name], steps) for steps in (FEW, MANY))
            for clock in CLOCKS:
                costs[clock, name].append(line_through(FEW, few[clock], MANY, many[clock]))
    return costs


def seconds_of(draw: Call, steps: int) -> dict[str, float]:
    """Seconds of one call by each clock."""
    start = {name: clock() for name, clock in CLOCKS.items()}
    draw(steps)
    return {name: clock() - start[name] for name, clock in CLOCKS.items()}


def reads(bench: Bench) -> list[Figure]:
    """Host reads in one call of a batch of 16, real networks: all, and those before the U-Net's last call."""
    figures = []
    contestants = {
        PLAIN: None,
        OFF: bench.sampler(OFF),
        MAIN: bench.sampler(MAIN),
        EVERYTHING: bench.sampler(MAIN, **bench.options()),
    }
    for kind in ("ordinary", "memorised"):
        prompts, seeds = bench.model.prompts(kind, BATCH)
        for name, sampler in contestants.items():
            draw = bench.model.pipe if sampler is None else sampler
            reads_of(bench, draw, prompts, seeds)  # a scheduler's tables are made once, on the host
            total, before, rows, by_name = reads_of(bench, draw, prompts, seeds)
            spelled = ", ".join(f"{read} {count}" for read, count in by_name.most_common())
            for metric, value, note in (
                ("reads", total, spelled),
                ("reads before the last step", before, ""),
                ("U-Net calls", rows, ""),
            ):
                figures.append(Figure("reads", kind, name, metric, (value,), note=note))
    return figures


def reads_of(
    bench: Bench, draw: Any, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[int, int, int, Counter[str]]:
    """Reads of one call, those before its last call of the U-Net, the calls of the U-Net, reads by name; none
    that text encoding makes."""
    marks: list[int] = []
    more = {} if draw is bench.model.pipe else {"progress": False}
    with counted_reads() as counted, unread(counted, bench.model.pipe, "encode_prompt"):
        handle = bench.model.pipe.unet.register_forward_pre_hook(lambda *_: marks.append(counted.total))
        try:
            bench.call(draw, prompts, seeds, None, **more)
        finally:
            handle.remove()
        return counted.total, marks[-1], len(marks), counted.counted
