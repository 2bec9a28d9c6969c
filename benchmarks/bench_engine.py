"""Measures the engine beside plain diffusers on photos-sd: eight rows, one script, one process, CPU.

    python benchmarks/bench_engine.py --cache CACHE                # all rows; appends to results/engine.csv
    python benchmarks/bench_engine.py --cache CACHE --only loop,reads
    python benchmarks/bench_engine.py --cache CACHE --quick --dry  # fewer of everything, nothing recorded

    loop        the loop's own time a step, networks free: slope between 10 and 50 steps
    fixed       a call's cost beside its steps, networks free, batch 1
    reads       host reads of tensor values in a call of 16
    stream      requests through `submit`, calibrated and with the student, against plain batches
    ordinary    ordinary prompts in batches of 16, paired rounds
    ceiling     the costliest image, the worst case forced
    schedulers  `off` against the pipeline, every scheduler
    alone       a request alone and among others

The contestants take turns in one process, round after round. Index, calibration and the choice of ordinary
prompts are made on first use and kept in CACHE; remove it when the model or the promise changes.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from engine import report
from engine.setup import Bench
from protocol import RESULTS, append

tables = report.tables
NEED_FILES = ("reads", "stream", "ordinary")  # rows that the calibration and the student take part in


def rows() -> dict[str, Callable[[Bench], list[report.Figure]]]:
    """Name -> what measures it, in the order they are run."""
    from engine import cost, likeness, streams

    return {
        "loop": cost.loop,
        "fixed": cost.fixed,
        "reads": cost.reads,
        "stream": streams.stream,
        "ordinary": streams.ordinary,
        "ceiling": streams.ceiling,
        "schedulers": likeness.schedulers,
        "alone": likeness.alone,
    }


def chosen(text: str) -> list[str]:
    """The rows that `--only` names; ArgumentTypeError for another name."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in report.TITLES:
            raise argparse.ArgumentTypeError(f"rows are {', '.join(report.TITLES)}, got {name!r}")
    return names


def run(bench: Bench, names: list[str], options: argparse.Namespace) -> int:
    """Measure, record and show; a row that fails is reported and the rest go on."""
    found, failures = [], []
    conditions = ", ".join(part for part in ("quick" if bench.quick else "", options.note) if part)
    for name in names:
        start = time.perf_counter()
        try:
            lines = report.lines_of(rows()[name](bench), options.loop, conditions)
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if not options.dry:
            append(options.csv, lines, report.COLUMNS)
        found += lines
    print(f"\n{torch.get_num_threads()} threads, loop: {options.loop}\n\n{report.aligned(found)}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=chosen, default=list(report.TITLES), metavar="ROWS", help="loop,reads")
    parser.add_argument("--rounds", type=int, help="instead of each row's own number")
    parser.add_argument("--prompts", type=int, default=256, help="of `stream` (default 256)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, steps and prompts; said in the CSV"
    )
    parser.add_argument("--dry", action="store_true", help="nothing recorded")
    parser.add_argument(
        "--loop", default="engine", help="what the figures are of, in the CSV's column `loop`"
    )
    parser.add_argument("--note", default="", help="conditions of the run, said in the CSV and on the page")
    parser.add_argument("--csv", type=Path, default=RESULTS / "engine.csv")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/bench_engine"), help="what is made once")
    return parser.parse_args()


def main() -> int:
    """Return 1 where a row failed."""
    options = parse()
    from engine.setup import STEPS, opened

    model = opened(options.cache, STEPS, any(name in NEED_FILES for name in options.only))
    bench = Bench(model, STEPS, options.quick, options.rounds, options.prompts)
    return run(bench, options.only, options)


if __name__ == "__main__":
    sys.exit(main())
