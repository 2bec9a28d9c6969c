"""Networks as embedders: preprocessing in plain torch, one replica per device, a hash of the weights."""

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amg.embed.precision import full_precision

RESIZE_MODES = ("short", "square", "short_crop", "long_pad")


def check_images(images: Tensor) -> None:
    """Refuse anything but a non-empty float32 [B, 3, H, W]. The range is not read: no device sync."""
    if not isinstance(images, Tensor):
        raise TypeError(f"`images` must be a torch.Tensor, got {type(images).__name__}")
    good_shape = images.ndim == 4 and images.shape[1] == 3 and 0 not in images.shape
    if not good_shape or images.dtype != torch.float32:
        raise ValueError(
            f"`images` must be a non-empty [B, 3, H, W] float32, got {list(images.shape)} {images.dtype} "
            f"on {images.device}"
        )


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) after scaling the short side to `size`; the long side is rounded down."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of [B, C, H, W] to `size` (height, width); "bilinear" or "bicubic", PIL's filters.

    Bicubic overshoots at hard edges; it is clamped to [0, 1], as 8-bit images do by themselves.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    resized = F.interpolate(images, size, mode=interpolation, align_corners=False, antialias=True)
    return resized.clamp(0, 1) if interpolation == "bicubic" else resized


def crop_or_pad(images: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """Central `size` (height, width) of [B, C, H, W]; a side too short is padded with `fill` first."""
    missing = [max(want - have, 0) for want, have in zip(size, images.shape[-2:], strict=True)]
    if any(missing):
        down, right = missing
        images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2), value=fill)
    top, left = (round((have - want) / 2) for want, have in zip(size, images.shape[-2:], strict=True))
    return images[..., top : top + size[0], left : left + size[1]]


class Preprocess(nn.Module):
    """Images in [0, 1] to what a network was trained on: resize, crop or pad, subtract mean, divide by std.

    size: (height, width). mode: "short" (short side to size, aspect ratio kept, nothing cut), "square"
    (straight to size, aspect ratio lost), "short_crop" (short side, then the central part), "long_pad" (long
    side, then padding with `fill`, in [0, 1]). interpolation: "bilinear" | "bicubic", antialiased. mean, std:
    one value per channel. `str()` of it is the line that index manifests store.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        *,
        mode: str,
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in RESIZE_MODES:
            raise ValueError(f"`mode` must be one of {', '.join(RESIZE_MODES)}, got {mode!r}")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"`interpolation` must be 'bilinear' or 'bicubic', got {interpolation!r}")
        if mode == "short" and size[0] != size[1]:
            raise ValueError(f"`size` must be square for mode 'short', got {size}")
        self.size, self.mode, self.interpolation, self.fill = size, mode, interpolation, fill
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which an image is scaled, before any crop or padding."""
        if self.mode == "square":
            return self.size
        if self.size[0] == self.size[1] and self.mode != "long_pad":
            return short_side_size(height, width, self.size[0])
        ratios = (height / self.size[0], width / self.size[1])
        ratio = max(ratios) if self.mode == "long_pad" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def forward(self, images: Tensor) -> Tensor:
        resized = resize(images, self.target_size(*images.shape[-2:]), self.interpolation)
        if self.mode in ("short_crop", "long_pad"):
            resized = crop_or_pad(resized, self.size, self.fill)
        return (resized - self.mean) / self.std

    def __str__(self) -> str:
        where = {
            "short": f"short side {self.size[0]}",
            "square": f"resized to {self.size[0]}x{self.size[1]}",
            "short_crop": f"short side, centre crop {self.size[0]}x{self.size[1]}",
            "long_pad": f"long side, padded to {self.size[0]}x{self.size[1]} with {self.fill:g}",
        }[self.mode]
        mean, std = (
            " ".join(f"{v:.6g}" for v in values.flatten().tolist()) for values in (self.mean, self.std)
        )
        return f"{where}; {self.interpolation}, antialiased; mean {mean}; std {std}"


class NetworkEmbedder:
    """A torch network as an Embedder: fp32, evaluation mode, frozen weights, on whichever device the images
    are.

    preprocess, network: applied in this order. The replica for a device is made at its first use.
    images: float32 [B, 3, H, W] in [0, 1]; returns float32 [B, dimension], differentiable with respect to
    images. Autocast is switched off inside, so a similarity means the same in every pipeline.
    """

    def __init__(
        self, preprocess: Preprocess, network: nn.Module, *, name: str, dimension: int, sha: str
    ) -> None:
        self.name, self.dimension, self.sha = name, dimension, sha
        self.preprocessing = str(preprocess)
        self._network = nn.Sequential(preprocess, network).float().eval().requires_grad_(False)
        self._replicas = {next(network.parameters()).device: self._network}

    def _replica(self, device: torch.device) -> nn.Module:
        if device not in self._replicas:
            with torch.inference_mode(
                False
            ):  # tensors made in inference mode could never be differentiated through
                self._replicas[device] = copy.deepcopy(self._network).to(device)
        return self._replicas[device]

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        with full_precision():
            return self._replica(images.device)(images)

    def __repr__(self) -> str:
        return f"{self.name} ({self.dimension}-d, sha {self.sha[:12]}, {self.preprocessing})"


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over sorted names, dtypes, shapes and values: of the weights, whatever file holds them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, as `sha256sum` prints it."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_sha256(text: object) -> bool:
    """True for 64 lower-case hex digits."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None
