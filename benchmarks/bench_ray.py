"""What it costs to search an index in several processes by Ray, and what they answer while they are killed.

python benchmarks/bench_ray.py                   # benchmarks/results/ray.csv; needs the extra `ray`
python benchmarks/bench_ray.py --cases kill      # one of them; the figures of others stay

overhead-*: vectors of 512 (pixels: pictures of 32x32), made up, in one process and in 4 shards on the same
machine, by turns, exact; "CPU ratio" compares processor time, all shards' and the client's, which other
programs on the machine change less. kill: every tenth search, one of 4 shards is killed while it is asked
(SIGKILL). Every answer is compared with one process's, to the bit.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import statistics
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import RESULTS, commit, processor

DIMENSION, SHARDS, BLOCK = 512, 4, 1 << 15
OVERHEADS = {"overhead-100k": 100_000, "overhead-1m": 1_000_000, "overhead-pixels-10k": 10_000}  # rows
CASES = [*OVERHEADS, "kill"]
KILL_ROWS, SEARCHES, KILLS = 100_000, 200, 20


def made(folder: str, count: int) -> Any:
    """An index of `count` unit vectors."""
    import amg

    generator = torch.Generator().manual_seed(0)
    path = Path(folder) / "v.npy"
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, DIMENSION))
    for start in range(0, count, BLOCK):
        drawn = torch.randn(min(BLOCK, count - start), DIMENSION, generator=generator)
        file[start : start + len(drawn)] = torch.nn.functional.normalize(drawn, dim=1).half().numpy()
    file.flush()
    return amg.Index.from_embeddings(
        path, None, "made up", Path(folder) / "i.amg", near_duplicate=False, progress=False
    )


def painted(folder: str, count: int) -> Any:
    """A pixel index of `count` pictures."""
    import amg

    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return amg.Index.build(pictures, path=Path(folder) / "i.amg", near_duplicate=False, progress=False)


def near(index: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Queries [batch, D]: half of them near a row, half near none."""
    if index.metric == "nl2":
        queries = torch.rand(batch, index.dimension, generator=generator)
        chosen = torch.randint(index.count, (batch // 2,), generator=generator)
        queries[: batch // 2] = 0.9 * index.rows[chosen] / 255 + 0.1 * queries[: batch // 2]
        return queries
    queries = torch.nn.functional.normalize(torch.randn(batch, DIMENSION, generator=generator), dim=1)
    half = batch // 2
    chosen = torch.randint(index.count, (half,), generator=generator)
    queries[:half] = index.rows[chosen].float() + 0.5 * queries[:half]
    return queries


def overhead(case: str, batch: int, rounds: int) -> dict[str, Any]:
    """Both by turns, on fresh queries; the medians and what the slowest fifth took."""
    from amg.index.ray import serve, stop

    with tempfile.TemporaryDirectory() as folder:
        index = (painted if "pixels" in case else made)(folder, OVERHEADS[case])
        start = time.perf_counter()
        served = serve(index.path, shards=SHARDS, timeout=600)
        began = time.perf_counter() - start
        generator = torch.Generator().manual_seed(1)
        taken: dict[str, list[float]] = {"one": [], "served": []}
        spent, wrong = {"one": 0.0, "served": 0.0}, 0
        shards = processes(served)
        for turn in range(rounds + 2):  # two to warm up
            queries, found = near(index, batch, generator), {}
            order = [("one", index), ("served", served)]
            for name, searched in order if turn % 2 else order[::-1]:
                time.sleep(0.02)
                start, before = time.perf_counter(), seconds_of(shards)
                found[name] = searched.nearest(queries)
                taken[name].append(1e3 * (time.perf_counter() - start))
                spent[name] += seconds_of(shards) - before if turn > 1 else 0
            wrong += differ(found["served"], found["one"])
        stop("i.amg")
    one, shared = taken["one"][2:], taken["served"][2:]
    figures = {"one process ms": median(one), "served ms": median(shared)}
    figures["ratio"] = round(statistics.median(shared) / statistics.median(one), 3)
    figures["CPU ratio"] = round(spent["served"] / spent["one"], 3)
    quantiles = {"one p80 ms": p80(one), "served p80 ms": p80(shared)}
    return {**figures, **quantiles, "searches": len(one) + 2, "wrong": wrong, "serving s": round(began, 1)}


def processes(served: Any) -> list[int]:
    """This process, and those of the shards."""
    import ray

    return [os.getpid(), *ray.get([actor.process.remote() for actor in served.everyone.shards.actors])]


def seconds_of(pids: list[int]) -> float:
    """Processor time so far, of all their threads."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


def p80(values: list[float]) -> float:
    return round(statistics.quantiles(values, n=5)[3], 2)


def differ(found: Any, expected: Any) -> bool:
    """Whether a bit of an answer is another."""
    same = torch.equal(found.similarity, expected.similarity) and torch.equal(found.row, expected.row)
    return not same


def kill(batch: int) -> dict[str, Any]:
    """KILLS of the searches lose a shard at some moment while they are asked."""
    import ray

    from amg.index.ray import serve, stop

    draw, generator = random.Random(0), torch.Generator().manual_seed(2)
    with tempfile.TemporaryDirectory() as folder:
        index = made(folder, KILL_ROWS)
        served = serve(index.path, shards=SHARDS, timeout=600)
        actors = served.everyone.shards.actors
        wrong = killed = 0
        taken = []
        for search in range(SEARCHES):
            queries = near(index, batch, generator)
            expected = index.nearest(queries)
            if search % (SEARCHES // KILLS) == 0:
                victim = ray.get(draw.choice(actors).process.remote())
                threading.Timer(draw.uniform(0, 0.03), os.kill, (victim, signal.SIGKILL)).start()
                killed += 1
            start = time.perf_counter()
            found = served.nearest(queries)
            taken.append(time.perf_counter() - start)
            wrong += differ(found, expected)
        stop("i.amg")
    return {"searches": SEARCHES, "wrong": wrong, "killed": killed, "longest s": round(max(taken), 1)}


COLUMNS = [
    *("case", "rows", "batch", "shards", "one process ms", "served ms", "ratio", "CPU ratio"),
    *("one p80 ms", "served p80 ms", "searches", "wrong", "killed", "longest s", "serving s"),
    *("threads", "machine", "commit"),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--csv", type=Path, default=RESULTS / "ray.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import ray

    ray.init("local", include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    known: dict[str, dict[str, Any]] = {}
    if options.csv.exists():
        with options.csv.open(newline="", encoding="utf-8") as file:
            known = {line["case"]: line for line in csv.DictReader(file)}
    for case in options.cases:
        rows = OVERHEADS.get(case, KILL_ROWS)
        figures = overhead(case, options.batch, options.rounds) if case in OVERHEADS else kill(options.batch)
        where = {"threads": torch.get_num_threads(), "machine": processor(), "commit": commit()}
        known[case] = {
            "case": case,
            "rows": rows,
            "batch": options.batch,
            "shards": SHARDS,
            **figures,
            **where,
        }
        print(", ".join(f"{name} {value}" for name, value in known[case].items()), flush=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(known[name] for name in CASES if name in known)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
