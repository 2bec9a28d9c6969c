"""Times continuous batching: mixed requests through `Sampler.submit` against the same one by one.

    python benchmarks/bench_serving.py            # figures go to benchmarks/results/serving.csv
    python benchmarks/bench_serving.py --requests 8 --max-batch 4 --quick   # one round, nothing recorded
    python benchmarks/bench_serving.py --tables   # the figures in docs/serving.md, from the CSV

All requests arrive at the same moment, alternately memorised and ordinary prompts of photos-sd. The two ways
take turns in one process, round after round; after every round their results are compared.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from protocol import RESULTS, ROOT, append, commit, percentiles, processor

import amg

ONE_BY_ONE, SUBMIT = "one by one", "submit"
STEPS, SCALES = (20, 25, 30), (5.0, 7.5)
LEVELS = 1  # by how many of 255 an image may differ from its solo run: sums are rounded in another order
BAR = 1.3
COLUMNS = (
    *("date", "commit", "device", "torch", "threads", "model", "requests", "max_batch", "rounds", "way"),
    *("p20", "p50", "p80", "latency_p50", "latency_p95", "images_per_s", "throughput", "cpu_s"),
    *("unet_calls", "rows_per_call", "evaluations", "rewinds", "retries", "most_levels", "changed_pct"),
    *("similarity_error", "note"),
)
PAGE, BEGIN, END = ROOT / "docs" / "serving.md", "<!-- serving: begin -->", "<!-- serving: end -->"


@dataclass
class Served:
    """One way's turns: seconds of each, latency of every request in every turn, its last outputs."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads, which other jobs stretch less
    latencies: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # rows of every U-Net call of the last turn


