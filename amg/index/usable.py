"""Rows that can be measured, told from the others without reading a value on the host.

One sample's NaN must fail that sample alone: the kernels answer what is not finite with NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def finite_rows(values: Tensor) -> Tensor:
    """[B] bool: the rows of `values` [B, ...] without NaN and infinity in float32."""
    return values.float().isfinite().flatten(1).all(1)


def where_rows(usable: Tensor, values: Tensor, otherwise: float) -> Tensor:
    """`values` [B, ...], `otherwise` throughout the rows that are not `usable` [B] bool."""
    return torch.where(usable.view(-1, *[1] * (values.ndim - 1)), values, otherwise)


def nan_unless_finite(values: Tensor) -> Tensor:
    """`values` [B, ...], NaN throughout every row that has a NaN or an infinity."""
    return where_rows(finite_rows(values), values, math.nan)


def searchable(vectors: Tensor, metric: str) -> Tensor:
    """Queries [B, D] as searchers take them. cosine: unit fp32, see `directions`; nl2: as they are."""
    return directions(vectors) if metric == "cosine" else vectors


def directions(vectors: Tensor) -> Tensor:
    """float [B, D] → unit fp32 [B, D], differentiable; NaN in rows of zeros and rows that are not finite."""
    vectors = vectors.float()
    lengths = vectors.norm(dim=1)
    return where_rows((lengths > 0) & lengths.isfinite(), vectors / lengths[:, None], math.nan)


def require_directions(units: Tensor, origin: str) -> Tensor:
    """What `directions` gave. Raises ValueError for zero or non-finite vectors, naming them."""
    missing = units.isnan().any(1)
    if bool(missing.any()):
        bad = missing.nonzero().flatten().tolist()
        raise ValueError(f"{origin} zero or non-finite vectors at {bad[:8]} of {len(units)}")
    return units


def require_searchable(vectors: Tensor, metric: str) -> Tensor:
    """The queries of `searchable`. Raises ValueError naming the vectors that none can be made of."""
    if metric == "cosine":
        return require_directions(directions(vectors), "`queries` hold")
    finite = finite_rows(vectors)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"`queries` must be finite, got NaN or infinity at {bad[:8]} of {len(vectors)}")
    return vectors
