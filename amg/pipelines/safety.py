"""A pipeline's own safety checker: every picture that is delivered was shown to it, re-runs too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SafetyCheck:
    """The checker of one call of a pipeline; `flags`, one per image, are those of the picture last shown."""

    def __init__(self, pipe: Any, flags: Sequence[Any], dtype: torch.dtype):
        self.pipe, self.dtype, self.flags = pipe, dtype, [bool(flag) for flag in flags]

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Show it images [R, 3, H, W] in [0, 1] of `rows` -> what it lets through, its flags kept.

        It gets them as diffusers' pipelines give them, in [-1, 1] and in the decoder's dtype; of what comes
        back they bring to [0, 1] what is not flagged (0 is black).
        """
        given = (images * 2 - 1).to(self.pipe._execution_device, self.pipe.vae.dtype)
        shown, flags = self.pipe.run_safety_checker(given.clone(), self.pipe._execution_device, self.dtype)
        for row, flag in zip(rows, flags, strict=True):
            self.flags[row] = bool(flag)
        flagged, replaced = per_image(flags, shown), per_image((shown != given).flatten(1).any(1), images)
        seen = torch.where(flagged, shown, shown / 2 + 0.5).to(images).clamp(0, 1)
        return torch.where(replaced, (seen * 255).round() / 255, images)


class Watermark:
    """SDXL's watermark, which its own pipeline puts into every picture."""

    flags = None

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        """Images [R, 3, H, W] in [0, 1] -> the same, marked."""
        marked: Tensor = self.pipe.watermark.apply_watermark(images * 2 - 1)
        return (((marked / 2 + 0.5).clamp(0, 1) * 255).round() / 255).to(images)


def safety_of(pipe: Any, flags: Sequence[Any], dtype: torch.dtype) -> SafetyCheck | Watermark | None:
    """What the pipeline does with its finished pictures: its safety checker or its watermark, where it has
    one; `flags`: what it said of the images so far."""
    if getattr(pipe, "watermark", None) is not None:
        return Watermark(pipe)
    return None if getattr(pipe, "safety_checker", None) is None else SafetyCheck(pipe, flags, dtype)


def per_image(values: Tensor | Sequence[Any], like: Tensor) -> Tensor:
    """[B] truths as [B, 1, 1, 1] bool beside `like`."""
    found = values if isinstance(values, Tensor) else torch.tensor([bool(value) for value in values])
    return found.to(like.device).view(-1, 1, 1, 1)


@contextmanager
def flagged_pictures_kept_right(pipe: Any) -> Iterator[None]:
    """During a pipeline's own call: pictures that its checker flags without blanking them come out as they
    are, instead of as values in [-1, 1] that pass for a picture in [0, 1]."""
    if getattr(pipe, "safety_checker", None) is None:
        yield
        return
    original = pipe.run_safety_checker

    def run(image: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        given = image.clone()
        shown, flags = original(image, *args, **kwargs)
        if flags is None:
            return shown, flags
        left = per_image(flags, shown) & per_image((shown == given).flatten(1).all(1), shown)
        return torch.where(left, (shown / 2 + 0.5).clamp(0, 1), shown), flags

    own = "run_safety_checker" in vars(pipe)
    pipe.run_safety_checker = run
    try:
        yield
    finally:
        del pipe.run_safety_checker
        if own:
            pipe.run_safety_checker = original