def mixed_requests(model: Any, count: int) -> list[amg.Request]:
    """`count` requests of different prompts, seeds, step counts and guidance scales."""
    prompts, seeds = model.prompts("mixed", count)
    return [
        amg.Request(
            prompt,
            seed=seed,
            num_inference_steps=STEPS[i % len(STEPS)],
            guidance_scale=SCALES[i // 2 % len(SCALES)],
            output_type="pt",
        )
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def one_by_one(sampler: amg.Sampler, requests: list[amg.Request]) -> tuple[list[Any], list[float]]:
    """The sampler's call for each request in turn -> outputs, and seconds until each was there."""
    start, outputs, latencies = time.perf_counter(), [], []
    for request in requests:
        outputs.append(
            sampler(
                request.prompt,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator().manual_seed(request.seed),
                output_type=request.output_type,
                progress=False,
            )
        )
        latencies.append(time.perf_counter() - start)
    return outputs, latencies


def submit_all(sampler: amg.Sampler, requests: list[amg.Request]) -> tuple[list[Any], list[float]]:
    """All requests submitted at once -> outputs, and seconds until each was there."""
    start, latencies = time.perf_counter(), [0.0] * len(requests)

    def note(place: int) -> Callable[[Any], None]:
        return lambda _: latencies.__setitem__(place, time.perf_counter() - start)

    futures = [sampler.submit(request) for request in requests]
    for place, future in enumerate(futures):
        future.add_done_callback(note(place))
    return [future.result() for future in futures], latencies


WAYS = {ONE_BY_ONE: one_by_one, SUBMIT: submit_all}


def run(model: Any, count: int, max_batch: int, rounds: int) -> dict[str, Served]:
    """One untimed turn of each way, whose results are compared, then `rounds` rounds."""
    served, calls, requests = {way: Served() for way in WAYS}, [], mixed_requests(model, count)
    handle = model.pipe.unet.register_forward_hook(
        lambda module, inputs, output: calls.append(len(output[0]))
    )
    order = list(WAYS)
    with amg.Sampler(model.pipe, model.index, max_batch=max_batch, max_pending=count) as sampler:
        for number in range(rounds + 1):
            for way in order[number % 2 :] + order[: number % 2]:
                calls.clear()
                start, cpu_start = time.perf_counter(), time.process_time()
                outputs, latencies = WAYS[way](sampler, requests)
                taken, cpu = time.perf_counter() - start, time.process_time() - cpu_start
                served[way].outputs, served[way].calls = outputs, list(calls)
                if number:
                    served[way].seconds.append(taken)
                    served[way].cpu_seconds.append(cpu)
                    served[way].latencies += latencies
                said = f"{taken:.2f} s" if number else "not timed"
                print(f"  round {number} of {rounds}, {way}: {said}", flush=True)
            differences(served[SUBMIT].outputs, served[ONE_BY_ONE].outputs)
    handle.remove()
    return served


def differences(ours: list[Any], solo: list[Any]) -> tuple[float, float, float]:
    """Most levels of 255 and % of the images that differ, and the largest difference of similarities.

    Raises AssertionError where a request's result is not that of its solo run.
    """
    levels, similarities = [], []
    for place, (got, expected) in enumerate(zip(ours, solo, strict=True)):
        levels.append(((got.images - expected.images).abs().max() * 255).round().item())
        for name in ("neighbour", "memorized", "rewinds", "retries", "blocked", "evaluations"):
            pairs = [tuple(getattr(verdict, name) for verdict in out.amg) for out in (got, expected)]
            if pairs[0] != pairs[1]:
                raise AssertionError(f"request {place}: `{name}` is {pairs[0]}, alone {pairs[1]}")
        both = zip(got.amg, expected.amg, strict=True)
        similarities += [abs(mine.similarity - theirs.similarity) for mine, theirs in both]
    if max(levels) > LEVELS:
        raise AssertionError(f"request {levels.index(max(levels))} differs by {max(levels):g} levels of 255")
    return max(levels), 100 * sum(level > 0 for level in levels) / len(levels), max(similarities)


def lines_of(served: dict[str, Served], count: int, max_batch: int, note: str) -> list[dict[str, object]]:
    """One line per way, in the order of COLUMNS; throughput as a multiple of one by one, median of rounds."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    run_of = (now, commit(), processor(), torch.__version__, torch.get_num_threads(), "photos-sd")
    compared = differences(served[SUBMIT].outputs, served[ONE_BY_ONE].outputs)
    lines = []
    for way, own in served.items():
        verdicts = [verdict for out in own.outputs for verdict in out.amg]
        ratios = [a / b for a, b in zip(served[ONE_BY_ONE].seconds, own.seconds, strict=True)]
        spread = percentiles(own.seconds)
        figures = (
            *spread,
            statistics.median(own.latencies),
            statistics.quantiles(own.latencies, n=20, method="inclusive")[-1],
            count / spread[1],
            statistics.median(ratios),
            statistics.median(own.cpu_seconds),
            len(own.calls),
            sum(own.calls) / len(own.calls),
            *(sum(getattr(one, name) for one in verdicts) for name in ("evaluations", "rewinds", "retries")),
            *(compared if way == SUBMIT else ("", "", "")),
        )
        shown = (figure if isinstance(figure, (int, str)) else f"{figure:.4g}" for figure in figures)
        values = (*run_of, count, max_batch, len(own.seconds), way, *shown, note)
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return lines


def tables(csv_path: Path) -> str:
    """Markdown of the last run of each device, number of requests and batch in the CSV."""
    with csv_path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    key = ("device", "threads", "requests", "max_batch")
    latest = {(*(line[name] for name in key), line["way"]): line for line in lines}
    heads = ("requests", "images at a time", "way", "seconds", "20–80 %", "images/s", "throughput", "CPU s")
    heads = (*heads, "latency p50", "p95", "U-Net calls", "rows per call")
    parts: list[str] = []
    for line in latest.values():
        title = f"### {line['device']}, {line['threads']} threads, torch {line['torch']}"
        if title not in parts:
            rule = "|".join(["--:"] * 2 + ["---"] + ["--:"] * (len(heads) - 3))
            parts += [title, f"| {' | '.join(heads)} |\n|{rule}|"]
        cells = (
            *(line["requests"], line["max_batch"] if line["way"] == SUBMIT else "1", line["way"]),
            *(f"{float(line['p50']):.2f}", f"{float(line['p20']):.2f} – {float(line['p80']):.2f}"),
            *(f"{float(line['images_per_s']):.2f}", f"{float(line['throughput']):.2f}×"),
            f"{float(line['cpu_s']):.1f}",
            *(f"{float(line['latency_p50']):.2f} s", f"{float(line['latency_p95']):.2f} s"),
            *(line["unet_calls"], f"{float(line['rows_per_call']):.1f}"),
        )
        parts[-1] += f"\n| {' | '.join(cells)} |"
    return "\n\n".join([*parts, *agreement([line for line in latest.values() if line["way"] == SUBMIT])])


def agreement(lines: list[dict[str, str]]) -> list[str]:
    """How near the results were to their solo runs, in words."""
    if not lines:
        return []
    levels, changed, error = (
        max(float(line[name]) for line in lines)
        for name in ("most_levels", "changed_pct", "similarity_error")
    )
    return [
        "Against the solo runs: every verdict's neighbour, rewinds, retries, evaluations and judgement the "
        f"same, at most {levels:g} level of 255 in any pixel (in up to {changed:.0f} % of a run's images), "
        f"similarities within {error:.1g}."
    ]


def main() -> int:
    """Return 1 where a result is not that of its solo run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--max-batch", type=int, default=16, help="images that run at the same time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, nothing recorded")
    parser.add_argument("--tables", action="store_true", help="only fill docs/serving.md from the CSV")
    parser.add_argument("--note", default="", help="said in the CSV")
    parser.add_argument("--csv", type=Path, default=RESULTS / "serving.csv")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/bench_sampler"), help="where the index is kept"
    )
    options = parser.parse_args()
    if options.tables:
        from charts import fill

        fill(PAGE, tables(options.csv), BEGIN, END)
        return 0
    from sampling.models import MODELS

    model = MODELS["photos-sd"](options.work, max(STEPS), "cpu")
    count, max_batch = options.requests, options.max_batch
    print(f"{count} requests, at most {max_batch} images at a time, {torch.get_num_threads()} threads")
    try:
        served = run(model, count, max_batch, 1 if options.quick else options.rounds)
    except AssertionError as error:
        print(f"FAILED {error}")
        return 1
    lines = lines_of(served, count, max_batch, options.note)
    if not options.quick:
        append(options.csv, lines, COLUMNS)
    for line in lines:
        print("  ".join(f"{name} {line[name]}" for name in COLUMNS[9:-1] if line[name] != ""))
    ratio = float(str(lines[-1]["throughput"]))
    print(f"throughput {ratio:.2f}x one by one, bar >= {BAR}: {'met' if ratio >= BAR else 'NOT met'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
