"""How contestants are timed, what is recorded and what the summary says; knows no kernel.

Contestants take turns inside one process, round after round, so that a slow spell of the machine hits all of
them. A turn is a pause (threads of the last contestant's runtime stop spinning), one untimed call and a few
timed ones, each on the next of several input sets. Medians and percentiles are taken over all timed calls.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    *("date", "commit", "device", "torch", "threads", "kernel", "case", "provider"),
    *("metric", "p20", "p50", "p80", "gb_per_s", "note"),
)
OURS = "amg"
PAUSE = 0.005  # seconds: longer than an OpenMP runtime spins after its last parallel region
SAMPLE = 3e-4  # seconds: shorter calls are timed several at a time
TURN = 0.04  # seconds of timed calls in one turn, but at least one

Clock = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Provider:
    """One contestant. `call(i)` runs it on input set i; `bytes_moved` is what its figure in GB/s counts."""

    name: str
    call: Callable[[int], object]
    bytes_moved: int = 0
    note: str = ""
    sample_calls: int | None = None  # timed together; None: as many as fill SAMPLE


@dataclass(frozen=True)
class Bar:
    """Ours against the best of `rivals` in `metric`, as a ratio where larger is better, for us."""

    label: str
    rivals: tuple[str, ...]
    at_least: float
    metric: str = "ms"  # "ms", "GB/s" or "extra MiB"


@dataclass(frozen=True)
class Case:
    """Contestants for one problem. `check` raises where an answer is wrong and returns notes by provider."""

    kernel: str
    name: str
    threads: int
    sets: int
    providers: tuple[Provider, ...]
    bars: tuple[Bar, ...]
    check: Callable[[], dict[str, str]]
    extra_mib: Callable[[], dict[str, float]] | None = None


@dataclass
class Figures:
    """What one provider measured: percentiles by metric, and GB/s of the median."""

    percentiles: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    gb_per_s: float | None = None
    note: str = ""

    def value(self, metric: str) -> float:
        """Return the median of "ms" or "extra MiB", or GB/s."""
        if metric == "GB/s":
            return self.gb_per_s or 0.0
        return self.percentiles[metric][1]


def wall_clock(call: Callable[[], object], calls: int) -> float:
    """Return the seconds one call takes, from `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(case: Case, rounds: int, clock: Clock = wall_clock) -> dict[str, Figures]:
    """Check the answers, then time every provider of `case`, alternating, for `rounds` rounds."""
    notes = case.check()
    turns = {provider.name: Turn(provider, case.sets, clock) for provider in case.providers}
    order = list(turns.values())
    for number in range(rounds):
        for turn in order[number % len(order) :] + order[: number % len(order)]:
            turn.take()
    figures = {name: turn.figures(notes.get(name, "")) for name, turn in turns.items()}
    if case.extra_mib is not None:
        for name, mib in case.extra_mib().items():
            figures[name].percentiles["extra MiB"] = (mib, mib, mib)
    return figures


class Turn:
    """One provider's timed calls so far, and which input set is next."""

    def __init__(self, provider: Provider, sets: int, clock: Clock) -> None:
        self.provider, self.sets, self.clock = provider, sets, clock
        self.calls = 0
        self.samples: list[float] = []

    def call(self) -> object:
        self.calls += 1
        return self.provider.call(self.calls % self.sets)

    def take(self) -> None:
        time.sleep(PAUSE)
        once = self.clock(self.call, 1)
        together = self.provider.sample_calls or max(1, round(SAMPLE / once))
        stop = time.perf_counter() + TURN
        while True:
            self.samples.append(self.clock(self.call, together))
            if time.perf_counter() >= stop:
                return

    def figures(self, note: str) -> Figures:
        p20, p50, p80 = percentiles(self.samples)
        gb_per_s = self.provider.bytes_moved / p50 / 1e9 if self.provider.bytes_moved else None
        note = "; ".join(part for part in (self.provider.note, note) if part)
        return Figures({"ms": (p20 * 1e3, p50 * 1e3, p80 * 1e3)}, gb_per_s, note)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def run_cases(
    builders: dict[str, Callable[[], Case]],
    rounds: int,
    device: str,
    path: Path | None,
    clock: Clock = wall_clock,
) -> tuple[list[Verdict], list[str]]:
    """Measure, show and record (where `path` is given) each case; return verdicts and what failed.

    A case that fails, a wrong answer included, is reported and the rest go on.
    """
    verdicts: list[Verdict] = []
    failures: list[str] = []
    for name, build in builders.items():
        try:
            case = build()
            figures = measure(case, rounds, clock)
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        show(case, figures)
        if path is not None:
            append(path, csv_rows(case, figures, device))
        verdicts += judge(case, figures)
    return verdicts, failures


def conclude(device: str, rounds: int, verdicts: Sequence[Verdict], failures: Sequence[str]) -> int:
    """Print the summary last; return the exit status: 1 where a case failed (an unmet bar is no failure)."""
    print(f"\n{device}, torch {torch.__version__}, {rounds} rounds, commit {commit()}\n\n{table(verdicts)}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def csv_rows(case: Case, figures: dict[str, Figures], device: str) -> list[dict[str, object]]:
    """Return one line per provider and metric, in the order of COLUMNS."""
    run = (datetime.datetime.now().astimezone().isoformat(timespec="seconds"), commit(), device)
    lines = []
    for name, figure in figures.items():
        for metric, spread in figure.percentiles.items():
            head = (*run, torch.__version__, case.threads, case.kernel, case.name, name, metric)
            rate = f"{figure.gb_per_s:.2f}" if figure.gb_per_s and metric == "ms" else ""
            values = (*head, *(f"{value:.5g}" for value in spread), rate, figure.note)
            lines.append(dict(zip(COLUMNS, values, strict=True)))
    return lines


def append(path: Path, lines: Iterable[dict[str, object]], columns: Sequence[str] = COLUMNS) -> None:
    """Append lines to a CSV, with a header where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(lines)


def commit() -> str:
    """Return the short hash of HEAD, with a + where tracked sources differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def processor() -> str:
    """Return the CPU's model and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    families = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    model = families.get("model name", platform.processor() or platform.machine())
    if "cpu family" in families:
        model += f" (family {families['cpu family']} model {families['model']})"
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Verdict:
    """One line of the summary: ours against the best of a bar's rivals."""

    case: str
    ours: str
    rival: str
    ratio: str
    bar: str
    met: bool | None  # None: no rival ran


def judge(case: Case, figures: dict[str, Figures]) -> list[Verdict]:
    """Compare ours with every bar of the case."""
    verdicts = []
    title = (
        f"{case.kernel} {case.name}, {case.threads} thr." if case.threads else f"{case.kernel} {case.name}"
    )
    for bar in case.bars:
        rivals = [name for name in bar.rivals if name in figures]
        ours = figures[OURS].value(bar.metric)
        shown = f"{ours:.4g} {bar.metric}"
        limit = f"{bar.label}: {bar.at_least:.4g}"
        if not rivals:
            verdicts.append(Verdict(title, shown, "none ran", "", limit, None))
            continue
        best = (max if bar.metric == "GB/s" else min)(rivals, key=lambda n: figures[n].value(bar.metric))
        theirs = figures[best].value(bar.metric)
        ratio = ours / theirs if bar.metric == "GB/s" else theirs / ours
        rival = f"{theirs:.4g} {bar.metric} ({best})"
        verdicts.append(Verdict(title, shown, rival, f"{ratio:.2f}", limit, ratio >= bar.at_least))
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the summary as an aligned table."""
    said = {True: "yes", False: "NO", None: "-"}
    head = ("case", OURS, "best rival", "ratio", "bar", "met")
    lines = [head, *((v.case, v.ours, v.rival, v.ratio, v.bar, said[v.met]) for v in verdicts)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(line.rstrip() for line in padded)


def show(case: Case, figures: dict[str, Figures]) -> None:
    """Print every provider's figures."""
    print(f"\n{case.kernel}, {case.name}" + (f", {case.threads} thread(s)" if case.threads else ""))
    for name, figure in figures.items():
        p20, p50, p80 = figure.percentiles["ms"]
        rate = f"{figure.gb_per_s:7.1f} GB/s" if figure.gb_per_s else " " * 12
        extra = figure.percentiles.get("extra MiB")
        memory = f"  {extra[1]:.1f} MiB extra" if extra else ""
        spread = f"[{p20:.4g}, {p80:.4g}]"
        print(f"  {name:24s}{p50:10.4f} ms {spread:22s}{rate}{memory}  {figure.note}", flush=True)
