"""The pixel metric in plain torch, float64, a block of rows at a time."""

import torch
from torch import Tensor

from ..search.answer import ranked_or_nan, surfacing
from ..top1_cosine.reference import lowest_largest, row_blocks

SELECTION_GRID = 2.0**46  # float64 noise of the mean squares is below this; equal rows must compare equal
MARGIN = 64  # candidates beyond k, so that the noise does not choose between near ties


def nl2(queries: Tensor, rows: Tensor, k: int, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value, row, distance and denominator [B]; arguments as in amg.kernels.nl2.

    k + MARGIN candidates are selected by ‖q‖² − 2⟨q, r⟩ + ‖r‖² in float64; their distances are then taken by
    direct difference, because that form cancels for near duplicates. No value is looked at: all is NaN, and
    the row 0, for a query that is not finite or that a row which is not finite is compared with.
    """
    pixels = queries.double()
    candidates = nearest_rows(pixels, rows, k + MARGIN)
    distances = pixels.new_empty(candidates.shape)
    for query, row, distance in zip(pixels, candidates, distances, strict=True):
        distance.copy_((as_pixels(rows[row]) - query).square().mean(1).sqrt())
    order = surfacing(-distances.float()).sort(dim=1, descending=True, stable=True)
    closeness, row = ranked_or_nan(order.values[:, :k], candidates.gather(1, order.indices[:, :k]))
    distance, denominator = -closeness[:, 0].double(), alpha * -closeness.double().mean(1)
    value = torch.where(distance == 0, 0.0, distance / denominator)
    return value.float(), row[:, 0].contiguous(), distance.float(), denominator.float()


def as_pixels(rows: Tensor) -> Tensor:
    """Return rows in float64; bytes as fp32 r/255, so that an image is at distance 0 from its own bytes."""
    return (rows.double() / 255).float().double() if rows.dtype == torch.uint8 else rows.double()


def nearest_rows(queries: Tensor, rows: Tensor, k: int) -> Tensor:
    """Return the k nearest rows [B, k] of float64 queries, in ascending row order; ties to the lowest row."""
    closeness = torch.empty(len(queries), 0, dtype=torch.float64, device=rows.device)
    row = torch.empty(len(queries), 0, dtype=torch.int64, device=rows.device)
    query_square = queries.square().mean(1, keepdim=True)
    for start, block in row_blocks(rows, len(queries), as_pixels):
        cross = (queries @ block.T) * (2 / rows.shape[1])
        mean_square = query_square - cross + block.square().mean(1)
        keys = surfacing(-(mean_square * SELECTION_GRID).round())
        numbers = torch.arange(start, start + len(block), device=rows.device).expand_as(keys)
        closeness, row = torch.cat([closeness, keys], 1), torch.cat([row, numbers], 1)
        keep = lowest_largest(closeness, k)
        closeness, row = closeness.gather(1, keep), row.gather(1, keep)
    return row
