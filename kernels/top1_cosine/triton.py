"""The cosine search in Triton: rows or int8 codes screen blocks of rows, float64 decides what is left."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..search import triton as search
from ..search.answer import above_limit
from . import contract
from .contract import Codes
from .reference import CODE_MAX, round_up

ROUNDING_SLACK = tl.constexpr(2e-6)  # per unit of row norm: fp32 roundings of the bounds, and ties in fp32
MIN_NORM = tl.constexpr(contract.MIN_NORM)
ROUND_TO_INTEGER = tl.constexpr(6755399441055744.0)  # 1.5·2^52: adding it rounds a float64 to an integer
ENCODE_ROWS = 16
ENCODE_COLUMNS = 128
QUERY_COLUMNS = 512


@triton.jit(do_not_specialize=["count", "batch", "blocks"])
def screen_blocks(
    rows,
    scales,
    errors,
    queries,
    query_scales,
    losses,
    floor,
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
    search.store_bounds(
        score - slack, score + slack, inside, block, query, floor, lower, upper, batch, blocks
    )


@triton.jit
def as_float64(values):
    """Return floating values in float64; bf16 by way of fp32, which is what the interpreter gets right."""
    if values.dtype != tl.float64:
        values = values.to(tl.float32).to(tl.float64)
    return values


@triton.jit(do_not_specialize=["batch"])
def encode_queries(
    queries,
    encoded,
    scales,
    losses,
    norms,
    floor,
    batch,
    dimension,
    stride,
    dot_error,
    norm_error,
    BLOCK_K: tl.constexpr,
    CODE_MAX: tl.constexpr,
):
    """Program q normalises query q and encodes it, with what that loses: see Prepared.

    Zeros from `batch` on, and of a query without a direction, which gets a floor that no block reaches.
    int8 gets scale·code, scale = max|q|/CODE_MAX; fp32 is rounded to TF32's 10 bits: nothing more is lost.
    """
    CODES: tl.constexpr = encoded.dtype.element_ty == tl.int8
    query = tl.program_id(0).to(tl.int64)
    present = query < batch
    square = tl.zeros([BLOCK_K], tl.float64)
    largest = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, dimension, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        values = as_float64(tl.load(queries + query * dimension + column, present & (column < dimension), 0))
        square += values * values
        largest = tl.maximum(largest, tl.abs(values))
    norm = tl.sqrt(tl.sum(square, axis=0))
    present &= (norm >= MIN_NORM) & (norm < float("inf"))
    norm = tl.where(present, norm, float("nan"))
    tl.store(norms + query, norm)
    tl.store(floor + query, tl.where(present, float("-inf"), float("inf")))
    scale = tl.where(present, (tl.max(largest, axis=0) / norm / CODE_MAX).to(tl.float32), 0.0)
    unit = tl.where(scale > 0, scale, 1.0).to(tl.float64)
    per_norm, per_unit = 1 / norm, 1 / unit
    lost = tl.zeros([BLOCK_K], tl.float64)
    kept = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, stride, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = present & (column < dimension)
        values = as_float64(tl.load(queries + query * dimension + column, inside, 0)) * per_norm
        values = tl.where(inside, values, 0.0)
        if CODES:
            code = (values * per_unit + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
            code = tl.minimum(tl.maximum(code, -CODE_MAX), CODE_MAX)
            stored = code.to(tl.int32).to(tl.int8)
            near = code * unit
        else:
            stored = values.to(encoded.dtype.element_ty)
            if encoded.dtype.element_ty == tl.float32:
                bits = (stored.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
                stored = bits.to(tl.float32, bitcast=True)
            near = as_float64(stored)
        lost += (values - near) * (values - near)
        kept += near * near
        tl.store(encoded + query * stride + column, stored, column < stride)
    loss = tl.sqrt(tl.sum(lost, axis=0))
    if CODES:
        loss = loss * (1 + 1e-6) + ROUNDING_SLACK
        tl.store(scales + query, scale)
    else:
        loss = (loss + tl.sqrt(tl.sum(kept, axis=0)) * dot_error + ROUNDING_SLACK) * norm_error
    tl.store(losses + query, loss.to(tl.float32))


@triton.jit
def exact_similarity(rows, queries, norms, row, query, dimension, BLOCK_K: tl.constexpr):
    """Return ⟨q, r⟩ / ‖q‖ in float64, rounded to fp32; every row is summed in the same order."""
    total = tl.zeros([row.shape[0]], tl.float64)
    for start in range(0, dimension, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < dimension
        tile = tl.load(rows + (row * dimension)[:, None] + column[None, :], inside[None, :], 0)
        values = as_float64(tl.load(queries + query * dimension + column, inside, 0))
        total += tl.sum(as_float64(tile) * values[None, :], axis=1)
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


def topk_cosine(
    queries: Tensor, rows: Tensor, codes: Codes | None, k: int, limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return similarity [B, k] fp32, best first, and row [B, k]; arguments as in amg.kernels.topk_cosine."""
    rows, queries = rows.contiguous(), queries.contiguous()
    if len(queries) == 0:
        return rows.new_empty((0, k), dtype=torch.float32), rows.new_empty((0, k), dtype=torch.int64)
    prepared = prepare(queries, search.screening_dtype(rows) if codes is None else torch.int8)
    bounds = block_bounds(prepared, len(queries), rows, codes)
    exact = search.Exact(rows, queries, prepared.norms, exact_similarity)
    return above_limit(*search.best_rows(exact, bounds, k), limit)


