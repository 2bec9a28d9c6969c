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

BLOCK_ROWS = 128  # rows a screening program takes, and the unit that is dropped or kept
EXACT_ROWS = 16  # rows scored exactly at a time
EXACT_COLUMNS = 128
LIST_CHUNK = 2048  # blocks looked at together when the survivors are listed
SHARES = 1024  # exact-scoring programs of a top-1 search, all queries together
SCORES_AT_ONCE = 2**22  # exact scores held by a top-k search
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
    row_start = rows + row * dimension
    query_start = queries + query.to(tl.int64) * stride
    dots = tl.zeros([row.shape[0], query.shape[0]], TOTAL)
    squares = tl.zeros([row.shape[0]], TOTAL)
    for step in tl.range(begin, end, BLOCK_K):
        column = step + tl.arange(0, BLOCK_K)
        inside = (column < dimension)[None, :]
        tile = tl.load(row_start[:, None] + column[None, :], inside, 0)
        if CENTRED:
            tile = (tile ^ 128).to(tl.int8, bitcast=True)
        tile = tile.to(QUERY)
        values = tl.load(query_start[None, :] + column[:, None])
        dots = tl.dot(tile, values, dots, input_precision="tf32", out_dtype=TOTAL)
        wide = tile.to(TOTAL)
        squares += tl.sum(wide * wide, axis=1)
    if CENTRED:  # the zeros beyond the end became −128; they meet zeros of the query
        squares -= 128 * 128 * (tl.cdiv(end - begin, BLOCK_K) * BLOCK_K - (end - begin))
    return dots, squares


