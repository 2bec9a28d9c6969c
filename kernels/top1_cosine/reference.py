"""Exact cosine search in plain torch, float64, a block of rows at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..search.answer import above_limit, ranked_or_nan, surfacing
from .contract import MIN_NORM, Codes, Panels

BLOCK_BYTES = 32 * 2**20
CODE_MAX = 127


def topk_cosine(
    queries: Tensor, rows: Tensor, codes: Codes | Panels | None, k: int, limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return similarity [B, k] fp32, best first, and row [B, k]; ties go to the lowest row.

    The similarity is the float64 dot product with the row as stored, over the query's norm, rounded to
    fp32; rows whose rounded similarities are equal tie. Codes are not needed here.
    At most BLOCK_BYTES of float64 are held at a time. No value is looked at: where a query has no direction,
    or a row is not finite, its similarities are NaN and its rows 0; below its limit [B] −inf and −1.
    """
    directions = queries.double()
    norms = directions.norm(dim=1, keepdim=True)
    norms = torch.where(norms >= MIN_NORM, norms, torch.nan)
    similarity = torch.empty(len(queries), 0, dtype=torch.float32, device=rows.device)
    row = torch.empty(len(queries), 0, dtype=torch.int64, device=rows.device)
    for start, block in row_blocks(rows, len(queries)):
        scores = surfacing((directions @ block.T / norms).float())
        numbers = torch.arange(start, start + len(block), device=rows.device).expand_as(scores)
        similarity, row = torch.cat([similarity, scores], 1), torch.cat([row, numbers], 1)
        keep = lowest_largest(similarity, k)
        similarity, row = similarity.gather(1, keep), row.gather(1, keep)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    return above_limit(*ranked_or_nan(similarity.gather(1, order), row.gather(1, order)), limit)


def row_blocks(
    rows: Tensor, queries: int, convert: Callable[[Tensor], Tensor] = Tensor.double
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, float64 block) so that a block and its scores fit BLOCK_BYTES."""
    size = max(1, BLOCK_BYTES // (8 * (rows.shape[1] + 3 * queries)))
    for start in range(0, rows.shape[0], size):
        yield start, convert(rows[start : start + size])


def lowest_largest(values: Tensor, k: int) -> Tensor:
    """Return the columns [B, min(k, N)], ascending, of each row's k largest values; ties to the lowest.

    No value may be NaN. Shapes depend on none, so that nothing is read on the host.
    """
    k = min(k, values.shape[1])
    if k == values.shape[1]:
        return torch.arange(k, device=values.device).expand(values.shape[0], k)
    kth = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > kth, values == kth
    room = k - above.sum(1, keepdim=True)
    keep = above | (equal & (equal.cumsum(1) <= room))
    column = torch.arange(values.shape[1], 0, -1, device=values.device)  # largest first is leftmost first
    return values.shape[1] - torch.where(keep, column, 0).topk(k, dim=1).values


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes [N, D], scales [N] and error norms [N] with ‖r − scale·code‖ ≤ error.

    scale = max|r| / 127 in fp32, code = round(r / scale); the error is measured in float64 and rounded up.
    """
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    scales, errors = (torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device) for _ in range(2))
    for start, block in row_blocks(rows, 0):
        stop = start + len(block)
        if not bool(block.isfinite().all()):
            row = start + int((~block.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"`rows` must be finite, got a non-finite value in row {row}")
        scale = (block.abs().amax(1) / CODE_MAX).float()
        divisor = torch.where(scale > 0, scale, 1).double()[:, None]
        code = (block / divisor).round().clamp(-CODE_MAX, CODE_MAX)
        error = (block - code * scale.double()[:, None]).norm(dim=1)
        codes[start:stop], scales[start:stop] = code.to(torch.int8), scale
        errors[start:stop] = round_up(error)
    return codes, scales, errors


def round_up(values: Tensor) -> Tensor:
    """Return fp32 values not below the float64 ones (with room for the float64 sum's own rounding)."""
    padded = (values * (1 + 1e-9)).float()
    return torch.where(padded > 0, torch.nextafter(padded, torch.full_like(padded, torch.inf)), padded)