class Prepared(NamedTuple):
    """Unit queries as rows or codes meet them.

    encoded [·, ·], zero beyond the queries and their dimension; scales [·] of int8 codes; losses [·]: what
    ⟨q, r⟩ can lose for a row of norm 1; norms [·] float64 of the queries, NaN where they have no direction;
    floor [·] −inf, where screening starts, and +inf where they have none.
    """

    encoded: Tensor
    scales: Tensor
    losses: Tensor
    norms: Tensor
    floor: Tensor


def prepare(queries: Tensor, dtype: torch.dtype) -> Prepared:
    """Return queries [B, D] encoded in `dtype`, padded to what a screening program takes."""
    batch, dimension = queries.shape
    block_k = search.BYTES_A_STEP // dtype.itemsize
    size = search.pieces(batch, search.query_block(batch)) * search.query_block(batch)
    encoded = queries.new_empty((size, search.pieces(dimension, block_k) * block_k), dtype=dtype)
    scales, losses, floor = (queries.new_empty(size, dtype=torch.float32) for _ in range(3))
    norms = queries.new_empty(size, dtype=torch.float64)
    encode_queries[(size,)](
        queries,
        encoded,
        scales,
        losses,
        norms,
        floor,
        batch,
        dimension,
        encoded.shape[1],
        search.dot_error(dimension, dtype),
        1 + 1e-6 + dimension * 2.0**-24,
        QUERY_COLUMNS,
        CODE_MAX,
    )
    return Prepared(encoded, scales, losses, norms, floor)


def block_bounds(prepared: Prepared, batch: int, rows: Tensor, codes: Codes | None) -> search.Bounds:
    """Return the bounds of the queries' similarities."""
    screened, scales, errors = (rows, None, None) if codes is None else (part.contiguous() for part in codes)
    count, dimension = rows.shape
    blocks, block_queries = search.pieces(count, search.BLOCK_ROWS), search.query_block(batch)
    lower, upper = (torch.empty((batch, blocks), dtype=torch.float32, device=rows.device) for _ in range(2))
    screen_blocks[(blocks * (len(prepared.encoded) // block_queries),)](
        screened,
        scales,
        errors,
        prepared.encoded,
        prepared.scales,
        prepared.losses,
        prepared.floor,
        lower,
        upper,
        count,
        dimension,
        prepared.encoded.shape[1],
        batch,
        blocks,
        search.BLOCK_ROWS,
        block_queries,
        search.BYTES_A_STEP // prepared.encoded.element_size(),
        num_warps=search.screening_warps(block_queries),
    )
    return search.Bounds(prepared.floor, lower, upper)


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [N, D], scales [N] and errors [N]; arguments as in amg.kernels.encode_rows."""
    rows = rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    errors = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    programs = search.pieces(len(rows), ENCODE_ROWS)
    encode_blocks[(programs,)](
        rows, codes, scales, errors, *rows.shape, ENCODE_ROWS, ENCODE_COLUMNS, CODE_MAX
    )
    bad = ~scales.isfinite()
    if bool(bad.any()):
        raise ValueError(f"`rows` must be finite, got a non-finite value in row {int(bad.nonzero()[0])}")
    return codes, scales, round_up(errors)
