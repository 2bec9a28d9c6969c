"""Contract of near_pairs: result type and argument checks shared by every implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import describe
from ..top1_cosine.contract import Codes

SKETCH_LENGTH = 64
ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
UNIT_SLACK = 4e-3  # of ‖a‖² + ‖b‖² over 2: unit rows as fp16 stores them
BYTE_SLACK = 1e-5  # of a mean square distance on [0, 1]


class NearPairs(NamedTuple):
    """Pairs by left, then right: rows' number, others' number (int64 [p]) and closeness (fp32 [p])."""

    left: Tensor
    right: Tensor
    closeness: Tensor


def reach(dimension: int, dtype: torch.dtype, least: float) -> float:
    """The largest ‖a − b‖ of two rows whose closeness is at least `least`; of bytes on [0, 1]."""
    if dtype == torch.uint8:
        return (dimension * (least**2 + BYTE_SLACK)) ** 0.5
    return max(2 - 2 * least + UNIT_SLACK, 0.0) ** 0.5


def check_rows(rows: Tensor, name: str) -> None:
    """Raise ValueError unless a tensor is [n, D ≥ 1] of a row dtype on the CPU."""
    if rows.dim() != 2 or rows.shape[1] < 1 or rows.dtype not in ROW_DTYPES or not rows.is_cpu:
        expected = "[n, D >= 1] float32, float16, bfloat16 or uint8 on cpu"
        raise ValueError(f"`{name}` must be {expected}, got {describe(rows)}")


def check_pairs(rows: Tensor, others: Tensor, sketches: Tensor, codes: Codes) -> None:
    """Raise ValueError unless the four belong to one another."""
    check_rows(rows, "rows")
    if others.shape[1:] != rows.shape[1:] or others.dtype != rows.dtype or not others.is_cpu:
        raise ValueError(f"`others` must be [m, {rows.shape[1]}] like `rows`, got {describe(others)}")
    expected = {
        "sketches": (sketches, (len(rows), SKETCH_LENGTH), torch.float32),
        "codes.codes": (codes.codes, (len(others), SKETCH_LENGTH), torch.int8),
        "codes.scales": (codes.scales, (len(others),), torch.float32),
        "codes.errors": (codes.errors, (len(others),), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_cpu:
            raise ValueError(f"`{name}` must be {list(shape)} {dtype} on cpu, got {describe(tensor)}")
