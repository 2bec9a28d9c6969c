"""The answer of all shards out of each one's: what one process that held every row would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amg.index.exact import NL2_ALPHA, NL2_NEIGHBOURS
from amg.index.ray.shard import Ranked
from amg.kernels import NL2


def best_of(parts: Sequence[Ranked], k: int) -> Ranked:
    """The k closest of all parts, or all there are; ties to the lowest place. NaN and 0 where any part could
    not be measured."""
    by_place = torch.cat([part.place for part in parts], 1).sort(dim=1, stable=True)
    closeness, row = (
        torch.cat(column, 1) for column in ([p.closeness for p in parts], [p.row for p in parts])
    )
    failed = closeness.isnan().any(1, keepdim=True)
    closeness, row = closeness.gather(1, by_place.indices), row.gather(1, by_place.indices)
    order = closeness.sort(dim=1, descending=True, stable=True).indices[:, :k]
    found = Ranked(closeness.gather(1, order), by_place.values.gather(1, order), row.gather(1, order))
    return Ranked(
        found.closeness.masked_fill(failed, torch.nan),
        found.place.masked_fill(failed, 0),
        found.row.masked_fill(failed, 0),
    )


def nl2_of(closest: Ranked) -> NL2:
    """nL2 of the closest rows of the whole index, at least NL2_NEIGHBOURS of them where there are as many.

    Its S_k is over all rows: no shard can say what it is."""
    distance = _distance(closest).double()
    nearest, denominator = distance[:, 0], NL2_ALPHA * distance[:, :NL2_NEIGHBOURS].mean(1)
    value = torch.where(nearest == 0, 0.0, nearest / denominator)
    return NL2(value.float(), closest.row[:, 0].contiguous(), nearest.float(), denominator.float())


def pixel_similarities(closest: Ranked) -> Tensor:
    """σ = −ℓ2 / denominator of each of the closest rows, fp32 [B, k]."""
    distance = _distance(closest)
    similarity = -distance / nl2_of(closest).denominator[:, None]
    return torch.where(distance == 0, 0.0, similarity)  # 0 / 0 (k copies) is 0


def _distance(closest: Ranked) -> Tensor:
    return torch.where(closest.closeness == 0, 0.0, -closest.closeness)  # no −0
