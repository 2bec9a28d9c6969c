"""How different the pictures are from one another: the mean distance of their embeddings."""

from __future__ import annotations

import torch


def diversity(vectors: torch.Tensor, block: int = 1024) -> float:
    """Mean Euclidean distance over all pairs of distinct rows; 0 when all pictures are the same.

    vectors: float [N, D], N >= 2 (unit vectors: in [0, 2]); block: rows per product (bounds the memory).
    Raises ValueError for another shape or non-finite values.
    """
    if vectors.ndim != 2 or len(vectors) < 2 or not vectors.is_floating_point():
        raise ValueError(f"`vectors` must be float [N, D], N >= 2, got {vectors.dtype} {list(vectors.shape)}")
    if not torch.isfinite(vectors).all():
        raise ValueError("`vectors` must be finite, got NaN or Inf")
    if block < 1:
        raise ValueError(f"`block` must be at least 1, got {block}")
    rows, total = vectors.detach().double(), 0.0
    for part in rows.split(block):
        total += torch.cdist(part, rows, compute_mode="donot_use_mm_for_euclid_dist").sum().item()
    return total / (len(rows) * (len(rows) - 1))
