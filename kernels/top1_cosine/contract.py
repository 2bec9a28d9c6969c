"""Contract of the cosine search: result types and argument checks shared by every implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import describe

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_K = 1024
MAX_DIMENSION = 65536  # int32 sums of int8 products stay exact below this
GROUP = 16  # rows side by side in panels (kGroup in top1_cosine.h)
LEAST_WIDTH, MOST_PANELS = 32, 16
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


class Panels(NamedTuple):
    """int8 screening codes of rows, by columns, so that a search reads no more columns than it needs.

    codes int8 [P, G, W/4, 16, 4]: code of row 16·g + i in column W·p + 4·w + j at [p, g, w, i, j], zeros
    beyond the last row and column; P·W ≥ D, 16·G ≥ N. scales and errors fp32 [16·G], squares int32 [16·G] =
    Σ code². rotation: None, or float64 [D, D], orthonormal; the codes are then of rows @ rotation, and in
    that basis ‖r − scales·codes‖ ≤ errors.
    """

    codes: Tensor
    scales: Tensor
    errors: Tensor
    squares: Tensor
    rotation: Tensor | None = None


def panel_width(dimension: int) -> int:
    """Columns of a panel: 32, or as many more as leave 16 panels; a multiple of 4."""
    return max(LEAST_WIDTH, 4 * -(-dimension // (4 * MOST_PANELS)))


def panel_shape(count: int, dimension: int) -> tuple[int, ...]:
    """Shape of the codes of N rows of D columns."""
    width = panel_width(dimension)
    groups = -(-count // GROUP)
    groups += (1 - groups) % 8
    return -(-dimension // width), groups, width // 4, GROUP, 4


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


def check_codes(codes: Codes | Panels | None, rows: Tensor) -> None:
    """Raise ValueError unless `codes` belongs to rows of this shape and device; panels are for the CPU."""
    if codes is None:
        return
    count, dimension = rows.shape
    shape: tuple[int, ...] = (count, dimension)
    if isinstance(codes, Panels):
        shape = panel_shape(count, dimension)
        count = GROUP * shape[1]
        if rows.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"`codes` must be Codes of encode_rows on {rows.device}, got Panels: they are for the CPU"
            )
    expected = {
        "codes": (shape, torch.int8),
        "scales": ((count,), torch.float32),
        "errors": ((count,), torch.float32),
        "squares": ((count,), torch.int32),
        "rotation": ((dimension, dimension), torch.float64),
    }
    for name, (wanted, dtype) in expected.items():
        tensor = getattr(codes, name, None)
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype or tensor.device != rows.device:
            spoken = f"{list(wanted)} {dtype} on {rows.device}"
            raise ValueError(f"`codes.{name}` must be {spoken}, got {describe(tensor)}")


def check_limit(limit: Tensor | None, queries: Tensor) -> None:
    """Raise ValueError unless `limit` is fp32 [B] beside the queries. No value is looked at."""
    if limit is None:
        return
    if limit.shape != queries.shape[:1] or limit.dtype != torch.float32 or limit.device != queries.device:
        expected = f"a number or [{len(queries)}] float32 on {queries.device}"
        raise ValueError(f"`limit` must be {expected}, got {describe(limit)}")


def check_k(k: int, count: int, limit: int = MAX_K) -> None:
    """Raise ValueError unless 1 ≤ k ≤ min(limit, N)."""
    if not 1 <= k <= min(limit, count):
        raise ValueError(f"`k` must be in [1, {min(limit, count)}], got {k}")
