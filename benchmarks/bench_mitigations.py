"""Rival mitigations, the paper's ablations and ours on `photos-sd`, one protocol.

    python benchmarks/bench_mitigations.py --tune     # every grid on validation: results/mitigations_grid.csv
    python benchmarks/bench_mitigations.py --test     # the chosen points on test: results/mitigations.csv
    python benchmarks/bench_mitigations.py --time     # seconds per image, in turns: mitigations_seconds.csv
    python benchmarks/bench_mitigations.py --tables   # docs/mitigations.md, docs/frontier.png from the CSVs
    python benchmarks/bench_mitigations.py --test --only "ours, main" --again    # measure a row once more

30 DDIM steps, guidance scale 7.5. Rows already in a CSV are skipped, so an interrupted run goes on where it
stopped. `--sheet DIR` keeps the first pictures of every method; with --tables they become the contact sheet.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import frontier
import torch
from mitigations.clamping import Region, calibrate
from mitigations.interface import Drawn, Mitigation
from mitigations.measure import CALIBRATION_SEED, Judges, Prompts, judges_for, measure, prompts_of
from mitigations.methods import BY_NAME, Context, Method
from mitigations.records import GRID, SECONDS, TEST, chosen, point_text, provenance, put, read
from torch import Tensor
from tqdm import tqdm

from amg.commands.demo import GUIDANCE_SCALES, open_index, open_pipeline
from amg.zoo.judge import load_judge
from amg.zoo.photos import training_set

RESULTS = Path(__file__).resolve().parent / "results"
MODEL, STEPS, BATCH = "photos-sd", 30, 16
SIZES, FID_RESAMPLES = {"validation": 32, "test": 96}, {"validation": 0, "test": 200}
CALIBRATION, TIMED, ROUNDS = 64, 16, 2


class Bench(NamedTuple):
    """The model and what measures it."""

    pipe: Any
    context: Context
    judges: Judges
    prompts: dict[str, Prompts]


def main() -> None:
    options = _options()
    torch.set_grad_enabled(False)
    methods = [BY_NAME[name] for name in options.only or BY_NAME]
    if options.tune or options.test or options.time:
        bench = open_bench(options.work)
        if options.tune:
            tune(bench, methods, options)
        if options.test:
            test(bench, methods, options)
        if options.time:
            clock(bench, methods, options.results)
    if options.tables:
        frontier.write(options.results, options.sheet)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("tune", "test", "time", "tables", "again"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", action="append", choices=tuple(BY_NAME), help="a method; repeatable")
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the index")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--sheet", type=Path, help="folder for the first pictures of every method")
    return parser.parse_args()


def open_bench(work: Path) -> Bench:
    """The bundled model with its index and judges; Huang's region is calibrated when first asked for."""
    pipe, index, data = open_pipeline(MODEL), open_index(MODEL, work / f"{MODEL}.amg"), training_set(64)
    pipe.set_progress_bar_config(disable=True)
    prompts = {split: prompts_of(split, count, data) for split, count in SIZES.items()}

    @functools.cache
    def region() -> Region:
        own = prompts["validation"]
        texts = list(dict.fromkeys(t for t, kind in zip(own.texts, own.specific, strict=True) if not kind))
        asked = [texts[i % len(texts)] for i in range(CALIBRATION)]
        seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION)
        return calibrate(pipe, asked, _generators(seeds), steps=STEPS, guidance_scale=GUIDANCE_SCALES[MODEL])

    return Bench(pipe, Context(index, region), judges_for(index, load_judge(), data), prompts)


def tune(bench: Bench, methods: Sequence[Method], options: argparse.Namespace) -> None:
    """Every point of every grid with more than one, on the validation prompts."""
    path = options.results / GRID
    for method in methods:
        for point in method.grid if len(method.grid) > 1 else ():
            _row(bench, method, dict(point), "validation", path, ("method", "options"), options)


def test(bench: Bench, methods: Sequence[Method], options: argparse.Namespace) -> None:
    """Every method at its chosen point, on the test prompts."""
    for method in methods:
        point = point_of(method, options.results)
        _row(bench, method, point, "test", options.results / TEST, ("method",), options)


