"""Contract of the cosine search: result types and argument checks shared by every implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import describe

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_K = 1024
MAX_DIMENSION = 65536  # int32 sums of int8 products stay exact below this
MIN_NORM = 1e-150  # the squares of a float64 query below this lose digits, then vanish (top1_cosine.h)


class Top1(NamedTuple):
    """The nearest row of each query: cosine similarity [B] fp32 and row [B] int64."""

    similarity: Tensor
    row: Tensor


class TopK(NamedTuple):
    """The k nearest rows of each query, best first: similarity [B, k] fp32 and row [B, k] int64."""

    similarity: Tensor
    row: Tensor


class Codes(NamedTuple):
    """int8 screening codes of rows: r ≈ scales·codes with ‖r − scales·codes‖ ≤ errors."""

    codes: Tensor
    scales: Tensor
    errors: Tensor


def check_rows(rows: Tensor) -> None:
    """Raise ValueError unless `rows` is [N, D] in a row dtype with N, D ≥ 1."""
    if rows.dim() != 2 or rows.dtype not in ROW_DTYPES or 0 in rows.shape or rows.shape[1] > MAX_DIMENSION:
        expected = f"[N >= 1, 1 <= D <= {MAX_DIMENSION}] float32, float16 or bfloat16"
        raise ValueError(f"`rows` must be {expected}, got {describe(rows)}")


def check_queries(queries: Tensor, rows: Tensor) -> None:
    """Raise ValueError unless `queries` is [B, D] floating on rows' device. No value is looked at."""
    if (
        queries.dim() != 2
        or not queries.is_floating_point()
        or queries.shape[1] != rows.shape[1]
        or queries.device != rows.device
    ):
        expected = f"floating [B, {rows.shape[1]}] on {rows.device} like `rows`"
        raise ValueError(f"`queries` must be {expected}, got {describe(queries)}")


def check_codes(codes: Codes | None, rows: Tensor) -> None:
    """Raise ValueError unless `codes` belongs to rows of this shape and device."""
    if codes is None:
        return
    expected = {
        "codes": (tuple(rows.shape), torch.int8),
        "scales": ((rows.shape[0],), torch.float32),
        "errors": ((rows.shape[0],), torch.float32),
    }
    for name, (shape, dtype) in expected.items():
        tensor = getattr(codes, name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != rows.device:
            wanted = f"{list(shape)} {dtype} on {rows.device}"
            raise ValueError(f"`codes.{name}` must be {wanted}, got {describe(tensor)}")


def check_k(k: int, count: int, limit: int = MAX_K) -> None:
    """Raise ValueError unless 1 ≤ k ≤ min(limit, N)."""
    if not 1 <= k <= min(limit, count):
        raise ValueError(f"`k` must be in [1, {min(limit, count)}], got {k}")