@triton.jit
def store_bounds(low, high, inside, block, query, lower, upper, batch, blocks):
    """Store a block's largest lower and upper bound for each query; those not finite bound nothing."""
    bounded = (low > float("-inf")) & (high < float("inf"))  # false for NaN
    low = tl.where(inside[:, None] & bounded, low, float("-inf"))
    high = tl.where(bounded, high, float("inf"))
    high = tl.where(inside[:, None], high, float("-inf"))
    place = query.to(tl.int64) * blocks + block
    tl.store(lower + place, tl.max(low, axis=0), query < batch)
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
    listed,
    number,
    score,
    row,
    count,
    dimension,
    batch,
    blocks,
    SCORE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (share, q) finds the best of its share of query q's listed rows; ties to the lowest row."""
    PARTS: tl.constexpr = BLOCK_ROWS // ROWS
    query = (tl.program_id(0) % batch).to(tl.int64)
    share = tl.program_id(0) // batch
    best = tl.full([], float("-inf"), tl.float32)
    best_row = tl.full([], 2**62, tl.int64)
    for item in range(share, tl.load(number + query) * PARTS, tl.num_programs(0) // batch):
        block = tl.load(listed + query * blocks + item // PARTS).to(tl.int64)
        here = block * BLOCK_ROWS + (item % PARTS) * ROWS + tl.arange(0, ROWS)
        scores = exact_scores(rows, queries, norms, here, query, count, dimension, SCORE, BLOCK_K)
        top = tl.max(scores, axis=0)
        top_row = tl.min(tl.where(scores == top, here, 2**62), axis=0)
        best_row = tl.where(top > best, top_row, best_row)  # rows ascend within a share
        best = tl.maximum(top, best)
    tl.store(score + tl.program_id(0), best)
    tl.store(row + tl.program_id(0), best_row)


@triton.jit(do_not_specialize=["first", "slots", "count", "blocks"])
def scores_in_blocks(
    rows,
    queries,
    norms,
    listed,
    number,
    scores,
    first,
    slots,
    count,
    dimension,
    blocks,
    SCORE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (q, slot, part) scores a part of query q's listed block first + slot; −inf past the list."""
    PARTS: tl.constexpr = BLOCK_ROWS // ROWS
    query = (tl.program_id(0) // (slots * PARTS)).to(tl.int64)
    item = tl.program_id(0) % (slots * PARTS)
    slot = first + item // PARTS
    out = scores + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if slot < tl.load(number + query):
        block = tl.load(listed + query * blocks + slot).to(tl.int64)
        here = block * BLOCK_ROWS + (item % PARTS) * ROWS + tl.arange(0, ROWS)
        tl.store(out, exact_scores(rows, queries, norms, here, query, count, dimension, SCORE, BLOCK_K))
    else:
        tl.store(out, tl.full([ROWS], float("-inf"), tl.float32))


class Exact(NamedTuple):
    """What exact scoring reads: rows [N, D], float64 queries [B, D], norms [B] if `score` needs them."""

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


def query_block(batch: int) -> int:
    """Return how many queries a screening program takes: the MMA's N, at least 16."""
    return min(64, max(16, triton.next_power_of_2(batch)))


def screening_warps(block_queries: int) -> int:
    """Return a screening program's warps: eight from 32 queries on, or the sums leave too few registers."""
    return 4 if block_queries < 32 else 8


def best_rows(exact: Exact, lower: Tensor, upper: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best scores and rows [B, k], best first, ties to the lowest row.

    lower and upper [B, blocks] are the screening's bounds. Raises ValueError where a score is not finite.
    k = 1 waits for the device once, to look for that; k > 1 once more, to learn how many blocks are left.
    """
    blocks = lower.shape[1]
    floor = lower.new_full(lower.shape[:1], -torch.inf)
    if blocks >= k:
        floor = lower.amax(1) if k == 1 else lower.topk(k, dim=1).values[:, -1].contiguous()
    listed = torch.empty(lower.shape, dtype=torch.int32, device=lower.device)
    number = torch.empty(lower.shape[:1], dtype=torch.int32, device=lower.device)
    list_blocks[(len(lower),)](upper, floor, listed, number, blocks, LIST_CHUNK)
    score, row = (best_row if k == 1 else sorted_rows)(exact, listed, number, k)
    if bool((score[:, 0] == torch.inf).any()):
        raise ValueError("`rows` must be finite, got a score that is not")
    return score, row


def best_row(exact: Exact, listed: Tensor, number: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return score and row [B, 1] of the best row in the listed blocks; nothing here waits for the device."""
    batch, blocks = listed.shape
    shares = min(triton.cdiv(SHARES, batch), blocks * (BLOCK_ROWS // EXACT_ROWS))
    score = torch.empty((shares, batch), dtype=torch.float32, device=listed.device)
    row = torch.empty((shares, batch), dtype=torch.int64, device=listed.device)
    best_in_blocks[(shares * batch,)](
        *exact[:3],
        listed,
        number,
        score,
        row,
        *exact.rows.shape,
        batch,
        blocks,
        exact.score,
        BLOCK_ROWS,
        EXACT_ROWS,
        EXACT_COLUMNS,
    )
    best = score.amax(0)
    return best[:, None], row.where(score == best, 2**62).amin(0)[:, None]


def sorted_rows(exact: Exact, listed: Tensor, number: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return score and row [B, k] of the k best rows in the listed blocks, SCORES_AT_ONCE at a time."""
    batch, blocks = listed.shape
    most = int(number.max())
    slots = max(1, min(most, SCORES_AT_ONCE // (batch * BLOCK_ROWS)))
    within = torch.arange(BLOCK_ROWS, device=listed.device)
    score = torch.empty((batch, 0), dtype=torch.float32, device=listed.device)
    row = torch.empty((batch, 0), dtype=torch.int64, device=listed.device)
    for first in range(0, most, slots):
        slots = min(slots, most - first)
        scores = torch.empty((batch, slots * BLOCK_ROWS), dtype=torch.float32, device=listed.device)
        scores_in_blocks[(batch * slots * (BLOCK_ROWS // EXACT_ROWS),)](
            *exact[:3],
            listed,
            number,
            scores,
            first,
            slots,
            *exact.rows.shape,
            blocks,
            exact.score,
            BLOCK_ROWS,
            EXACT_ROWS,
            EXACT_COLUMNS,
        )
        numbers = listed[:, first : first + slots, None].long() * BLOCK_ROWS + within
        score, row = torch.cat([score, scores], 1), torch.cat([row, numbers.flatten(1)], 1)
        order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]  # columns ascend by row
        score, row = score.gather(1, order), row.gather(1, order)
    return score, row
