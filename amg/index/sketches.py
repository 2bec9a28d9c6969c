"""Sketches of rows for folding: 64 numbers whose differences are never longer than those of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from amg.kernels import Codes, encode_rows

SKETCH = 64
SKETCH_GRID = 4
SAMPLE = 1024  # rows that decide what the others are projected on
BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class RowSketches:
    """Sketches [n, 64] fp32 (empty of rows that are only compared with) and their int8 codes."""

    sketches: Tensor
    codes: Codes

    def part(self, block: range) -> RowSketches:
        """Those of rows `block`."""
        some = slice(block.start, block.stop)
        return RowSketches(self.sketches[some], Codes(*(part[some] for part in self.codes)))

    def chosen(self, rows: list[int]) -> RowSketches:
        """Those of some rows."""
        return RowSketches(self.sketches[rows], Codes(*(part[rows] for part in self.codes)))


class Sketcher:
    """Makes sketches, and holds the codes of the rows that were kept: 72 bytes a row.

    Unit vectors: their coordinates on the 64 principal axes of the first rows it sees, those that vary most
    first, so that most pairs are told apart by half of them; any axes would be exact. Pixels: orthonormal
    coordinates of a 4x4 grid of cells a channel. image_size: (H, W) of pixels, None of unit vectors.
    """

    def __init__(self, image_size: tuple[int, int] | None):
        self.image_size = image_size
        self.axes: tuple[Tensor, Tensor] | None = None
        self.count, self._codes = 0, Codes(*_room(0))

    def sketch(self, rows: Tensor) -> RowSketches:
        """Rows [n, D] → their sketches."""
        if self.image_size is None and self.axes is None and len(rows):
            self.axes = principal_axes(rows[:SAMPLE].float())
        step = max(1, BLOCK_VALUES // rows.shape[1])
        parts = [self._project(block) for block in rows.split(step) if len(block)]
        sketches = torch.cat(parts) if parts else torch.empty(0, SKETCH)
        return RowSketches(sketches, encode_rows(sketches) if parts else Codes(*_room(0)))

    def _project(self, rows: Tensor) -> Tensor:
        if self.image_size is not None:
            short = block_means(rows, self.image_size)
        else:
            assert self.axes is not None
            centre, basis = self.axes
            short = (rows.float() - centre) @ basis
        return pad(short, (0, SKETCH - short.shape[1]))

    def keep(self, codes: Codes) -> None:
        """Rows that were kept, after those before."""
        added = len(codes.scales)
        if self.count + added > len(self._codes.scales):
            grown = Codes(*_room(max(2 * self.count, self.count + added)))
            for new, old in zip(grown, self._codes, strict=True):
                new[: self.count] = old[: self.count]
            self._codes = grown
        for own, part in zip(self._codes, codes, strict=True):
            own[self.count : self.count + added] = part
        self.count += added

    def known(self) -> RowSketches:
        """Those of the rows that were kept, without the sketches themselves."""
        return RowSketches(torch.empty(0, SKETCH), Codes(*(part[: self.count] for part in self._codes)))


def _room(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(count, SKETCH, dtype=torch.int8), torch.empty(count), torch.empty(count)


def principal_axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and the min(64, D) orthonormal axes [D, d] along which rows [n, D] vary most, in that order;
    where they are too few to tell, axes of a fixed seed follow."""
    width = min(SKETCH, rows.shape[1])
    centre = rows.mean(0)
    along = torch.linalg.svd((rows - centre).double(), full_matrices=False).Vh.T[:, :width]
    generator = torch.Generator().manual_seed(0)
    filling = torch.randn(rows.shape[1], width, generator=generator, dtype=torch.float64)
    return centre, torch.linalg.qr(torch.cat([along, filling], 1)[:, : 2 * width]).Q[:, :width].float()


def block_means(rows: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Pixels [n, 3 H W] → [n, d ≤ 48]: means of a 4x4 grid of cells a channel, in units that make them
    coordinates; what the cells do not cover is dropped."""
    height, width = image_size
    grid = (min(SKETCH_GRID, height), min(SKETCH_GRID, width))
    cell = (height // grid[0], width // grid[1])
    pixels = rows.view(len(rows), 3, height, width)[:, :, : grid[0] * cell[0], : grid[1] * cell[1]]
    means = adaptive_avg_pool2d(pixels.float() / 255 - 0.5, grid)
    return means.flatten(1) * (cell[0] * cell[1]) ** 0.5
