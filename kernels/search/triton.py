"""Exact search in Triton, shared by top1_cosine and nl2: bounds say which blocks of rows are scored exactly.

Scores are larger for closer rows. Screening leaves, per query and block of BLOCK_ROWS rows, the largest lower
and the largest upper bound of the rows' scores. The k-th largest lower bound is the query's floor: k blocks,
hence k rows, reach it, so a block whose upper bound is below it holds none of the k best. The rows of all
other blocks are scored in float64 by an op's `score` function; nothing is lost whatever the data.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .answer import ranked_or_nan

BLOCK_ROWS = 128  # rows a screening program takes, and the unit that is dropped or kept
EXACT_ROWS = 16  # rows scored exactly at a time by a top-k search
EXACT_COLUMNS = 128
KEPT = 2**16  # rows of a query that the programs of a top-k search keep together
LIST_CHUNK = 2048  # blocks looked at together when the survivors are listed
SCAN_CHUNK = 1024  # blocks looked at together where a top-1 search looks for survivors
SCAN_ROWS = 8  # rows that it scores exactly at a time
SCAN_COLUMNS = 256
SHARES = 2048  # its programs, all queries together
SHARE_CHUNK = 1024  # programs whose answers are compared at a time
BYTES_A_STEP = 128  # of each row, in one step of the dot product: a cache line
TF32_STEP = 2.0**-10  # relative error of an fp32 row read as TF32, whether rounded or cut off
SUM_STEP = 4 * 2.0**-24  # per term of an MMA sum: the units cut off what they align before adding


@triton.jit
def dots_and_squares(rows, queries, row, query, begin, end, dimension, stride, BLOCK_K: tl.constexpr):
    """Return ⟨r, q⟩ [rows, queries] and ‖r‖² [rows] over columns [begin, end).

    Exact int32 where the queries are int8 (uint8 rows are centred: r − 128), else fp32. `queries` is
    [·, stride], zero beyond `dimension`; rows are the MMA's M operand, so that one query still fills tiles.
    """
    QUERY: tl.constexpr = queries.dtype.element_ty
    CENTRED: tl.constexpr = rows.dtype.element_ty == tl.uint8
    TOTAL: tl.constexpr = tl.float32 if QUERY.is_floating() else tl.int32
    LANES: tl.constexpr = 8 if QUERY.is_floating() else 1  # sums of a row's squares: registers for shuffles
    row_start = rows + row * dimension
    query_start = queries + query.to(tl.int64) * stride
    dots = tl.zeros([row.shape[0], query.shape[0]], TOTAL)
    squares = tl.zeros([row.shape[0], LANES], TOTAL)
    for step in tl.range(begin, end, BLOCK_K):
        column = step + tl.arange(0, BLOCK_K)
        inside = (column < dimension)[None, :]
        tile = tl.load(row_start[:, None] + column[None, :], inside, 0)
        if CENTRED:
            tile = (tile ^ 128).to(tl.int8, bitcast=True)
        tile = tile.to(QUERY)
        values = tl.load(query_start[None, :] + column[:, None])
        if QUERY.is_floating():
            # Not `dots += part`, which Triton makes tl.dot(tile, values, dots) of. On Hopper that dot is left
            # in flight while the copy of a later step already overwrites its tile (triton 3.6 and 3.7).
            part = tl.dot(tile, values, input_precision="tf32", out_dtype=TOTAL)
            dots = tl.fma(part, tl.full(part.shape, 1.0, TOTAL), dots)
        else:
            dots = tl.dot(tile, values, dots, out_dtype=TOTAL)
        wide = tile.to(TOTAL)
        squares += tl.sum(tl.reshape(wide * wide, [row.shape[0], LANES, BLOCK_K // LANES]), axis=2)
    square = tl.sum(squares, axis=1)
    if CENTRED:  # the zeros beyond the end became −128; they meet zeros of the query
        square -= 128 * 128 * (tl.cdiv(end - begin, BLOCK_K) * BLOCK_K - (end - begin))
    return dots, square


@triton.jit
def store_bounds(low, high, inside, block, query, floor, lower, upper, batch, blocks):
    """Store a block's largest lower and upper bound for each query; those not finite bound nothing.

    The largest lower bound of all blocks is left in `floor`, which was −inf.
    """
    bounded = (low > float("-inf")) & (high < float("inf"))  # false for NaN
    low = tl.where(inside[:, None] & bounded, low, float("-inf"))
    high = tl.where(bounded, high, float("inf"))
    high = tl.where(inside[:, None], high, float("-inf"))
    place = query.to(tl.int64) * blocks + block
    lowest = tl.max(low, axis=0)
    tl.atomic_max(floor + query, lowest, query < batch, sem="relaxed")
    tl.store(lower + place, lowest, query < batch)
    tl.store(upper + place, tl.max(high, axis=0), query < batch)


@triton.jit(do_not_specialize=["blocks"])
def list_blocks(upper, floor, listed, number, blocks, CHUNK: tl.constexpr):
    """Program q lists, in ascending order, the blocks whose upper bound reaches query q's floor."""
    query = tl.program_id(0).to(tl.int64)
    lowest = tl.load(floor + query)
    found = tl.zeros([], tl.int32)
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        inside = block < blocks
        bound = tl.load(upper + query * blocks + block, inside, float("-inf"))
        kept = inside & (bound >= lowest)
        place = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(listed + query * blocks + place, block, kept)
        found += tl.sum(kept.to(tl.int32), axis=0)
    tl.store(number + query, found)


