"""The scales of anti-memorization guidance, and the steps that are not in its kernel.

Source: Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models", CVPR 2024 (arXiv 2404.00922), section 4;
the constants of `released_*` are those of the authors' code. All tensors are [B, C, H, W], all per-sample
values [B].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def classifier_free(eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """eps_u + s0·(eps_c - eps_u), in the very operations of diffusers' pipelines, so the result is theirs bit
    for bit."""
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


class Scales(NamedTuple):
    """Strengths of despecification (s1), de-duplication (s2) and dissimilarity (s3) of one sample."""

    s1: float
    s2: float
    s3: float


def scales(similarity: float, guidance_scale: float, c1: float, c2: float, c3: float) -> Scales:
    """s1 = max(min(c1·sigma, s0 - 1), 0); s2 = max(min(c2·sigma, s0 - s1 - 1), 0); s3 = c3. Raises on a NaN
    sigma."""
    _require_number("similarity", similarity)
    room = max(guidance_scale - 1, 0.0)
    s1 = max(min(c1 * similarity, room), 0.0)
    return Scales(s1, max(min(c2 * similarity, room - s1), 0.0), c3)


def released_scales(
    similarity: float, guidance_scale: float, c1: float, c2: float, c3: float, t: float
) -> Scales:
    """The authors' code: s1 = clip(c1·sigma, 0, s0 - 1), s2 = clip((s0 - 1 - s1)·c2·sigma, 0, s0 - 1 - s1)
    and s3 = c3·(sigma - 0.3)·exp((1000 - t) / 170), c1 = 13, c2 = 1/0.3, c3 = 100; `t` on the 0-1000
    scale."""
    _require_number("similarity", similarity)
    room = max(guidance_scale - 1, 0.0)
    s1 = max(min(c1 * similarity, room), 0.0)
    s2 = max(min((room - s1) * c2 * similarity, room - s1), 0.0)
    return Scales(s1, s2, c3 * (similarity - 0.3) * released_rise(t))


def released_rise(t: float) -> float:
    """exp((1000 - t) / 170), by which the authors' s3 grows along the trajectory."""
    return math.exp((1000 - t) / 170)


def _require_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"`{name}` must be finite, got {value}")


def newton_shift(
    x0_grad: Tensor, similarity: Tensor, threshold: float | Tensor, limit: float = 0.5, scale: float = 1.0
) -> Tensor:
    """One Newton step on sigma along its gradient, -(sigma - lambda)·g / |g|², its length clipped.

    `threshold` is lambda, one or [B]. The root mean square of the shift is at most `limit`·`scale`; `scale`
    is the size of x0_hat's own values. Looks at no value: NaN where sigma or its gradient is.
    """
    size = x0_grad[0].numel()
    norm = x0_grad.flatten(1).norm(dim=1).clamp(min=1e-12)
    length = ((similarity - threshold).clamp(min=0) / norm).clamp(max=limit * scale * math.sqrt(size))
    return -per_sample(length / norm, x0_grad) * x0_grad


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise FloatingPointError, naming the rows, if `tensor` has a NaN or an infinity."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        rows = (~finite.flatten(1).all(1) if tensor.ndim > 1 else ~finite).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"`{name}` must be finite, got NaN or infinity in rows {rows} of {list(tensor.shape)}"
        )


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] in the dtype of `like`, for broadcasting."""
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def rescale(output: Tensor, output_cond: Tensor, amount: float) -> Tensor:
    """Lin et al. 2023 (arXiv 2305.08891), section 3.4: blend towards the conditional output's standard
    deviation."""
    axes = tuple(range(1, output.ndim))
    matched = output * (output_cond.std(axes, keepdim=True) / output.std(axes, keepdim=True))
    return amount * matched + (1 - amount) * output
