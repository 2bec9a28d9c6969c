"""Times the CPU kernels against the alternatives; figures go to benchmarks/results/kernels.csv.

    python benchmarks/bench_kernels.py                       # every case, a table last
    python benchmarks/bench_kernels.py --only top1 --quick   # some cases, few rounds, nothing recorded
    pytest benchmarks/bench_kernels.py                       # our absolute times, by pytest-benchmark

What is compared with what is said in benchmarks/cases, how in benchmarks/protocol.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import guided_step, nl2, top1_cosine
from protocol import OURS, RESULTS, Case, Turn, conclude, processor, run_cases, wall_clock

SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # settings that hold back the rivals' BLAS
ROUNDS, QUICK_ROUNDS = 15, 2
FREED_MIB = 31  # the most that glibc (2.36) takes into account is 32
CASES: dict[str, tuple[int, Callable[[int], Case]]] = {
    **guided_step.cases(),
    **top1_cosine.cases(),
    **nl2.cases(),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="PART", help=f"cases with this in their name: {' '.join(CASES)}"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    parser.add_argument("--rounds", type=int, help=f"turns of each contestant (default {ROUNDS})")
    parser.add_argument("--threads", type=int, help="instead of each case's own number")
    parser.add_argument(
        "--csv", type=Path, default=RESULTS / "kernels.csv", help="where figures are appended"
    )
    options = parser.parse_args()
    chosen = [name for name in CASES if options.only in name]
    if not chosen:
        parser.error(f"no case has {options.only!r} in its name, there are {' '.join(CASES)}")
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    builders = {name: partial(build, name, options.threads) for name in chosen}
    verdicts, failures = run_cases(builders, rounds, processor(), None if options.quick else options.csv)
    return conclude(processor(), rounds, verdicts, failures)


def build(name: str, threads: int | None) -> Case:
    """Set the number of threads and build one case, in a process that keeps what it has freed.

    glibc gives freed memory back to the system beyond twice the largest block freed so far, and then every
    call pays for fresh pages. A process that has run a model has freed blocks of this size.
    """
    torch.empty(FREED_MIB * 2**18)
    torch.manual_seed(0)
    own_threads, builder = CASES[name]
    torch.set_num_threads(threads or own_threads)
    return builder(threads or own_threads)


@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark, name: str) -> None:
    """Absolute time of our kernel on each case's rotated inputs."""
    case = build(name, None)
    case.check()
    ours = next(provider for provider in case.providers if provider.name == OURS)
    benchmark.group = case.kernel
    benchmark.extra_info["case"] = case.name
    benchmark(Turn(ours, case.sets, wall_clock).call)


if __name__ == "__main__":
    if set(SLOWING) & set(os.environ):
        fair = {name: value for name, value in os.environ.items() if name not in SLOWING}
        os.execve(sys.executable, [sys.executable, *sys.argv], fair)
    sys.exit(main())
