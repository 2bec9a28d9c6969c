"""The int8 codes that exact search screens with: in panels of columns, in a basis chosen for these rows."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

import amg.kernels
from amg.index.store import (
    CODE_ERRORS,
    CODE_ROTATION,
    CODE_SCALES,
    CODE_SQUARES,
    CODES,
    Manifest,
    map_file,
)
from amg.kernels import Codes, Panels
from amg.kernels.top1_cosine.contract import GROUP, panel_shape, panel_width

BLOCK_VALUES = 1 << 22  # of rows that are encoded together
ROWS_A_COLUMN = 100  # fewer rows are not worth turning every query for
SAMPLE_A_COLUMN = 32  # rows that decide on the basis
TELLING = (
    0.4  # share of the rows' squares that the first quarter of the columns must hold (of even ones: 0.25)
)


def rotation_for(rows: Tensor) -> Tensor | None:
    """The basis [D, D] float64, orthonormal, in which rows [N, D] tell most in the fewest columns; None where
    it would save nothing: few rows, or a flat spectrum.

    Principal axes, without centring, of every other row of a sample; the rows between decide. The axes of a
    panel are mixed by a rotation of a fixed seed: what a panel holds stays, and no column is much larger than
    the others, which would make the codes of all of them coarse.
    """
    count, dimension = rows.shape
    if count < ROWS_A_COLUMN * dimension:
        return None
    sample = rows[:: -(-count // (SAMPLE_A_COLUMN * dimension))].double()
    fitted, held_out = sample[::2], sample[1::2]
    axes = torch.linalg.eigh(fitted.T @ fitted).eigenvectors.flip(1)
    turned = held_out @ axes
    share = turned[:, : dimension // 4].square().sum() / turned.square().sum()
    if not share >= TELLING:
        return None
    generator = torch.Generator().manual_seed(0)
    mixed = [
        panel @ torch.linalg.qr(torch.randn(len(panel.T), len(panel.T), generator=generator).double()).Q
        for panel in axes.split(panel_width(dimension), dim=1)
    ]
    return torch.linalg.qr(torch.cat(mixed, 1)).Q.contiguous()


def write_codes(directory: Path, rows: Tensor) -> list[str]:
    """Encode rows [N, D] into files of `directory`, a block of rows at a time → their names."""
    rotation = rotation_for(rows)
    panels, groups, *inner = panel_shape(*rows.shape)
    group_bytes = torch.Size(inner).numel()
    names = [CODES, CODE_SCALES, CODE_ERRORS, CODE_SQUARES]
    step = GROUP * max(1, BLOCK_VALUES // (GROUP * rows.shape[1]))
    with (
        open(directory / CODES, "wb") as codes,
        open(directory / CODE_SCALES, "wb") as scales,
        open(directory / CODE_ERRORS, "wb") as errors,
        open(directory / CODE_SQUARES, "wb") as squares,
    ):
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            made = amg.kernels.encode_panels(block, rotation=rotation)
            filled = -(-len(block) // GROUP)
            for panel, content in enumerate(made.codes):
                codes.seek((panel * groups + start // GROUP) * group_bytes)
                codes.write(content[:filled].contiguous().numpy().tobytes())
            for file, part in zip((scales, errors, squares), made[1:4], strict=True):
                file.write(part[: filled * GROUP].numpy().tobytes())
        codes.truncate(panels * groups * group_bytes)
        for file in (scales, errors, squares):
            file.truncate(4 * GROUP * groups)
        for file in (codes, scales, errors, squares):
            file.flush()
            os.fsync(file.fileno())
    if rotation is None:
        return names
    with open(directory / CODE_ROTATION, "wb") as file:
        file.write(rotation.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    return [*names, CODE_ROTATION]


def map_codes(directory: Path, manifest: Manifest) -> Codes | Panels | None:
    """The int8 codes of an index on disk, None where it has none; before version 3 a row after the other."""
    if not manifest.has_codes:
        return None
    count, dimension = manifest.count, manifest.dimension
    if not manifest.in_panels:
        return Codes(
            map_file(directory / CODES, torch.int8, count, dimension),
            map_file(directory / CODE_SCALES, torch.float32, count),
            map_file(directory / CODE_ERRORS, torch.float32, count),
        )
    shape = panel_shape(count, dimension)
    padded, rotation = GROUP * shape[1], None
    if CODE_ROTATION in manifest.files:
        rotation = map_file(directory / CODE_ROTATION, torch.float64, dimension, dimension)
    return Panels(
        map_file(directory / CODES, torch.int8, *shape),
        map_file(directory / CODE_SCALES, torch.float32, padded),
        map_file(directory / CODE_ERRORS, torch.float32, padded),
        map_file(directory / CODE_SQUARES, torch.int32, padded),
        rotation,
    )


def codes_on(device: torch.device, codes: Codes | Panels, rows: Tensor) -> Codes:
    """The codes of the same rows, which are on this device already: panels are for the CPU."""
    if isinstance(codes, Panels):
        return amg.kernels.encode_rows(rows)
    return Codes(*(part.to(device) for part in codes))
