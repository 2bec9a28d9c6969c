"""Lazy exact search: rows kept from a sample's last full search answer for its next, slightly turned queries.

For a query q, a row r as stored and s(q, r) = q·r/‖q‖, let R be at least the norm of every row. Write the
next query's direction as q'/‖q'‖ = cos δ·q/‖q‖ + sin δ·p with a unit p ⊥ q. As p·r ≤ √(‖r‖² − s²),

    s(q', r) ≤ s·cos δ + √(R² − s²)·sin δ = R·cos(arccos(s/R) − δ),

which grows with s up to s = R·cos δ; beyond, R itself is the bound. So where no row outside the K kept was
above s_K, none of them is above u = R·cos(max(0, arccos(s_K/R) − δ)) now. Rows need not be unit vectors: only
R enters, and it is the largest norm measured in the rows, not the 1 they were before fp16 or fp32 storage.
u is the largest value over a set that grows with s_K, R and δ, so upper bounds of the three give one of u.

Rounding. The kernel's similarity is a float64 dot product (error < D·2⁻⁵²·R) rounded to fp32 (relative error
2⁻²⁴), so the real one is within τ = R·(2⁻²² + (D + 64)·2⁻⁵⁰) + 2⁻¹²⁶ of it: s_K + τ replaces s_K. R and δ, in
float64, are raised by more than they may have lost: R by (D + 64)·2⁻⁵⁰ of itself and δ by (D + 64)·2⁻⁵⁰;
δ = 2·atan2(‖a − b‖, ‖a + b‖) and arccos(s/R) = atan2(√((R − s)(R + s)), s) lose no digits at any angle. An
outside row's fp32 similarity is then at most u + τ: τ also holds the rounding of u and of that similarity.
The best of the kept rows, scored again by the same kernel, is the exact top-1 if it is *above* u + τ:
strictly, as an outside row of equal similarity might have the lower number. Where a caller asks only what
lies above a limit and neither the best kept row nor u + τ does, the gate is closed for certain, whichever row
is nearest. Otherwise the whole index is searched. With NaN no comparison holds, and the full search raises.

That a row scores the same wherever it lies is a property of the compiled kernels; the torch reference, whose
sums follow the shape of its blocks, may differ by one fp32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import amg.kernels
from amg.index.exact import ExactCosine, Nearest

KEPT_ROWS = 256


@dataclass
class Kept:
    """What one sample keeps of its last full search; `full`, `skipped` and `closed` count its searches: made,
    answered by the kept rows, and not answered because nothing can lie above the limit.

    `direction` [D] float64, the unit query; `row` [K] ascending; `least` is the K-th similarity, unclamped.
    """

    searcher: ExactCosine | None = None
    direction: Tensor = field(default_factory=lambda: torch.empty(0))
    row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    least: float = math.inf
    full: int = 0
    skipped: int = 0
    closed: int = 0


def nearest_lazily(
    searcher: ExactCosine,
    queries: Tensor,
    kept: Sequence[Kept],
    count: int = KEPT_ROWS,
    limit: float = -math.inf,
) -> Nearest:
    """`searcher.nearest(queries)` [B, D], one `Kept` per query; only what they cannot prove is searched for.

    Where no row can be above `limit`, the answer is the best kept row, at most that. Full searches go as one
    batch and leave their `count` nearest rows in `kept`. ValueError as there.
    """
    directions = torch.nn.functional.normalize(queries.double())
    similarity = torch.empty(len(queries), dtype=torch.float32, device=queries.device)
    row = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    unproved = []
    for at, own in enumerate(kept):
        found = _proved(searcher, queries[at : at + 1], directions[at], own, limit)
        if found is None:
            unproved.append(at)
        else:
            similarity[at], row[at] = found
    if unproved:
        searched = amg.kernels.topk_cosine(
            queries[unproved], searcher.rows, min(count, len(searcher.rows)), codes=searcher.codes
        )
        similarity[unproved], row[unproved] = searched.similarity[:, 0], searched.row[:, 0]
        for at, values, rows in zip(unproved, searched.similarity, searched.row, strict=True):
            own = kept[at]
            own.searcher, own.direction, own.least = searcher, directions[at].clone(), float(values[-1])
            own.row = rows.sort().values
            own.full += 1
    return Nearest(similarity.clamp(-1, 1), row, None)


def outside_bound(least: float, norm: float, before: Tensor, now: Tensor) -> float:
    """u + τ of the module's docstring: no row that was not above `least` before is above it now.

    `norm`: the largest of the rows' norms in float64; `before`, `now`: unit queries [D] float64.
    """
    lost = (len(now) + 64) * 2.0**-50
    norm *= 1 + lost
    slack = norm * (2.0**-22 + lost) + 2.0**-126
    angle = 2 * math.atan2(float((before - now).norm()), float((before + now).norm())) + lost
    similarity = min(max(least + slack, -norm), norm)
    opening = math.atan2(math.sqrt((norm - similarity) * (norm + similarity)), similarity)
    return norm * math.cos(max(0.0, opening - angle)) + slack


def _proved(
    searcher: ExactCosine, query: Tensor, direction: Tensor, own: Kept, limit: float
) -> tuple[Tensor, Tensor] | None:
    """Similarity and row of the exact top-1 out of the kept rows, or of the best of them where no row is
    above `limit`; None where neither is proved."""
    if own.searcher is not searcher:
        return None
    best = amg.kernels.top1_cosine(query, searcher.rows[own.row])
    everything = len(own.row) == len(searcher.rows)
    if not everything:
        bound = outside_bound(own.least, searcher.largest_norm, own.direction, direction)
        nearest = float(best.similarity)
        if not nearest > bound:
            if not max(nearest, bound) <= limit:
                return None
            own.closed += 1
            return best.similarity[0], own.row[best.row[0]]
    own.skipped += 1
    return best.similarity[0], own.row[best.row[0]]
