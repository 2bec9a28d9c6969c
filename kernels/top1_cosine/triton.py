"""The cosine search in Triton: rows or int8 codes screen blocks of rows, float64 decides what is left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..search import triton as search
from .contract import Codes
from .reference import CODE_MAX, round_up

ROUNDING_SLACK = 2e-6  # per unit of row norm: fp32 roundings of the bounds, and ties in fp32
ROUND_TO_INTEGER = tl.constexpr(6755399441055744.0)  # 1.5·2^52: adding it rounds a float64 to an integer
ENCODE_ROWS = 16
ENCODE_COLUMNS = 128


@triton.jit(do_not_specialize=["count", "batch", "blocks"])
def screen_blocks(
    rows,
    scales,
    errors,
    queries,
    query_scales,
    losses,
    lower,
    upper,
    count,
    dimension,
    stride,
    batch,
    blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (block, queries) bounds BLOCK_ROWS rows' similarities and keeps each query's largest bounds.

    score ± (loss·‖r̂‖ + error), r̂ = scale·code; where scales is None, rows are screened as stored.
    Queries vary fastest, so that the programs which share rows find them in the cache.
    """
    query_blocks = tl.cdiv(batch, BLOCK_QUERIES)
    block = tl.program_id(0) // query_blocks
    query = (tl.program_id(0) % query_blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < count
    row = tl.minimum(row, count - 1)
    dots, squares = search.dots_and_squares(
        rows, queries, row, query, 0, dimension, dimension, stride, BLOCK_K
    )
    score = dots.to(tl.float32)
    norm = tl.sqrt(squares.to(tl.float32))
    # What the squares of values below 1e-19 lose to underflow is covered absolutely.
    lost = tl.full([BLOCK_ROWS], 1e-16, tl.float32)
    if scales is not None:
        scale = tl.load(scales + row)
        score *= scale[:, None] * tl.load(query_scales + query)[None, :]
        norm *= scale
        lost += tl.load(errors + row) * (1 + 1e-6)
    slack = norm[:, None] * tl.load(losses + query)[None, :] + lost[:, None]
    search.store_bounds(score - slack, score + slack, inside, block, query, lower, upper, batch, blocks)


@triton.jit
def exact_similarity(rows, queries, norms, row, query, dimension, BLOCK_K: tl.constexpr):
    """Return ⟨q, r⟩ / ‖q‖ in float64, rounded to fp32; every row is summed in the same order."""
    total = tl.zeros([row.shape[0]], tl.float64)
    for start in range(0, dimension, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < dimension
        tile = tl.load(rows + (row * dimension)[:, None] + column[None, :], inside[None, :], 0)
        values = tl.load(queries + query * dimension + column, inside, 0)
        total += tl.sum(tile.to(tl.float32).to(tl.float64) * values[None, :], axis=1)
    return (total / tl.load(norms + query)).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def encode_blocks(
    rows,
    codes,
    scales,
    errors,
    count,
    dimension,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CODE_MAX: tl.constexpr,
):
    """Program p encodes ROWS rows in two passes; a row with a value that is not finite gets the scale NaN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = (row < count)[:, None]
    start = (row * dimension)[:, None]
    largest = tl.zeros([ROWS], tl.float32)
    finite = tl.full([ROWS], 1, tl.int32)
    for step in range(0, dimension, BLOCK_K):
        column = (step + tl.arange(0, BLOCK_K))[None, :]
        size = tl.abs(tl.load(rows + start + column, present & (column < dimension), 0).to(tl.float32))
        largest = tl.maximum(largest, tl.max(size, axis=1))
        finite = tl.minimum(finite, tl.min((size < float("inf")).to(tl.int32), axis=1))
    scale = (largest.to(tl.float64) / CODE_MAX).to(tl.float32)
    unit = scale.to(tl.float64)[:, None]
    divisor = tl.where(unit > 0, unit, 1.0)
    square = tl.zeros([ROWS], tl.float64)
    for step in range(0, dimension, BLOCK_K):
        column = (step + tl.arange(0, BLOCK_K))[None, :]
        inside = present & (column < dimension)
        values = tl.load(rows + start + column, inside, 0).to(tl.float32).to(tl.float64)
        code = (values / divisor + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
        code = tl.minimum(tl.maximum(code, -CODE_MAX), CODE_MAX)
        lost = values - code * unit
        square += tl.sum(lost * lost, axis=1)
        tl.store(codes + start + column, code.to(tl.int32).to(tl.int8), inside)
    tl.store(scales + row, tl.where(finite == 1, scale, float("nan")), row < count)
    tl.store(errors + row, tl.sqrt(square), row < count)


def topk_cosine(queries: Tensor, rows: Tensor, codes: Codes | None, k: int) -> tuple[Tensor, Tensor]:
    """Return similarity [B, k] fp32, best first, and row [B, k]; arguments as in amg.kernels.topk_cosine."""
    rows, directions = rows.contiguous(), queries.double().contiguous()
    if len(queries) == 0:
        return rows.new_empty((0, k), dtype=torch.float32), rows.new_empty((0, k), dtype=torch.int64)
    norms = directions.norm(dim=1)
    lower, upper = block_bounds(directions / norms[:, None], rows, codes)
    return search.best_rows(search.Exact(rows, directions, norms, exact_similarity), lower, upper, k)


def block_bounds(unit: Tensor, rows: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor]:
    """Return each block's largest lower and upper bound [B, blocks] of unit queries' similarities."""
    batch, (count, dimension) = len(unit), rows.shape
    screened, scales, errors = (rows, None, None) if codes is None else (part.contiguous() for part in codes)
    encoded = round_queries(unit, search.screening_dtype(rows)) if codes is None else encode_queries(unit)
    block_queries, block_k = search.query_block(batch), search.BYTES_A_STEP // encoded[0].element_size()
    queries = search.padded(encoded[0], block_queries, block_k)
    query_scales, losses = (search.padded(part[:, None], block_queries, 1) for part in encoded[1:])
    blocks = triton.cdiv(count, search.BLOCK_ROWS)
    lower, upper = (torch.empty((batch, blocks), dtype=torch.float32, device=rows.device) for _ in range(2))
    screen_blocks[(blocks * triton.cdiv(batch, block_queries),)](
        screened,
        scales,
        errors,
        queries,
        query_scales,
        losses,
        lower,
        upper,
        count,
        dimension,
        queries.shape[1],
        batch,
        blocks,
        search.BLOCK_ROWS,
        block_queries,
        block_k,
        num_warps=search.screening_warps(block_queries),
    )
    return lower, upper


def round_queries(unit: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit queries in the MMA's dtype, scales 1, and what ⟨q, r⟩ can lose for a row of norm 1."""
    queries = search.rounded(unit, dtype)
    dimension, wide = unit.shape[1], queries.double()
    loss = (unit - wide).norm(dim=1) + wide.norm(dim=1) * search.dot_error(dimension, dtype)
    norm_error = 1 + 1e-6 + dimension * 2.0**-24  # of ‖r‖ as the kernel sums it
    return queries, torch.ones_like(loss), ((loss + ROUNDING_SLACK) * norm_error).float()


def encode_queries(unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes of unit queries, their scales, and what ⟨q, r⟩ can lose for a row of norm 1."""
    scales = (unit.abs().amax(1) / CODE_MAX).float()
    steps = scales.double()[:, None]
    codes = (unit / steps).round().clamp(-CODE_MAX, CODE_MAX)
    loss = (unit - codes * steps).norm(dim=1) * (1 + 1e-6) + ROUNDING_SLACK
    return codes.to(torch.int8), scales, loss.float()


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [N, D], scales [N] and errors [N]; arguments as in amg.kernels.encode_rows."""
    rows = rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    errors = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    programs = triton.cdiv(len(rows), ENCODE_ROWS)
    encode_blocks[(programs,)](
        rows, codes, scales, errors, *rows.shape, ENCODE_ROWS, ENCODE_COLUMNS, CODE_MAX
    )
    bad = ~scales.isfinite()
    if bool(bad.any()):
        raise ValueError(f"`rows` must be finite, got a non-finite value in row {int(bad.nonzero()[0])}")
    return codes, scales, round_up(errors)
