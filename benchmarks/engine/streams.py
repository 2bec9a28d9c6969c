"""Whole runs of photos-sd: a stream of requests, ordinary batches, and the costliest image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import amg
from engine.arithmetic import bootstrap, grey_levels
from engine.cost import CPU, EVERYTHING, MAIN, PLAIN
from engine.report import Figure
from engine.setup import BATCH, Bench, counted_rows

SUBMIT = "submit"
INTERVAL = (0.0, 0.7)
CEILING_IMAGES = 8


@dataclass
class Turns:
    """One contestant's seconds by round, and its last turn's pictures, verdicts and rows of the U-Net."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    verdicts: list[Any] = field(default_factory=list)
    rows: int = 0


Draw = Callable[[Sequence[str], Sequence[int]], tuple[Tensor, list[Any]]]


def in_batches(bench: Bench, sampler: Any = None) -> Draw:
    """Draws in batches of 16: by the pipeline itself, or by a sampler's calls."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, list[Any]]:
        images, verdicts = [], []
        for first in range(0, len(prompts), BATCH):
            part = slice(first, first + BATCH)
            if sampler is None:
                images.append(bench.plain(prompts[part], seeds[part]))
                continue
            out = bench.ours(sampler, prompts[part], seeds[part])
            images.append(out.images)
            verdicts += out.amg
        return torch.cat(images), verdicts

    return draw


def submitted(bench: Bench, sampler: Any) -> Draw:
    """Submits every prompt at once as a request of its own and waits for all."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, list[Any]]:
        options = {"num_inference_steps": bench.steps, "guidance_scale": bench.model.guidance_scale}
        futures = [
            sampler.submit(amg.Request(prompt, seed=seed, output_type="pt", **options))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        outs = [future.result() for future in futures]
        return torch.cat([out.images for out in outs]), [verdict for out in outs for verdict in out.amg]

    return draw


def take_turn(bench: Bench, turns: Turns, draw: Draw, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """One timed turn."""
    with counted_rows(bench.model.pipe) as rows:
        start, cpu_start = time.perf_counter(), time.process_time()
        turns.images, turns.verdicts = draw(prompts, seeds)
        turns.seconds.append(time.perf_counter() - start)
        turns.cpu_seconds.append(time.process_time() - cpu_start)
        turns.rows = sum(rows)


def stream(bench: Bench) -> list[Figure]:
    """Requests through `submit`, every saving on, against plain batches of 16: both kinds of prompts."""
    figures, count = [], 32 if bench.quick else bench.prompts
    for kind in ("ordinary", "memorised"):
        prompts, seeds = bench.model.prompts(kind, count)
        with bench.sampler(MAIN, **bench.options()) as sampler:
            draws = {PLAIN: in_batches(bench), SUBMIT: submitted(bench, sampler)}
            for draw in draws.values():
                draw(prompts[:BATCH], seeds[:BATCH])
            turns = {name: Turns() for name in draws}
            for number in range(bench.rounds_of(3, 2)):
                for name in list(draws) if number % 2 else reversed(draws):
                    take_turn(bench, turns[name], draws[name], prompts, seeds)
        figures += stream_figures(bench, kind, turns)
    return figures


def stream_figures(bench: Bench, kind: str, turns: dict[str, Turns]) -> list[Figure]:
    """What a stream's turns say: time, work, and what was delivered."""
    plain, figures = turns[PLAIN], []
    count, base = len(plain.images), by_clock(plain)

    def add(name: str, metric: str, *values: float) -> None:
        figures.append(Figure("stream", f"{count} {kind}", name, metric, values))

    for name, own in turns.items():
        add(name, "U-Net evaluations an image", own.rows / count)
        for clock, seconds in by_clock(own).items():
            add(name, f"seconds{clock}", *seconds)
            add(name, f"ms an evaluation{clock}", *(1e3 * one / own.rows for one in seconds))
            if name != PLAIN:
                whole = over(seconds, base[clock])
                add(name, f"whole time over plain{clock}", *whole)
                add(
                    name,
                    f"time an evaluation over plain{clock}",
                    *(one * plain.rows / own.rows for one in whole),
                )
        if name != PLAIN:
            for metric, value in outcome(bench, own).items():
                add(name, metric, value)
        add(name, "copies by photos-judge %", 100 * bench.model.judge(delivered(own)))  # type: ignore[misc]
    if kind == "ordinary":
        levels = grey_levels(turns[SUBMIT].images, plain.images)
        add(SUBMIT, "differ from plain %", 100 * sum(level > 1 for level in levels) / count)
    return figures


def by_clock(turns: Turns) -> dict[str, list[float]]:
    """The seconds of every round by what a metric's name says of the clock."""
    return {"": turns.seconds, CPU: turns.cpu_seconds}


def over(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratio of every round."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def delivered(turns: Turns) -> Tensor:
    """The pictures that were not blocked."""
    if not turns.verdicts:
        return turns.images
    return turns.images[[not verdict.blocked for verdict in turns.verdicts]]


def outcome(bench: Bench, turns: Turns) -> dict[str, float]:
    """Delivered pictures over the threshold, searched for anew, and what happened on the way; counts."""
    verdicts, pictures = turns.verdicts, delivered(turns)
    return {
        "delivered over the threshold": over_threshold(bench, pictures, verdicts[0]),
        "blocked": sum(verdict.blocked for verdict in verdicts),
        "rewinds": sum(verdict.rewinds for verdict in verdicts),
        "re-runs": sum(verdict.retries for verdict in verdicts),
    }


def over_threshold(bench: Bench, pictures: Tensor, like: Any) -> int:
    """How many of the pictures break the promise that the verdict `like` was held to, metric or guard."""
    if not len(pictures):
        return 0
    found = bench.model.index.closest(pictures)
    bad = found.similarity > like.threshold
    if like.guard is not None:
        bad = bad | (found.guard[0] > like.guard.threshold)
    return int(bad.sum())


def ordinary(bench: Bench) -> list[Figure]:
    """Ordinary prompts in batches of 16, every saving on: paired rounds, each of the next 16 prompts."""
    student = {"student": bench.options()["student"]}  # a calibration holds for its own interval
    samplers = {
        EVERYTHING: bench.sampler(MAIN, **bench.options()),
        f"main, student, interval {INTERVAL}": bench.sampler(MAIN, **student, guidance_interval=INTERVAL),
    }
    draws = {PLAIN: in_batches(bench), **{name: in_batches(bench, one) for name, one in samplers.items()}}
    turns, rows = {name: Turns() for name in draws}, dict.fromkeys(draws, 0)
    rounds, order = bench.rounds_of(24, 15), list(draws)
    every = bench.model.prompts("ordinary", BATCH * (rounds + 1))
    for number in range(rounds + 1):
        prompts, seeds = (part[BATCH * number : BATCH * (number + 1)] for part in every)
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            take_turn(bench, turns[name], draws[name], prompts, seeds)
            rows[name] += turns[name].rows if number else 0
    figures = []
    for name, own in turns.items():
        figures += paired(name, own, turns[PLAIN])
        evaluations = rows[name] / (rounds * BATCH)
        figures.append(
            Figure("ordinary", "batches of 16", name, "U-Net evaluations an image", (evaluations,))
        )
    return figures


def paired(name: str, own: Turns, plain: Turns) -> list[Figure]:
    """Seconds a batch, and over plain's with the interval of the median; the first round does not count."""
    figures, base = [], by_clock(plain)
    for clock, seconds in by_clock(own).items():
        head = ("ordinary", "batches of 16", name)
        figures.append(Figure(*head, f"seconds a batch{clock}", tuple(seconds[1:])))
        if own is not plain:
            ratios = over(seconds[1:], base[clock][1:])
            figures.append(Figure(*head, f"whole time over plain{clock}", tuple(ratios), bootstrap(ratios)))
    return figures


# What makes every picture memorised and every gate open: all that costs evaluations is wanted at once.
WORST = {
    "threshold": -1.0,
    "rewind_threshold": -1.0,
    "lambda_min": -1.0,
    "lambda_max": -1.0,
    "max_rewinds": 100,
    "max_retries": 100,
}
CASES: dict[str, dict[str, Any]] = {
    "frozen gradient": {},
    "full gradient": {"gradient": "full"},
    "no rewinds": {"rewind_at": ()},
}


def ceiling(bench: Bench) -> list[Figure]:
    """Rows of the U-Net that the costliest image takes, drawn alone, over plain's, against
    `max_evaluations`; counted by a hook and as its verdict says."""
    figures, plain, each = [], 2 * bench.steps, 1 if bench.quick else CEILING_IMAGES // 2
    for case, overrides in CASES.items():
        sampler = bench.sampler(MAIN, **{**WORST, **overrides})
        counted, told = [], []
        for kind in ("ordinary", "memorised"):
            for prompt, seed in zip(*bench.model.prompts(kind, each), strict=True):
                with counted_rows(bench.model.pipe) as rows:
                    out = bench.ours(sampler, [prompt], [seed])
                counted.append(sum(rows) / plain)
                told.append(out.amg[0].evaluations / plain)
        limit = sampler.config.max_evaluations
        for metric, value in (
            ("costliest over plain", max(counted)),
            ("as its verdict says", max(told)),
            ("median over plain", statistics.median(counted)),
            ("max_evaluations", limit),
        ):
            figures.append(Figure("ceiling", case, MAIN, metric, (value,)))
    return figures
