"""Judges that guidance never saw: recolouring a copy satisfies a metric that guides, not these."""

from __future__ import annotations

import torch

MEMORIZED_CORRELATION = 0.9  # a picture whose luminance correlates above this with a training image is a copy
REC601 = (0.299, 0.587, 0.114)
TIE = 1e-6  # correlations nearer than this are equal: float32 products differ in the last bits by position
FLAT = 1e-4  # luminance deviation (in [0, 1] units) under which a picture has no structure to compare


def standardized_luminance(images: torch.Tensor) -> torch.Tensor:
    """Rec. 601 luma with zero mean and unit deviation per image, flattened.

    images: float [B, 3, H, W] in [0, 1]. Returns float32 [B, H*W]; a flat image (deviation < 1e-4) gives
    zeros, so that it correlates with nothing.
    """
    weights = torch.tensor(REC601, dtype=torch.float32, device=images.device)
    luminance = torch.einsum("bchw,c->bhw", images.to(torch.float32), weights).flatten(1)
    centred = luminance - luminance.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation < FLAT, torch.zeros_like(centred), centred / deviation.clamp_min(FLAT))


def luminance_correlation(
    images: torch.Tensor, references: torch.Tensor, flips: bool = True, block: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest Pearson correlation of standardised luminance with any reference: memorised if > 0.9.

    images: float [B, 3, H, W] in [0, 1]; references: float [N, 3, H, W] in [0, 1]; flips: compare with the
    horizontally mirrored references too; block: references per matrix product (bounds the memory).
    Returns (value float32 [B] in [-1, 1], row int64 [B], ties within 1e-6 to the lowest row).
    Raises ValueError when the shapes do not match or a value is not finite.
    """
    _check(images, references, block)
    queries = standardized_luminance(images)
    value = torch.full((len(images),), -torch.inf, dtype=torch.float32, device=images.device)
    row = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for start in range(0, len(references), block):
        part = references[start : start + block].to(images.device)
        correlation = queries @ standardized_luminance(part).T / queries.shape[1]
        if flips:
            mirrored = standardized_luminance(part.flip(-1))
            correlation = torch.maximum(correlation, queries @ mirrored.T / queries.shape[1])
        best = correlation.amax(1)
        first = (correlation >= best[:, None] - TIE).to(torch.uint8).argmax(1)
        row = torch.where(best > value + TIE, first + start, row)
        value = torch.maximum(best, value)
    return value.clamp(-1.0, 1.0), row


def _check(images: torch.Tensor, references: torch.Tensor, block: int) -> None:
    for name, batch in (("images", images), ("references", references)):
        if batch.ndim != 4 or batch.shape[1] != 3 or len(batch) == 0 or not batch.is_floating_point():
            raise ValueError(f"`{name}` must be float [>= 1, 3, H, W], got {batch.dtype} {list(batch.shape)}")
        if not torch.isfinite(batch).all():
            raise ValueError(f"`{name}` must be finite, got NaN or Inf")
    if images.shape[2:] != references.shape[2:]:
        want, got = list(images.shape[2:]), list(references.shape[2:])
        raise ValueError(f"`references` must have the height and width of `images` {want}, got {got}")
    if block < 1:
        raise ValueError(f"`block` must be at least 1, got {block}")
