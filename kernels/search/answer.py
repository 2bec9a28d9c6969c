"""What a search answers where it cannot rank rows: NaN, and row 0."""

import torch
from torch import Tensor


def surfacing(score: Tensor) -> Tensor:
    """Return scores, larger for closer rows, with +inf for those not finite: such a row ranks first."""
    return torch.where(score.isfinite(), score, torch.inf)


def ranked_or_nan(score: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return best scores and rows [B, k]; NaN and 0 for a query whose first score is not finite.

    Its own values are not finite, or a row's are (see surfacing): no row is known to be the nearest then.
    """
    failed = ~score[:, :1].isfinite()
    return score.masked_fill(failed, torch.nan), row.masked_fill(failed, 0)


def above_limit(score: Tensor, row: Tensor, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return best scores and rows [B, k]; −inf and −1 for those below their query's limit [B]."""
    if limit is None:
        return score, row
    below = score < limit[:, None]
    return score.masked_fill(below, -torch.inf), row.masked_fill(below, -1)
