"""Times the Triton kernels on one NVIDIA GPU; figures go to benchmarks/results/kernels-<device>.csv.

python benchmarks/bench_kernels_gpu.py                        # every case, a table last
python benchmarks/bench_kernels_gpu.py --device cpu --quick   # tiny problems: tries the plumbing
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from cases import gpu
from protocol import RESULTS, Case, conclude, run_cases, slug, wall_clock

ROUNDS, QUICK_ROUNDS = 10, 2
SLEEP = 1_000_000  # clock cycles, half a millisecond


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the kernels on one GPU against the alternatives.")
    parser.add_argument("--only", default="", metavar="PART", help="cases with this in their name")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    parser.add_argument("--rounds", type=int, help=f"turns of each contestant (default {ROUNDS})")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu (plumbing only)"
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    path = None if options.quick else options.out / f"kernels-{slug(name)}.csv"
    deadline = time.monotonic() + options.seconds
    verdicts, failures = [], []
    for clock, builders in (
        (device_clock, gpu.cases(options.device)),
        (call_clock, gpu.calls(options.device)),
    ):
        chosen = {
            key: partial(build_in_time, build, deadline)
            for key, build in builders.items()
            if options.only in key
        }
        judged, failed = run_cases(
            chosen, rounds, name, path, clock if options.device == "cuda" else wall_clock
        )
        verdicts += judged
        failures += failed
    return conclude(name, rounds, verdicts, failures)


def build_in_time(build: Callable[[], Case], deadline: float) -> Case:
    """Build a case unless the time is up, so that a short run still ends in a summary."""
    if time.monotonic() > deadline:
        raise TimeoutError("not started, the time is up")
    torch.manual_seed(0)
    return build()


def device_clock(call: Callable[[], object], calls: int) -> float:
    """Return the seconds one call takes on the device, from `calls` queued in a row between two events.

    The device sleeps while they are queued, or it would wait for the first call's Python.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP)
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def call_clock(call: Callable[[], object], calls: int) -> float:
    """Return the seconds one call takes by the wall clock, from `calls` in a row and waiting for the last."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


if __name__ == "__main__":
    sys.exit(main())
