"""The pixel metric in Triton: an MMA bounds the distances of blocks of rows, float64 decides what is left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..search import triton as search

BYTE_ROUNDING = 3.1e-8  # |r/255 − fp32(r/255)| ≤ 2^-25
BYTE_SEGMENT = 2**15  # pixels whose squared difference int32 holds
FLOAT_SEGMENT = 2**11  # pixels in one MMA sum: its error grows with its length
DISTANCE_SLACK = tl.constexpr(2e-6)  # relative: fp32 roundings of a distance, and ties in fp32
ABSOLUTE_SLACK = 1e-16  # what squares of values below 1e-19 lose to underflow


@triton.jit(do_not_specialize=["count", "padded_batch", "batch", "blocks"])
def screen_blocks(
    rows,
    queries,
    query_squares,
    losses,
    floor,
    lower,
    upper,
    unit,
    error,
    count,
    pixels,
    stride,
    padded_batch,
    batch,
    blocks,
    SEGMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (block, queries) bounds −ℓ2 of BLOCK_ROWS rows and keeps each query's largest bounds.

    ‖q̂ − r‖² = ‖q̂‖² − 2⟨q̂, r⟩ + ‖r‖² segment by segment: exact integers for bytes, else within
    error·(‖q̂‖ + ‖r‖)². ℓ2 = √(unit·‖q̂ − r‖²), and ℓ2(q, r) differs from it by at most `loss`.
    """
    query_blocks = tl.cdiv(batch, BLOCK_QUERIES)
    block = tl.program_id(0) // query_blocks
    query = (tl.program_id(0) % query_blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < count
    row = tl.minimum(row, count - 1)
    square = tl.zeros([BLOCK_ROWS, BLOCK_QUERIES], tl.float32)
    row_square = tl.zeros([BLOCK_ROWS], tl.float32)
    query_square = tl.zeros([BLOCK_QUERIES], tl.float32)
    for begin in range(0, pixels, SEGMENT):
        end = tl.minimum(begin + SEGMENT, pixels)
        dots, squares = search.dots_and_squares(
            rows, queries, row, query, begin, end, pixels, stride, BLOCK_K
        )
        own = tl.load(query_squares + (begin // SEGMENT) * padded_batch + query)
        square += (own[None, :] - 2 * dots + squares[:, None]).to(tl.float32)
        row_square += squares.to(tl.float32)
        query_square += own.to(tl.float32)
    spread = tl.zeros([BLOCK_ROWS, BLOCK_QUERIES], tl.float32)
    if queries.dtype.element_ty.is_floating():
        norms = tl.sqrt(row_square)[:, None] + tl.sqrt(query_square)[None, :]
        spread = error * norms * norms
    loss = tl.load(losses + query)[None, :]
    low = -tl.sqrt((square + spread) * unit) * (1 + DISTANCE_SLACK) - loss
    high = -tl.sqrt(tl.maximum(square - spread, 0.0) * unit) * (1 - DISTANCE_SLACK) + loss
    search.store_bounds(low, high, inside, block, query, floor, lower, upper, batch, blocks)


@triton.jit
def exact_closeness(rows, queries, norms, row, query, pixels, BLOCK_K: tl.constexpr):
    """Return −ℓ2(q, r) by direct difference in float64, rounded to fp32; all rows are summed alike."""
    total = tl.zeros([row.shape[0]], tl.float64)
    for start in range(0, pixels, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < pixels
        tile = tl.load(rows + (row * pixels)[:, None] + column[None, :], inside[None, :], 0).to(tl.float32)
        if rows.dtype.element_ty == tl.uint8:
            tile = tl.div_rn(tile, 255.0)
        values = tl.load(queries + query * pixels + column, inside, 0)
        difference = tile.to(tl.float64) - values[None, :]
        total += tl.sum(difference * difference, axis=1)
    return (-tl.sqrt(total / pixels)).to(tl.float32)


def nl2(queries: Tensor, rows: Tensor, k: int, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value, row, distance and denominator [B]; arguments as in amg.kernels.nl2."""
    rows, pixels = rows.contiguous(), queries.double().contiguous()
    if len(queries) == 0:
        nothing = rows.new_empty(0, dtype=torch.float32)
        return nothing, nothing.long(), nothing.clone(), nothing.clone()
    usable = pixels.isfinite().all(1, keepdim=True)
    pixels = torch.where(usable, pixels, 0.0)
    bounds = block_bounds(pixels, rows)
    bounds.floor.masked_fill_(~usable[:, 0], torch.inf)  # which no block reaches
    exact = search.Exact(rows, pixels, None, exact_closeness)
    closeness, row = search.best_rows(exact, bounds, k)
    distances = -closeness.double()
    distance, denominator = distances[:, 0], alpha * distances.mean(1)
    value = torch.where(distance == 0, 0.0, distance / denominator)
    return value.float(), row[:, 0].contiguous(), distance.float(), denominator.float()


def block_bounds(pixels: Tensor, rows: Tensor) -> search.Bounds:
    """Return the bounds of −ℓ2."""
    batch, (count, size) = len(pixels), rows.shape
    if rows.dtype == torch.uint8:
        rounded, losses = round_to_bytes(pixels)
        segment, unit, error = BYTE_SEGMENT, 1 / (65025 * size), 0.0
    else:
        rounded, losses = round_to_floats(pixels, search.screening_dtype(rows))
        segment, unit = FLOAT_SEGMENT, 1 / size
        error = search.dot_error(segment + search.pieces(size, segment), rounded.dtype)
    block_queries, block_k = search.query_block(batch), search.BYTES_A_STEP // rounded.element_size()
    rounded = search.padded(rounded, block_queries, block_k)
    squares = torch.stack([part.square().sum(1) for part in rounded.double().split(segment, dim=1)])
    blocks = search.pieces(count, search.BLOCK_ROWS)
    lower, upper = (torch.empty((batch, blocks), dtype=torch.float32, device=rows.device) for _ in range(2))
    floor = torch.full((batch,), -torch.inf, dtype=torch.float32, device=rows.device)
    bounds = search.Bounds(floor, lower, upper)
    screen_blocks[(blocks * search.pieces(batch, block_queries),)](
        rows,
        rounded,
        squares.to(torch.int32 if rounded.dtype == torch.int8 else torch.float32),
        search.padded(losses[:, None], block_queries, 1),
        *bounds,
        unit,
        error,
        count,
        size,
        rounded.shape[1],
        len(rounded),
        batch,
        blocks,
        segment,
        search.BLOCK_ROWS,
        block_queries,
        block_k,
        num_warps=search.screening_warps(block_queries),
    )
    return bounds


def round_to_bytes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries as centred bytes, int8 255·q̂ − 128, and a bound of |ℓ2(q, r) − ℓ2(q̂, r)|."""
    codes = (pixels * 255).round().clamp(0, 255)
    losses = rounded_up_l2(pixels - codes / 255) + BYTE_ROUNDING
    return (codes - 128).to(torch.int8), losses.float()


def round_to_floats(pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return queries as the MMA takes them and a bound of |ℓ2(q, r) − ℓ2(q̂, r)|."""
    rounded = search.rounded(pixels, dtype)
    return rounded, rounded_up_l2(pixels - rounded.double()).float()


def rounded_up_l2(difference: Tensor) -> Tensor:
    """Return the ℓ2 of float64 differences [B, P], not below what it is after rounding to fp32."""
    return difference.square().mean(1).sqrt() * (1 + 1e-6) + ABSOLUTE_SLACK
