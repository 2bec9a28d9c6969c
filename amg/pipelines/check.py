"""`check`: the final check alone, of pictures that anything made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.pipelines.identity import asked, require_calibrated_for, require_indexes
from amg.pipelines.pictures import to_tensor
from amg.promise import check as promised
from amg.promise import memorized_row
from amg.verdict import Verdict

AT_ONCE = 32  # pictures embedded together


def check(
    images: Any, index: Any, config: AMGConfig | None = None, also: Sequence[Any] = ()
) -> list[Verdict]:
    """One `Verdict` for each finished picture, whoever made it: a service, another engine, a folder of files.

    images: a PIL image or a list of them (RGB or L, opaque, of any sizes); an array [H, W, 3] or
    [B, H, W, 3], or a tensor [3, H, W] or [B, 3, H, W], floating point in [0, 1] or uint8. index: an
    `amg.Index`. config: an `AMGConfig` (default: the preset `main`), of which the thresholds count. also:
    more indexes the pictures are held to. Nothing is changed: what a verdict calls memorised is the caller's
    to withhold. Errors: TypeError and ValueError naming the argument; what prevents a check is raised.
    """
    also = require_indexes(index, also)
    resolved = asked(config).for_metric(index.metric)
    if resolved.guard_false_alarm_rate is not None:
        require_calibrated_for(index, resolved)
    found: list[Verdict] = []
    for batch in _batches(images):
        flights = [Flight.from_noise(picture) for picture in batch]
        found += promised(batch, index, also, resolved, flights)
    return [replace(verdict, level="final") for verdict in found]


def rows_of(given: Any, index: Any, config: AMGConfig, also: Sequence[Any]) -> frozenset[int]:
    """The training images that a user's own pictures are copies of; none of what is no PIL picture."""
    pictures = given if isinstance(given, (list, tuple)) else [given]
    if given is None or not all(hasattr(picture, "convert") for picture in pictures):
        return frozenset()
    found = check([picture.convert("RGB") for picture in pictures], index, config, also)
    return frozenset(row for verdict in found if (row := memorized_row(verdict)) is not None)


def _batches(images: Any) -> list[Tensor]:
    """Float [n, 3, H, W] in [0, 1], in order, each of pictures of one size."""
    if isinstance(images, (Tensor, np.ndarray)):
        images = images[None] if images.ndim == 3 else images
        whole = str(images.dtype).removeprefix("torch.") == "uint8"
        pictures = to_tensor(torch.from_numpy(images).permute(0, 3, 1, 2) if _bytes(images) else images)
        return list((pictures.float() / 255 if whole else pictures).split(AT_ONCE))
    listed = [*images] if isinstance(images, (list, tuple)) else [images]
    batches: list[list[Any]] = []
    for image in listed:
        alike = batches and getattr(batches[-1][0], "size", None) == getattr(image, "size", ())
        if alike and len(batches[-1]) < AT_ONCE:
            batches[-1].append(image)
        else:
            batches.append([image])
    return [to_tensor(batch) for batch in batches]


def _bytes(images: Any) -> bool:
    return isinstance(images, np.ndarray) and images.dtype == np.uint8
