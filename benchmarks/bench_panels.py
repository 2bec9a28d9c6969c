"""Exact top-1 by codes in panels of columns, beside codes a row after the other and faiss, on the CPU.

    python benchmarks/bench_panels.py           # 200,000 made-up rows of 512; writes results/panels.csv
    python benchmarks/bench_panels.py --rows 2000 --csv A.csv

Rows are random directions, with all columns alike ("flat") or most of what they are in the first ones
("decaying"). Half of the queries are near a row, the others near none. The contestants take turns; answers
are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
from protocol import RESULTS, append, commit, processor
from torch import Tensor

import amg.kernels as kernels
from amg.index.codes import rotation_for

DIMENSION, QUERIES, ROUNDS = 512, 8, 5
NEAR, FAR = 0.03, 3.0  # noise of a query beside its row, in rows' lengths
LIMIT = 0.5
COLUMNS = ("commit", "processor", "spectrum", "rows", "queries", "contestant", "ms", "over panels")


def made(spectrum: str, count: int) -> Tensor:
    """Unit rows [count, 512] float16."""
    rows = torch.randn(count, DIMENSION)
    if spectrum == "decaying":
        rows *= (1 - torch.linspace(0, 1, DIMENSION)).pow(3).clamp(min=0.01)
    return torch.nn.functional.normalize(rows, dim=1).half()


def queries_of(rows: Tensor, batch: int) -> list[Tensor]:
    """`QUERIES` batches [batch, 512], every other one near rows."""
    found = []
    for number in range(QUERIES):
        some = rows[torch.randint(len(rows), (batch,))].float()
        noise = (NEAR if number % 2 else FAR) * torch.randn(batch, DIMENSION) / DIMENSION**0.5
        found.append(torch.nn.functional.normalize(some + noise, dim=1))
    return found


def contestants(rows: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    """Searches of the closest row, made ready."""
    codes, whole = kernels.encode_rows(rows), rows.float().numpy()
    panels = kernels.encode_panels(rows, rotation=rotation_for(rows.float()))
    flat, quantised = (
        faiss.IndexFlatIP(DIMENSION),
        faiss.index_factory(DIMENSION, "SQ8", faiss.METRIC_INNER_PRODUCT),
    )
    quantised.train(whole[:50_000])
    for index in (flat, quantised):
        index.add(whole)
    return {
        "panels": lambda queries: kernels.top1_cosine(queries, rows, codes=panels),
        f"panels, limit {LIMIT}": lambda queries: kernels.top1_cosine(
            queries, rows, codes=panels, limit=LIMIT
        ),
        "codes by rows": lambda queries: kernels.top1_cosine(queries, rows, codes=codes),
        "faiss Flat": lambda queries: flat.search(queries.numpy(), 1),
        "faiss SQ8": lambda queries: quantised.search(queries.numpy(), 1),
    }


def require_equal(searches: dict[str, Callable[[Tensor], Any]], queries: list[Tensor]) -> None:
    """AssertionError unless panels say what codes by rows say, to the bit, and with a limit above it."""
    for some in queries:
        ours, before = searches["panels"](some), searches["codes by rows"](some)
        assert torch.equal(ours.row, before.row) and torch.equal(ours.similarity, before.similarity)
        limited, close = searches[f"panels, limit {LIMIT}"](some), before.similarity >= LIMIT
        assert torch.equal(limited.row[close], before.row[close])
        assert torch.equal(limited.similarity[close], before.similarity[close])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--csv", type=Path, default=RESULTS / "panels.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    faiss.omp_set_num_threads(torch.get_num_threads())
    lines = []
    for spectrum in ("flat", "decaying"):
        rows = made(spectrum, options.rows)
        searches = contestants(rows)
        for batch in (1, 16):
            queries, times = queries_of(rows, batch), {name: list[float]() for name in searches}
            require_equal(searches, queries)
            for _ in range(ROUNDS):
                for name, search in searches.items():
                    for some in queries:
                        start = time.perf_counter()
                        search(some)
                        times[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(own) for name, own in times.items()}
            for name, median in medians.items():
                over = f"{median / medians['panels']:.2f}"
                values = (
                    commit(),
                    processor(),
                    spectrum,
                    options.rows,
                    batch,
                    name,
                    f"{1e3 * median:.2f}",
                    over,
                )
                lines.append(dict(zip(COLUMNS, values, strict=True)))
                print(*values[2:], flush=True)
    options.csv.unlink(missing_ok=True)
    append(options.csv, lines, COLUMNS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
