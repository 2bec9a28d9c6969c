"""Exact search over the stored rows: cosine through amg.kernels, pixels through a screen that is proved."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

import amg.kernels
from amg.kernels import NL2, Codes

NL2_NEIGHBOURS = 50
NL2_ALPHA = 0.5
BLOCK_VALUES = 1 << 24
CHUNK_ROWS = 1 << 16
CACHE_VALUES = 1 << 19
FP32_UNIT = 2.0**-24


class Nearest(NamedTuple):
    """Closest row of each query: similarity [B] fp32, row [B] int64, extras the NL2 tuple or None."""

    similarity: torch.Tensor
    row: torch.Tensor
    extras: NL2 | None


class Searcher(Protocol):
    """nearest(queries [B, D]); top(queries [B, D], k) → similarity [B, k], row [B, k], best first."""

    def nearest(self, queries: torch.Tensor) -> Nearest: ...
    def top(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]: ...


class ExactCosine:
    """Exact search in unit rows [N, D] by amg.kernels; ties to the lowest row."""

    def __init__(self, rows: torch.Tensor, codes: Codes | None = None):
        self.rows, self.codes = rows, codes

    def nearest(self, queries: torch.Tensor) -> Nearest:
        found = amg.kernels.top1_cosine(queries, self.rows, codes=self.codes)
        return Nearest(found.similarity.clamp(-1, 1), found.row, None)

    def top(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = amg.kernels.topk_cosine(queries, self.rows, k, codes=self.codes)
        return found.similarity.clamp(-1, 1), found.row


class ExactPixels:
    """Exact nL2 search in uint8 rows [N, P], queries [B, P] in [0, 1]; ties to the lowest row."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows
        self._squares: torch.Tensor | None = None

    def nearest(self, queries: torch.Tensor) -> Nearest:
        if self.rows.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest":
            found = screened_nl2(queries, self.rows, self._row_squares())
        else:
            found = amg.kernels.nl2(queries, self.rows, k=NL2_NEIGHBOURS, alpha=NL2_ALPHA)
        return Nearest(-found.value, found.row, found)

    def top(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        check_pixels(queries, self.rows)
        row = closest_pixels(queries.double(), self.rows, self._row_squares(), k)[1].sort(dim=1).values
        asked = torch.arange(len(row), device=row.device).repeat_interleave(row.shape[1])
        exact = direct_mean_square(queries, self.rows, asked, row.flatten()).view_as(row)
        distance, order = exact.sqrt().float().sort(dim=1, stable=True)
        return -nl2_value(distance, self.nearest(queries).extras), row.gather(1, order)

    def _row_squares(self) -> torch.Tensor:
        """mean(r²) of each row in [0, 1] units, [N] float64; one pass over the rows at the first search."""
        if self._squares is None:
            step = max(1, BLOCK_VALUES // self.rows.shape[1])
            parts = [block.float().square_().sum(1, dtype=torch.float64) for block in self.rows.split(step)]
            self._squares = torch.cat(parts) / (255**2 * self.rows.shape[1])
        return self._squares


def closest_pixels(
    queries: torch.Tensor, rows: torch.Tensor, row_squares: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The min(k, N) smallest mean squares of q − r, ascending, and their rows: [B, k] each."""
    best = queries.new_empty(len(queries), 0)
    row = torch.empty(len(queries), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        mean_square = mean_squares(queries, rows[chunk], row_squares[chunk])
        some = mean_square.topk(min(k, mean_square.shape[1]), dim=1, largest=False)
        best, row = torch.cat([best, some.values], 1), torch.cat([row, some.indices + start], 1)
        if start:
            keep = best.topk(min(k, best.shape[1]), dim=1, largest=False)
            best, row = keep.values, row.gather(1, keep.indices)
    return best, row


def mean_squares(queries: torch.Tensor, rows: torch.Tensor, row_squares: torch.Tensor) -> torch.Tensor:
    """‖q‖² − 2⟨q, r⟩ + ‖r‖² over P for every pair → [B, n]; rows widened in blocks that stay in cache."""
    scaled = (queries * (-2 / (255 * rows.shape[1]))).T
    found = queries.new_empty(len(rows), len(queries))
    step = max(1, CACHE_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step].to(queries.dtype)
        torch.mm(block, scaled, out=found[start : start + step])
    found += row_squares[:, None]
    return found.T.contiguous().add_(queries.square().mean(1, keepdim=True))


def direct_mean_square(
    queries: torch.Tensor, rows: torch.Tensor, query: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """mean((q − r)²) by direct difference in float64 of the pairs query [p], row [p] → [p]."""
    step = max(1, BLOCK_VALUES // (8 * rows.shape[1]))
    parts = [
        (rows[chosen].double().div_(255).sub_(queries[asked])).square_().mean(1)
        for asked, chosen in zip(query.split(step), row.split(step), strict=True)
    ]
    return torch.cat(parts)


def screened_nl2(queries: torch.Tensor, rows: torch.Tensor, row_squares: torch.Tensor) -> NL2:
    """amg.kernels.nl2 with k = 50, α = 0.5 on CPU, mostly in fp32: the same nearest row, proved per query.

    An fp32 sum of P products errs by at most P·u·‖q‖·‖r‖ (u = 2⁻²⁴), so the nearest row is among those
    screened within twice that of the best; these are measured in float64. A query with more of them than
    were kept goes through amg.kernels.nl2. The denominator's other distances stay fp32 (1e-6 relative).
    """
    check_pixels(queries, rows)
    queries, k = queries.float(), min(NL2_NEIGHBOURS, len(rows))
    with torch.autocast("cpu", enabled=False):
        mean_square, row = closest_pixels(queries, rows, row_squares, k + 1)
    error = 2 * (rows.shape[1] + 8) * FP32_UNIT * (queries.square().mean(1) + row_squares.max()).double()
    mean_square = mean_square.double()
    close = mean_square <= (mean_square[:, 0] + 2 * error)[:, None]
    query, column = close.nonzero(as_tuple=True)
    mean_square[query, column] = direct_mean_square(queries, rows, query, row[query, column])
    distances = mean_square.clamp_(min=0).sqrt_()
    distance, chosen = lowest_of_least(distances.float().masked_fill(~close, torch.inf), row)
    denominator = NL2_ALPHA * distances[:, :k].mean(1)
    found = NL2(_ratio(distance, denominator), chosen, distance, denominator.float())
    unproved = close[:, -1] & (len(rows) > k)
    if bool(unproved.any()):
        found = _replace(found, unproved, amg.kernels.nl2(queries[unproved], rows))
    return found


def lowest_of_least(distances: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least distance [B] of [B, m] and its row [B]; the lowest row where several are least."""
    least = distances.amin(1)
    return least, row.masked_fill(distances > least[:, None], torch.iinfo(torch.int64).max).amin(1)


def nl2_value(distance: torch.Tensor, found: NL2 | None) -> torch.Tensor:
    """nL2 of further rows at distance [B, k] under the denominators of a search."""
    assert found is not None
    return _ratio(distance, found.denominator[:, None])


def _ratio(distance: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(distance == 0, 0.0, distance / denominator).float()  # 0 / 0 (k copies) is 0


def _replace(found: NL2, where: torch.Tensor, other: NL2) -> NL2:
    for ours, theirs in zip(found, other, strict=True):
        ours[where] = theirs
    return found


def check_pixels(queries: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise ValueError unless queries are floating [B, P] on the rows' device and finite."""
    if (
        queries.shape[1:] != rows.shape[1:]
        or not queries.is_floating_point()
        or queries.device != rows.device
    ):
        raise ValueError(
            f"`queries` must be floating [B, {rows.shape[1]}] on {rows.device}, "
            f"got {list(queries.shape)} {queries.dtype} on {queries.device}"
        )
    if not bool(queries.isfinite().all()):
        raise ValueError("`queries` must be finite, got NaN or infinity")
