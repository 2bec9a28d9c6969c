"""Embedders: image → vector. The protocol, a wrapper for one's own function, and loading by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from amg.embed.network import is_sha256
from amg.embed.precision import recorded

__all__ = ["Embedder", "WrappedEmbedder", "check", "load", "wrap"]

SPECS = "'photos', 'sscd:PATH.safetensors', 'sscd-square320:PATH.safetensors', 'open_clip:MODEL[@TAG]:PATH'"


@runtime_checkable
class Embedder(Protocol):
    """Any callable with these attributes.

    name, sha: identity; an index built with another pair is refused. sha: sha256 of the weights, 64 hex
    digits. preprocessing: one line, stored in index manifests. Call: images float32 [B, 3, H, W] in [0, 1],
    any size and device, to float32 [B, dimension] on the same device, differentiable with respect to images.
    Resizing and normalising images happens inside; the output need not be normalised.
    """

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def sha(self) -> str: ...
    @property
    def preprocessing(self) -> str: ...
    def __call__(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class WrappedEmbedder:
    """A function with the attributes of an Embedder: see `wrap`."""

    function: Callable[[Tensor], Tensor]
    name: str
    dimension: int
    sha: str
    preprocessing: str

    def __call__(self, images: Tensor, /) -> Tensor:
        return self.function(images)


def wrap(
    function: Callable[[Tensor], Tensor], *, name: str, dimension: int, sha: str, preprocessing: str
) -> WrappedEmbedder:
    """One's own function as an Embedder; the attributes are checked at once, the function by `check`."""
    embedder = WrappedEmbedder(function, name, dimension, sha, preprocessing)
    check_attributes(embedder)
    return embedder


def check_attributes(embedder: Embedder) -> None:
    """Refuse an embedder whose attributes cannot be stored in a manifest: TypeError, ValueError."""
    if not callable(embedder):
        raise TypeError(f"`embedder` must be callable, got {type(embedder).__name__}")
    for attribute in ("name", "dimension", "sha", "preprocessing"):
        if not hasattr(embedder, attribute):
            raise TypeError(
                f"`embedder` must have the attribute `{attribute}`, got {type(embedder).__name__} without it"
            )
    for attribute in ("name", "preprocessing"):
        line = getattr(embedder, attribute)
        if not isinstance(line, str) or not line.strip() or len(line.splitlines()) != 1:
            raise ValueError(f"`embedder.{attribute}` must be one non-empty line, got {line!r}")
    dimension = embedder.dimension
    if not isinstance(dimension, int) or isinstance(dimension, bool) or dimension < 1:
        raise ValueError(f"`embedder.dimension` must be a positive int, got {dimension!r}")
    if not is_sha256(embedder.sha):
        raise ValueError(
            f"`embedder.sha` must be 64 lower-case hex digits (sha256 of the weights), got {embedder.sha!r}"
        )


def check(
    embedder: Embedder, *, device: str | torch.device = "cpu", size: tuple[int, int] = (64, 48)
) -> None:
    """Refuse an embedder that breaks the protocol: attributes, then one forward pass of two noise images on
    `device`.

    Checks that the output is a finite float32 [2, dimension] on `device` and that it depends differentiably
    on the images. Errors: TypeError, ValueError.
    """
    check_attributes(embedder)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator, dtype=torch.float32).to(device)
    _, output = recorded(embedder, images)
    if not isinstance(output, Tensor):
        raise TypeError(f"`embedder` must return a torch.Tensor, got {type(output).__name__}")
    want = (2, embedder.dimension)
    if tuple(output.shape) != want or output.dtype != torch.float32 or output.device != images.device:
        raise ValueError(
            f"`embedder` must return {list(want)} float32 on {images.device}, got {list(output.shape)} "
            f"{output.dtype} on {output.device}"
        )
    if not torch.isfinite(output).all():
        raise ValueError("`embedder` must return finite values, got NaN or infinity")
    if not output.requires_grad:
        raise ValueError(
            "`embedder` must be differentiable with respect to images, got an output without a gradient"
        )


def load(spec: str) -> Embedder:
    """The embedder named by `spec`.

    "photos": the small bundled one. "sscd:PATH.safetensors": SSCD, short side 288;
    "sscd-square320:PATH.safetensors": the same on 320×320. "open_clip:MODEL:PATH": an open_clip image tower;
    "open_clip:MODEL@TAG:PATH" where the published weights of MODEL disagree on preprocessing.
    Errors: ValueError (unknown spec), FileNotFoundError, ImportError naming the extra to install.
    """
    kind, _, rest = spec.partition(":")
    if kind == "photos" and not rest:
        from amg.embed.photos import load_photos

        return load_photos()
    if kind in ("sscd", "sscd-square320") and rest:
        from amg.embed.sscd import load_sscd

        resize = "short288" if kind == "sscd" else kind.removeprefix("sscd-")
        return load_sscd(Path(rest).expanduser(), resize=resize)
    model, _, path = rest.partition(":")
    if kind == "open_clip" and model and path:
        from amg.embed.open_clip import load_open_clip

        architecture, _, tag = model.partition("@")
        return load_open_clip(architecture, Path(path).expanduser(), tag=tag or None)
    raise ValueError(f"`spec` must be one of {SPECS}, got {spec!r}")