@triton.jit
def exact_scores(
    rows, queries, norms, row, query, count, dimension, SCORE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """fp32 scores of `row` (int64): +inf for one not finite, so that it surfaces; −inf beyond count."""
    score = SCORE(rows, queries, norms, tl.minimum(row, count - 1), query, dimension, BLOCK_K)
    score = tl.where(tl.abs(score) < float("inf"), score, float("inf"))
    return tl.where(row < count, score, float("-inf"))


@triton.jit(do_not_specialize=["count", "batch", "blocks"])
def best_in_blocks(
    rows,
    queries,
    norms,
    floor,
    upper,
    scores,
    best_rows,
    count,
    dimension,
    batch,
    blocks,
    SCORE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (share, q) finds the best of its part of the rows whose block's upper bound reaches q's floor.

    A share is one part of every block in some of the chunks. Ties go to the lowest row.
    """
    PARTS: tl.constexpr = BLOCK_ROWS // ROWS
    NONE: tl.constexpr = 2**31 - 1
    query = (tl.program_id(0) % batch).to(tl.int64)
    share = tl.program_id(0) // batch
    every = tl.num_programs(0) // (batch * PARTS)
    lowest = tl.load(floor + query)
    best = tl.full([], float("-inf"), tl.float32)
    best_row = tl.full([], 2**62, tl.int64)
    for start in range((share // PARTS) * CHUNK, blocks, every * CHUNK):
        block = start + tl.arange(0, CHUNK)
        bound = tl.load(upper + query * blocks + block, block < blocks, float("-inf"))
        left = tl.where((block < blocks) & (bound >= lowest), block, NONE)
        first = tl.min(left, axis=0)
        while first != NONE:
            here = first.to(tl.int64) * BLOCK_ROWS + (share % PARTS) * ROWS + tl.arange(0, ROWS)
            score = exact_scores(rows, queries, norms, here, query, count, dimension, SCORE, BLOCK_K)
            top = tl.max(score, axis=0)
            top_row = tl.min(tl.where(score == top, here, 2**62), axis=0)
            best_row = tl.where(top > best, top_row, best_row)  # rows ascend within a share
            best = tl.maximum(top, best)
            left = tl.where(block > first, left, NONE)
            first = tl.min(left, axis=0)
    tl.store(scores + tl.program_id(0), best)
    tl.store(best_rows + tl.program_id(0), best_row)


@triton.jit(do_not_specialize=["batch", "shares"])
def best_of_shares(scores, best_rows, score, row, batch, shares, CHUNK: tl.constexpr):
    """Program q finds the best of query q's shares, ties to the lowest row; NaN and row 0 if not finite."""
    query = tl.program_id(0).to(tl.int64)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    best_row = tl.full([CHUNK], 2**62, tl.int64)
    for start in range(0, shares, CHUNK):
        share = start + tl.arange(0, CHUNK)
        place = share * batch + query
        other = tl.load(scores + place, share < shares, float("-inf"))
        other_row = tl.load(best_rows + place, share < shares, 2**62)
        best_row = tl.where(
            other > best, other_row, tl.where(other == best, tl.minimum(other_row, best_row), best_row)
        )
        best = tl.maximum(other, best)
    top = tl.max(best, axis=0)
    ranked = tl.abs(top) < float("inf")
    tl.store(score + query, tl.where(ranked, top, float("nan")))
    best_row = tl.min(tl.where(best == top, best_row, 2**62), axis=0)
    tl.store(row + query, tl.where(ranked, best_row, 0))


@triton.jit(do_not_specialize=["k", "shares", "count", "blocks"])
def best_in_list(
    rows,
    queries,
    norms,
    floor,
    listed,
    number,
    scores,
    best_rows,
    k,
    shares,
    count,
    dimension,
    blocks,
    SCORE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Program (q, share) keeps the k best of its part of query q's listed blocks, in any order, else −inf.

    A share is every shares-th part of the list, so that rows ascend within it and ties go to the lowest.
    Only rows that reach the floor are looked at: k rows do.
    """
    PARTS: tl.constexpr = BLOCK_ROWS // ROWS
    query = (tl.program_id(0) // shares).to(tl.int64)
    slot = tl.arange(0, KEPT)
    best = tl.where(slot < k, float("-inf"), float("inf"))
    best_row = tl.full([KEPT], 2**62, tl.int64)
    lowest = tl.load(floor + query)
    for item in range(tl.program_id(0) % shares, tl.load(number + query) * PARTS, shares):
        block = tl.load(listed + query * blocks + item // PARTS).to(tl.int64)
        here = block * BLOCK_ROWS + (item % PARTS) * ROWS + tl.arange(0, ROWS)
        score = exact_scores(rows, queries, norms, here, query, count, dimension, SCORE, BLOCK_K)
        score = tl.where(score >= lowest, score, float("-inf"))
        top, least = tl.max(score, axis=0), tl.min(best, axis=0)
        while top > least:
            top_row = tl.min(tl.where(score == top, here, 2**62), axis=0)
            last = tl.max(tl.where(best == least, best_row, -1), axis=0)  # of equal ones the highest row goes
            place = tl.min(tl.where((best == least) & (best_row == last), slot, KEPT), axis=0)
            best = tl.where(slot == place, top, best)
            best_row = tl.where(slot == place, top_row, best_row)
            score = tl.where(here == top_row, float("-inf"), score)
            top, least = tl.max(score, axis=0), tl.min(best, axis=0)
    out = tl.program_id(0).to(tl.int64) * k + slot
    tl.store(scores + out, best, slot < k)
    tl.store(best_rows + out, best_row, slot < k)


class Bounds(NamedTuple):
    """What screening leaves: each block's largest bounds [B, blocks], and the largest lower one [B]."""

    floor: Tensor
    lower: Tensor
    upper: Tensor


class Exact(NamedTuple):
    """What exact scoring reads: rows [N, D], floating queries [B, D], norms [B] if `score` needs them."""

    rows: Tensor
    queries: Tensor
    norms: Tensor | None
    score: Any


def screening_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype in which floating rows meet queries: their own, but fp32 for bf16 on the CPU.

    The interpreter's bf16 dot product is wrong; bf16 values are exact in TF32.
    """
    return torch.float32 if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 else rows.dtype


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as the MMA takes them without further loss: fp32 is rounded to TF32's 10 bits."""
    values = values.to(dtype)
    return values if dtype != torch.float32 else ((values.view(torch.int32) + 0x1000) & -0x2000).view(dtype)


def dot_error(terms: int, dtype: torch.dtype) -> float:
    """Return a bound of what dots_and_squares loses of ⟨r, q⟩, q rounded as above, relative to ‖r‖·‖q‖."""
    return (TF32_STEP if dtype == torch.float32 else 0.0) + terms * SUM_STEP + 64 * 2.0**-24


def padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """Return values [B, D] with zeros up to multiples of `rows` and `columns`."""
    batch, dimension = values.shape
    return torch.nn.functional.pad(values, (0, -dimension % columns, 0, -batch % rows)).contiguous()


def pieces(size: int, piece: int) -> int:
    """Return how many pieces cover `size`. Each call of triton.cdiv on the host takes microseconds."""
    return -(-size // piece)


def query_block(batch: int) -> int:
    """Return how many queries a screening program takes: the MMA's N, a power of two, at least 16."""
    return min(64, max(16, 1 << (batch - 1).bit_length()))


def screening_warps(block_queries: int) -> int:
    """Return a screening program's warps: eight from 32 queries on, or the sums leave too few registers."""
    return 4 if block_queries < 32 else 8


def best_rows(exact: Exact, bounds: Bounds, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best scores and rows [B, k], best first, ties to the lowest row.

    NaN and row 0 where a floor is +inf, or a row's score is not finite. Nothing waits for the device: what is
    launched and how much memory it takes does not depend on how many blocks are left.
    """
    floor, lower, upper = bounds
    if k == 1:
        return best_row(exact, floor, upper)
    floor = floor[: len(lower)]
    kth = lower.topk(k, dim=1).values[:, -1] if lower.shape[1] >= k else -torch.inf
    floor = torch.where(floor == torch.inf, floor, kth)
    listed = torch.empty(lower.shape, dtype=torch.int32, device=lower.device)
    number = torch.empty(lower.shape[:1], dtype=torch.int32, device=lower.device)
    list_blocks[(len(lower),)](upper, floor, listed, number, lower.shape[1], LIST_CHUNK)
    return sorted_rows(exact, floor, listed, number, k)


def best_row(exact: Exact, floor: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return score and row [B, 1] of the best row in the blocks that reach the floor [B]."""
    batch, blocks = upper.shape
    parts = BLOCK_ROWS // SCAN_ROWS
    chunks = min(pieces(blocks, SCAN_CHUNK), pieces(SHARES, batch * parts))
    shares = chunks * parts
    scores, score = (
        torch.empty(size, dtype=torch.float32, device=upper.device) for size in ((shares, batch), (batch, 1))
    )
    best_rows, row = (
        torch.empty(size, dtype=torch.int64, device=upper.device) for size in ((shares, batch), (batch, 1))
    )
    best_in_blocks[(shares * batch,)](
        *exact[:3],
        floor,
        upper,
        scores,
        best_rows,
        *exact.rows.shape,
        batch,
        blocks,
        exact.score,
        BLOCK_ROWS,
        SCAN_ROWS,
        SCAN_COLUMNS,
        SCAN_CHUNK,
    )
    best_of_shares[(batch,)](scores, best_rows, score, row, batch, shares, SHARE_CHUNK)
    return score, row


def sorted_rows(exact: Exact, floor: Tensor, listed: Tensor, number: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return score and row [B, k] of the k best rows in the listed blocks that reach the floor [B]."""
    batch, blocks = listed.shape
    shares = min(blocks * (BLOCK_ROWS // EXACT_ROWS), pieces(SHARES, batch), pieces(KEPT, k))
    score = torch.empty((batch, shares * k), dtype=torch.float32, device=listed.device)
    row = torch.empty((batch, shares * k), dtype=torch.int64, device=listed.device)
    best_in_list[(batch * shares,)](
        *exact[:3],
        floor,
        listed,
        number,
        score,
        row,
        k,
        shares,
        *exact.rows.shape,
        blocks,
        exact.score,
        BLOCK_ROWS,
        EXACT_ROWS,
        EXACT_COLUMNS,
        1 << (k - 1).bit_length(),
    )
    row, order = row.sort(dim=1)
    best = score.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ranked_or_nan(best.values[:, :k], row.gather(1, best.indices[:, :k]))
