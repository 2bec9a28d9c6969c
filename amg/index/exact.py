"""Exact search over the stored rows, by amg.kernels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

import amg.kernels
from amg.index.store import Manifest
from amg.index.usable import where_rows
from amg.kernels import NL2, Codes, Panels

NL2_NEIGHBOURS = 50
NL2_ALPHA = 0.5
BLOCK_VALUES = 1 << 22


class Nearest(NamedTuple):
    """Closest row of each query: similarity [B] fp32, row [B] int64, extras the NL2 tuple or None.

    NaN and row 0 for a query that is not finite, or zero under cosine.
    """

    similarity: torch.Tensor
    row: torch.Tensor
    extras: NL2 | None


class Searcher(Protocol):
    """nearest(queries [B, D]); top(queries [B, D], k) → similarity [B, k], row [B, k], best first."""

    def nearest(self, queries: torch.Tensor) -> Nearest: ...
    def top(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]: ...


class ExactCosine:
    """Exact search in unit rows [N, D]; ties to the lowest row."""

    def __init__(self, rows: torch.Tensor, codes: Codes | Panels | None = None):
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

    def nearest(self, queries: torch.Tensor) -> Nearest:
        found = amg.kernels.nl2(queries, self.rows, k=NL2_NEIGHBOURS, alpha=NL2_ALPHA)
        return Nearest(-found.value, found.row, found)

    def top(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """σ of the k closest rows: −ℓ2 of each over the query's one denominator."""
        denominator = amg.kernels.nl2(queries, self.rows, k=NL2_NEIGHBOURS, alpha=NL2_ALPHA).denominator
        distance, row = closest_pixels(queries.double(), self.rows, k)
        similarity = -distance / denominator[:, None]
        similarity = torch.where(distance == 0, 0.0, similarity)  # 0 / 0 (k copies) is 0
        return similarity, where_rows(~denominator.isnan(), row, 0)


def as_pixels(rows: torch.Tensor) -> torch.Tensor:
    """uint8 → float64 of the fp32 r / 255, as in amg.kernels.nl2: an image is 0 from its bytes."""
    return (rows.float() / 255).double()


def closest_pixels(queries: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest ℓ2 = √mean((q − r)²), ascending, fp32, and their rows: [B, k] each.

    Chosen by expanded squares in float64, measured by direct difference; equal ones in the order of rows.
    """
    closeness = queries.new_empty(len(queries), 0)
    row = torch.empty(len(queries), 0, dtype=torch.int64, device=rows.device)
    step = max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = as_pixels(rows[start : start + step])
        some = 2 * queries @ block.T - block.square().sum(1)
        numbers = torch.arange(start, start + len(block), device=rows.device).expand_as(some)
        closeness, row = torch.cat([closeness, some], 1), torch.cat([row, numbers], 1)
        keep = closeness.topk(min(k, row.shape[1]), dim=1).indices
        closeness, row = closeness.gather(1, keep), row.gather(1, keep)
    row = row.sort(dim=1).values
    measured = [
        (as_pixels(rows[chosen]) - query).square().mean(1).sqrt()
        for query, chosen in zip(queries, row, strict=True)
    ]
    distance, order = torch.stack(measured).float().sort(dim=1, stable=True)
    return distance, row.gather(1, order)


def make_searcher(spec: str, rows: torch.Tensor, metric: str, codes: Codes | Panels | None) -> Searcher:
    """The searcher that `spec` names, see `Index.open`."""
    if spec == "exact":
        return ExactCosine(rows, codes) if metric == "cosine" else ExactPixels(rows)
    from amg.index.faiss import FaissSearcher

    return FaissSearcher(rows, metric, spec)


def warn_of_few_rows(directory: Path, manifest: Manifest) -> None:
    """Say to the caller's caller that nL2 over so few rows is another measure."""
    if manifest.metric == "nl2" and manifest.count < NL2_NEIGHBOURS:
        warnings.warn(
            f"{directory} has {manifest.count} rows, nL2 is over the {NL2_NEIGHBOURS} nearest: "
            "with fewer, its usual threshold of 1.4 does not mean the same",
            stacklevel=3,
        )
