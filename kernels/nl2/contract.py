"""Contract of nl2: result type and argument checks shared by every implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import describe

ROW_DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)


class NL2(NamedTuple):
    """value = distance / denominator [B], nearest row [B] int64, distance ℓ2 to it, denominator α·mean ℓ2."""

    value: Tensor
    row: Tensor
    distance: Tensor
    denominator: Tensor


def check_rows(rows: Tensor) -> None:
    """Raise ValueError unless `rows` is [N, P] uint8 or floating with N, P ≥ 1."""
    if rows.dim() != 2 or rows.dtype not in ROW_DTYPES or 0 in rows.shape:
        expected = "[N >= 1, P >= 1] uint8, float32, float16 or bfloat16"
        raise ValueError(f"`rows` must be {expected}, got {describe(rows)}")


def check_queries(queries: Tensor, rows: Tensor) -> None:
    """Raise ValueError unless `queries` is [B, P] floating on rows' device. No value is looked at."""
    if (
        queries.dim() != 2
        or not queries.is_floating_point()
        or queries.shape[1] != rows.shape[1]
        or queries.device != rows.device
    ):
        expected = f"floating [B, {rows.shape[1]}] on {rows.device} like `rows`"
        raise ValueError(f"`queries` must be {expected}, got {describe(queries)}")


def check_parameters(k: int, alpha: float) -> None:
    """Raise ValueError unless k ≥ 1 and α > 0."""
    if k < 1:
        raise ValueError(f"`k` must be >= 1, got {k}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"`alpha` must be positive and finite, got {alpha}")
