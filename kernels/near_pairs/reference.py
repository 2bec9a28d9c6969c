"""near_pairs in plain torch, float64: every pair is measured, and the sketches are not looked at."""

import torch
from torch import Tensor

from ..top1_cosine.contract import Codes
from .contract import NearPairs

BLOCK_VALUES = 1 << 22


def near_pairs(
    rows: Tensor, others: Tensor, sketches: Tensor, codes: Codes, least: float, earlier: bool
) -> NearPairs:
    """Arguments as in amg.kernels.near_pairs."""
    found = []
    step = max(1, BLOCK_VALUES // max(1, len(others), rows.shape[1]))
    for start in range(0, len(rows), step):
        close = closeness(rows[start : start + step], others)
        within = close >= torch.tensor(least, dtype=torch.float32)
        left, right = within.nonzero(as_tuple=True)
        found.append(NearPairs(left + start, right, close[left, right]))
    if not found:
        return NearPairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    left, right, close = (torch.cat(parts) for parts in zip(*found, strict=True))
    chosen = right < left if earlier else torch.ones_like(left, dtype=torch.bool)
    return NearPairs(left[chosen], right[chosen], close[chosen])


def closeness(rows: Tensor, others: Tensor) -> Tensor:
    """fp32 [n, m] of float64: dot products, or minus the RMS distance of bytes on [0, 1]."""
    left, right = rows.double(), others.double()
    if rows.dtype != torch.uint8:
        return (left @ right.T).float()
    squares = left.square().sum(1)[:, None] + right.square().sum(1)[None, :] - 2 * left @ right.T
    return -(squares / (255**2 * rows.shape[1])).sqrt().float()  # exact: the sums are integers below 2^53
