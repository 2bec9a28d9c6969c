"""Pictures in memory: a tensor [N, 3, H, W], or a NumPy array [N, H, W, 3], mapped ones too."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from amg.index.decode import Picture
from amg.index.errors import IndexBuildError
from amg.index.notes import Tally
from amg.index.sources.source import TrainingImage, found, identity_of
from amg.index.text import Caption


class _Numbered:
    """Pictures that are read by their number; `name` says of what."""

    images: Any
    name: str
    passed_over: Tally

    def first(self) -> TrainingImage:
        return self._image(0)

    def read(self, start: int) -> Iterator[TrainingImage]:
        for position in range(start, len(self.images)):
            yield self._image(position)

    def _image(self, position: int) -> TrainingImage:
        load = functools.partial(self._load, position)
        return TrainingImage(position, str(position), f"{self.name}#{position}", Caption(), load)

    def _load(self, position: int) -> Picture:
        raise NotImplementedError


class TensorSource(_Numbered):
    """A uint8 or float tensor [N, 3, H, W]."""

    identity_tells = False
    name = "tensor"

    def __init__(self, images: torch.Tensor):
        if images.layout != torch.strided or images.is_meta:
            kind = "the meta device" if images.is_meta else images.layout
            raise IndexBuildError(f"`images` must be a dense tensor with values, got one of {kind}")
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or not (images.dtype == torch.uint8 or images.is_floating_point())
        ):
            raise IndexBuildError(
                "`images` must be uint8 [N, 3, H, W] or float [N, 3, H, W] in [0, 1], "
                f"got {list(images.shape)} {images.dtype}{_hint(images)}"
            )
        if 0 in images.shape:
            raise IndexBuildError(f"`images` is empty: {list(images.shape)}")
        self.images = images.detach()
        self.length: int | None = len(images)
        self.identity = f"tensor {list(images.shape)} {images.dtype}, every image compared"
        self.passed_over = Tally()

    def _load(self, position: int) -> Picture:
        return Picture(in_range(self.images[position].cpu(), f"image {position}"))


def _hint(images: torch.Tensor) -> str:
    last = images.ndim == 4 and images.shape[-1] == 3
    return ": pass images.permute(0, 3, 1, 2)" if last else ""


def in_range(image: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 as it is, floats in [0, 1] as float32. Raises IndexBuildError naming the image."""
    if image.dtype == torch.uint8:
        return image
    image = image.float()
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):  # also refuses NaN
        hint = ": undo its normalisation" if low < 0 else ""
        raise IndexBuildError(
            f"`images` must be in [0, 1], {name} has {low.item():g} to {high.item():g}{hint}"
        )
    return image


class ArraySource(_Numbered):
    """A NumPy array uint8 or float [N, H, W, 3], or uint8 [N, H, W] of grey; of a .npy file it is mapped."""

    def __init__(self, images: Any, file: Path | None = None):
        shape, kind = list(images.shape), images.dtype
        grey = images.ndim == 3 and kind == "uint8"
        if not grey and not (images.ndim == 4 and shape[3] == 3 and (kind == "uint8" or kind.kind == "f")):
            raise IndexBuildError(
                "`images` must be an array uint8 [N, H, W, 3], float [N, H, W, 3] in [0, 1] or uint8 "
                f"[N, H, W], got {type(images).__name__} {shape} {kind} (channels first: torch.from_numpy)"
            )
        if 0 in shape:
            raise IndexBuildError(f"`images` is empty: {shape}")
        self.images = images
        self.name = "array" if file is None else file.name
        self.length: int | None = len(images)
        self.identity_tells = file is not None
        self.identity = f"array {shape} {kind}, every image compared"
        if file is not None:
            self.identity = identity_of("array", [found(file, file.name)])
        self.passed_over = Tally()

    def _load(self, position: int) -> Picture:
        import numpy as np

        values = torch.from_numpy(np.array(self.images[position]))
        channels = values.expand(3, *values.shape) if values.ndim == 2 else values.permute(2, 0, 1)
        return Picture(in_range(channels.contiguous(), f"image {position}"))


def open_array(file: Path) -> ArraySource:
    """The array of a .npy file, mapped. Raises IndexBuildError; never unpickles."""
    import numpy as np

    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many types on damaged files
        raise IndexBuildError(f"`images`: {file} cannot be read as an array ({error})") from error
    return ArraySource(images, file)