def point_of(method: Method, results: Path) -> dict[str, Any]:
    """The point chosen on validation (an ablation takes that of `method.like`), or the grid's only one."""
    tuned = method if method.like is None else BY_NAME[method.like]
    return dict(tuned.grid[0]) if len(tuned.grid) == 1 else chosen(read(results / GRID), tuned.name)


def _row(
    bench: Bench,
    method: Method,
    point: dict[str, Any],
    split: str,
    path: Path,
    key: tuple[str, ...],
    options: argparse.Namespace,
) -> None:
    head = {"method": method.name, "options": point_text(point), "split": split}
    done = any(all(row[name] == head[name] for name in key) for row in read(path))
    if done and not options.again:
        return
    mitigation, prompts = method.build(point, bench.context), bench.prompts[split]
    began = time.monotonic()
    drawn = draw(bench.pipe, mitigation, prompts, f"{split} {method.name} {head['options']}")
    seconds = (time.monotonic() - began) / len(prompts.texts)
    row = head | measure(drawn.images, prompts, bench.judges, FID_RESAMPLES[split])
    late = torch.zeros(0) if drawn.late is None else drawn.late.double()
    row["before the check %"] = 100 * late.mean().item() if len(late) else row["cosine > 0.5 %"]
    row["blocked %"] = 0.0 if drawn.blocked is None else 100 * drawn.blocked.double().mean().item()
    row |= {"evaluations": drawn.evaluations, "seconds": seconds, "images": len(prompts.texts)}
    put(path, row | {"steps": STEPS, "first seed": prompts.seeds[0]} | provenance(), key)
    shown = ("cosine > 0.5 %", "network %", "luminance %", "FID", "alignment", "evaluations", "seconds")
    print(" ".join(f"{name} {row[name]:.3g}" for name in shown), flush=True)
    if options.sheet:
        strip = frontier.strip_path(options.sheet, split, method.name, head["options"])
        frontier.keep(drawn.images, prompts, strip)


def draw(pipe: Any, mitigation: Mitigation, prompts: Prompts, title: str) -> Drawn:
    """All pictures of a split, in batches."""
    parts: list[tuple[Drawn, int]] = []
    with tqdm(total=len(prompts.texts), desc=title, unit="image") as bar:
        for first in range(0, len(prompts.texts), BATCH):
            rows = slice(first, first + BATCH)
            drawn = _batch(pipe, mitigation, prompts.texts[rows], prompts.seeds[rows])
            parts.append((drawn, len(drawn.images)))
            bar.update(len(drawn.images))
    total = sum(count for _, count in parts)
    return Drawn(
        torch.cat([drawn.images for drawn, _ in parts]),
        sum(drawn.evaluations * count for drawn, count in parts) / total,
        _joined([drawn.late for drawn, _ in parts]),
        _joined([drawn.blocked for drawn, _ in parts]),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def clock(bench: Bench, methods: Sequence[Method], results: Path) -> None:
    """Seconds per image at the chosen points: 16 test images a method, methods taking turns, two rounds."""
    own = bench.prompts["test"]
    specific = TIMED - TIMED // 4
    rows = [*range(specific), *range(len(own.texts) - TIMED // 4, len(own.texts))]
    texts, seeds = [own.texts[i] for i in rows], [own.seeds[i] for i in rows]
    built = [(method, method.build(point_of(method, results), bench.context)) for method in methods]
    _batch(bench.pipe, built[0][1], texts, seeds)  # the first call of a process is slower
    for turn in range(ROUNDS):
        for method, mitigation in built:
            began = time.monotonic()
            _batch(bench.pipe, mitigation, texts, seeds)
            seconds = (time.monotonic() - began) / TIMED
            row = {"method": method.name, "round": turn, "seconds": seconds, "images": TIMED}
            put(results / SECONDS, row | provenance(), ("method", "round"))
            print(f"{method.name}: {seconds:.3f} s/image", flush=True)


def _batch(pipe: Any, mitigation: Mitigation, texts: list[str], seeds: Sequence[int]) -> Drawn:
    return mitigation.draw(
        pipe, texts, _generators(seeds), steps=STEPS, guidance_scale=GUIDANCE_SCALES[MODEL]
    )


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per image, so that no image depends on its batch-mates."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


if __name__ == "__main__":
    main()
