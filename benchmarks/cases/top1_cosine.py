"""top1_cosine against faiss, torch and the measured read bandwidth. Every contestant gets fp32 unit rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import faiss
import torch
from protocol import OURS, Bar, Case, Provider
from torch import Tensor

import amg.kernels as kernels

from . import bandwidth

DIMENSION = 512
QUERY_SETS = 4
FLAT = "faiss Flat"
OTHERS = ("faiss SQ8", "faiss SQfp16", "torch bf16", "torch fp32")
Answer = tuple[Tensor, Tensor]  # similarity [B], row [B]


def unit(count: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, DIMENSION), dim=1)


def torch_search(queries: Tensor, rows: Tensor) -> Answer:
    return tuple((queries.to(rows.dtype) @ rows.T).max(1))


def faiss_search(index: faiss.Index, queries: Tensor) -> Answer:
    similarity, row = index.search(queries.numpy(), 1)
    return torch.from_numpy(similarity[:, 0]), torch.from_numpy(row[:, 0])


def faiss_indexes(rows: Tensor) -> dict[str, faiss.Index]:
    """Exact fp32, and the two scalar quantisers, filled with `rows`."""
    quantiser, inner_product = faiss.ScalarQuantizer, faiss.METRIC_INNER_PRODUCT
    indexes = {
        FLAT: faiss.IndexFlatIP(DIMENSION),
        "faiss SQ8": faiss.IndexScalarQuantizer(DIMENSION, quantiser.QT_8bit, inner_product),
        "faiss SQfp16": faiss.IndexScalarQuantizer(DIMENSION, quantiser.QT_fp16, inner_product),
    }
    for index in indexes.values():
        index.train(rows.numpy())
        index.add(rows.numpy())
    return indexes


def contestants(rows: Tensor) -> dict[str, Callable[[Tensor], Answer]]:
    """Search functions of normalised fp32 queries, ours first; indexes are built here, untimed."""
    codes, halves = kernels.encode_rows(rows), rows.bfloat16()
    found: dict[str, Callable[[Tensor], Answer]] = {
        OURS: lambda queries: kernels.top1_cosine(queries, rows, codes=codes)
    }
    for name, index in faiss_indexes(rows).items():
        found[name] = partial(faiss_search, index)
    found["torch bf16"] = lambda queries: torch_search(queries, halves)
    found["torch fp32"] = lambda queries: torch_search(queries, rows)
    return found


def check(
    searches: dict[str, Callable[[Tensor], Answer]], rows: Tensor, sets: list[Tensor]
) -> dict[str, str]:
    """Hold ours to the float64 answer on every query; note how often each contestant's row is that one."""
    found = {name: [search(queries)[1] for queries in sets] for name, search in searches.items()}
    truth = [kernels.top1_cosine(queries, rows, impl="reference") for queries in sets]
    for queries, exact in zip(sets, truth, strict=True):
        similarity, row = searches[OURS](queries)
        if not torch.equal(row, exact.row) or not torch.allclose(
            similarity, exact.similarity, rtol=1.2e-7, atol=0
        ):
            raise AssertionError("top1_cosine: not the float64 answer")
    exact_rows = torch.cat([answer.row for answer in truth])
    agreement = {name: (torch.cat(rows_) == exact_rows).double().mean() for name, rows_ in found.items()}
    return {name: f"right {share:.1%}" for name, share in agreement.items()}


def search_case(count: int, batch: int, bars: tuple[Bar, ...], note: str, threads: int) -> Case:
    """B queries among N rows; bytes are those of the int8 codes, scales and errors, once."""
    faiss.omp_set_num_threads(threads)
    rows, sets = unit(count), [unit(batch) for _ in range(QUERY_SETS)]
    searches = contestants(rows)
    moved = {OURS: count * (DIMENSION + 8)}
    providers = [
        Provider(name, lambda i, search=search: search(sets[i]), moved.get(name, 0))
        for name, search in searches.items()
    ]
    if any(bar.metric == "GB/s" for bar in bars):
        providers += bandwidth.readers(count * DIMENSION // 2**20, threads)
    name = f"{count // 1000}k x {DIMENSION}, B = {batch}{note}"
    run = partial(check, searches, rows, sets)
    return Case("top1_cosine", name, threads, QUERY_SETS, tuple(providers), bars, run)


def cases() -> dict[str, tuple[int, Callable[[int], Case]]]:
    """Threads and builder by name; B = 4 and 16 have no bar but complete the curve."""
    read = Bar("of read bandwidth", bandwidth.READERS, 0.8, "GB/s")
    one = (read, Bar("x faiss Flat", (FLAT,), 7), Bar("x best other", OTHERS, 1.8))
    many = (Bar("x faiss Flat", (FLAT,), 20), Bar("x best other", OTHERS, 2))
    resident = (Bar("x best of all", (FLAT, *OTHERS), 1.5),)
    bars = {1: one, 4: (), 16: (), 64: many}
    large = {f"top1-{batch}": (2, partial(search_case, 200_000, batch, bars[batch], "")) for batch in bars}
    return {**large, "top1-10k": (2, partial(search_case, 10_000, 8, resident, ", cache-resident"))}
