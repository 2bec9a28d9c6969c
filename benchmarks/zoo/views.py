"""Random crops of the source photographs and the copy augmentations, batched in torch."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from amg.zoo.photos import Photo, load_photo


def load_sources(photos: list[Photo], size: int = 224) -> Tensor:
    """[P, 3, size, size] floats in [0, 1]: the centre square of every photograph, the frame crops are cut
    from."""
    squares = []
    for photo in photos:
        picture = load_photo(photo)
        side, left, top = (
            min(picture.size),
            (picture.width - min(picture.size)) // 2,
            (picture.height - min(picture.size)) // 2,
        )
        square = picture.resize(
            (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
        squares.append(torch.from_numpy(np.asarray(square).copy()))
    return torch.stack(squares).permute(0, 3, 1, 2).float() / 255


def uniform(count: int, low: float, high: float) -> Tensor:
    """[count] numbers, uniform in [low, high)."""
    return torch.rand(count) * (high - low) + low


def boxes(scale: Tensor) -> Tensor:
    """[B, 3] random squares (centre x, centre y, half side), inside [-1, 1], of `scale` [B] times the frame's
    side."""
    centre = (torch.rand(len(scale), 2) * 2 - 1) * (1 - scale[:, None])
    return torch.cat([centre, scale[:, None]], 1)


def jitter(box: Tensor, shrink: float) -> Tensor:
    """A random square inside each box, its side at least `shrink` times the box's."""
    factor = uniform(len(box), shrink, 1.0)
    offset = (torch.rand(len(box), 2) * 2 - 1) * (box[:, 2] * (1 - factor))[:, None]
    return torch.cat([box[:, :2] + offset, (box[:, 2] * factor)[:, None]], 1)


def cut(
    sources: Tensor,
    rows: Tensor,
    box: Tensor,
    size: int,
    rotate: float = 0.0,
    flip: float = 0.5,
    oversample: int = 2,
) -> Tensor:
    """[B, 3, size, size]: the boxes, flipped with probability `flip`, turned by up to `rotate` radians.

    Sampled at `oversample` times the size and averaged, against aliasing.
    """
    angle = (torch.rand(len(box)) * 2 - 1) * rotate
    mirror = torch.where(torch.rand(len(box)) < flip, -1.0, 1.0)
    cosine, sine = box[:, 2] * angle.cos(), box[:, 2] * angle.sin()
    rows_x = torch.stack([cosine * mirror, -sine, box[:, 0]], 1)
    rows_y = torch.stack([sine * mirror, cosine, box[:, 1]], 1)
    shape = [len(box), 3, oversample * size, oversample * size]
    grid = functional.affine_grid(torch.stack([rows_x, rows_y], 1), shape, align_corners=False)
    big = functional.grid_sample(sources[rows], grid, padding_mode="reflection", align_corners=False)
    return functional.avg_pool2d(big, oversample) if oversample > 1 else big


def overlap(rows: Tensor, box: Tensor) -> Tensor:
    """[B, B] intersection over union of the boxes, 0 between different photographs."""
    low, high = box[:, :2] - box[:, 2:], box[:, :2] + box[:, 2:]
    sides = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).clamp(min=0)
    common, area = sides.prod(2), (2 * box[:, 2]).square()
    return common / (area[:, None] + area - common) * (rows[:, None] == rows)


def recolour(images: Tensor, strength: float = 1.0) -> Tensor:
    """Brightness, contrast, saturation, hue and, now and then, greyscale or a colour cast."""
    count = len(images)

    def factor(spread: float) -> Tensor:
        return torch.exp(torch.randn(count, 1, 1, 1) * spread * strength)

    grey = images.mean(1, keepdim=True)
    saturation = factor(0.5) * (torch.rand(count, 1, 1, 1) > 0.15 * strength)
    images = grey + (images - grey) * saturation
    images = _rotate_hue(images, torch.randn(count) * 0.35 * strength)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * factor(0.3) + mean * factor(0.2)
    cast = torch.randn(count, 3, 1, 1) * 0.08 * strength
    return (images + cast).clamp(0, 1)


def degrade(images: Tensor) -> Tensor:
    """Blur half of the batch and add noise to half of it."""
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight = torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.5)
    images = images + (blurred - images) * weight
    noise = torch.rand(len(images), 1, 1, 1) * 0.08 * (torch.rand(len(images), 1, 1, 1) < 0.5)
    return (images + torch.randn_like(images) * noise).clamp(0, 1)


def _rotate_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate colours about the grey axis (Rodrigues' formula)."""
    axis = torch.full((3,), 1 / math.sqrt(3))
    cross = torch.tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    turn = cosine * torch.eye(3) + sine * cross + (1 - cosine) * torch.outer(axis, axis)
    return torch.einsum("bij,bjhw->bihw", turn, images)
