"""Codes in panels: made a block of rows at a time, in a basis in which few columns tell most."""

import torch
from torch import Tensor

from ..dispatch import choose
from .contract import GROUP, Panels, check_rows, panel_shape
from .reference import round_up

BLOCK_VALUES = 1 << 22
ORTHONORMAL = 1e-9  # the most by which rotationᵀ·rotation may differ from 1
TURNING = 1.3e-7  # what turning a row in float64 and rounding it to fp32 loses, of its norm


def check_rotation(rotation: Tensor, rows: Tensor) -> None:
    """Raise ValueError unless `rotation` is float64 [D, D] with orthonormal columns."""
    dimension = rows.shape[1]
    if rotation.shape != (dimension, dimension) or rotation.dtype != torch.float64:
        got = f"{list(rotation.shape)} {rotation.dtype}"
        raise ValueError(f"`rotation` must be [{dimension}, {dimension}] float64, got {got}")
    defect = (rotation.T @ rotation - torch.eye(dimension, dtype=torch.float64)).norm().item()
    if not defect <= ORTHONORMAL:
        raise ValueError(f"`rotation` must be orthonormal to {ORTHONORMAL:g}, is off by {defect:g}")


def empty_panels(count: int, dimension: int, rotation: Tensor | None) -> Panels:
    """Room for the codes of N rows: what no row fills is zero."""
    shape = panel_shape(count, dimension)
    padded = GROUP * shape[1]
    scales, errors = torch.zeros(padded), torch.zeros(padded)
    squares = torch.zeros(padded, dtype=torch.int32)
    return Panels(torch.zeros(shape, dtype=torch.int8), scales, errors, squares, rotation)


def encode_panels(rows: Tensor, rotation: Tensor | None, impl: str | None = None) -> Panels:
    """Return the codes of rows [N, D] in panels; arguments as in amg.kernels.encode_panels."""
    check_rows(rows)
    if rotation is not None:
        check_rotation(rotation, rows)
    count, dimension = rows.shape
    made = empty_panels(count, dimension, rotation)
    step = GROUP * max(1, BLOCK_VALUES // (GROUP * dimension))
    for start in range(0, count, step):
        fill_panels(made, start, rows[start : start + step], impl)
    return made


def fill_panels(panels: Panels, start: int, rows: Tensor, impl: str | None = None) -> None:
    """Encode rows [n, D] as those from number `start`, a multiple of 16, on."""
    stop = start + len(rows)
    turned, lost = rows, torch.zeros(())
    if panels.rotation is not None:
        exact = rows.double()
        turned, lost = (exact @ panels.rotation).float(), TURNING * exact.norm(dim=1)
    codes, scales, errors = choose("encode_rows", turned, impl)(turned)
    panels.scales[start:stop] = scales
    panels.errors[start:stop] = round_up(errors.double() + lost)
    panels.squares[start:stop] = codes.int().square().sum(1, dtype=torch.int32)
    count, _, words, _, _ = panels.codes.shape
    groups = -(-len(rows) // GROUP)
    padded = torch.zeros(groups * GROUP, count * words * 4, dtype=torch.int8)
    padded[: len(rows), : codes.shape[1]] = codes
    by_columns = padded.view(groups, GROUP, count, words, 4).permute(2, 0, 3, 1, 4)
    panels.codes[:, start // GROUP : start // GROUP + groups] = by_columns
