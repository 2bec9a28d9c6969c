"""What a host's modes must not change: autocast, inference mode, and gradients that float16 cannot hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Autocast off, on every kind of device where the host has it on."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Modes(NamedTuple):
    """The autocast modes of a thread, (kind of device, dtype) each; a new thread has none of them."""

    autocast: tuple[tuple[str, torch.dtype], ...]

    @staticmethod
    def here() -> Modes:
        """Those of the calling thread."""
        kinds = ("cpu", "cuda", "mps", "xpu")
        return Modes(tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """In another thread what they were in that one."""
        with contextlib.ExitStack() as stack:
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield


def embedded(embedder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """An embedder's vectors of float pictures [B, 3, H, W] in any dtype, on the pictures' device.

    It gets float32, as its protocol says, where its weights are, and computes in no other precision, whatever
    pipeline it serves.
    """
    with full_precision():
        return _on(embedder(images.float().to(_place_of(embedder, images.device))), images.device)


def _place_of(embedder: Any, otherwise: torch.device) -> torch.device:
    """Where an embedder's weights are; `otherwise` for one that has none or goes where its pictures are."""
    parameters = getattr(embedder, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return otherwise if first is None else first.device


def _on(found: Any, device: torch.device) -> Any:
    return found.to(device) if isinstance(found, Tensor) else found  # what is no tensor is refused by name


def recorded(function: Callable[[Tensor], Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
    """(leaf, function(leaf)) under autograd, leaf a copy of `value`, even inside `torch.inference_mode()`.

    Weights that were loaded there cannot be saved for a backward pass: where torch says so the function is
    run again on copies of them, made operation by operation and held no longer than the graph.
    """
    with torch.inference_mode(False), torch.enable_grad(), _no_cast_weights():
        leaf = value.detach().clone().requires_grad_()
        try:
            return leaf, function(leaf)
        except RuntimeError as error:
            if "Inference tensors cannot be saved for backward" not in str(error):
                raise
        leaf = value.detach().clone().requires_grad_()
        with _OrdinaryTensors():
            return leaf, function(leaf)


def carried_back(output: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of <output, cotangent>, both [B, ...], with respect to `leaf`, of `leaf`'s dtype.

    On the way each sample's cotangent is about 1, by a power of two: what float16 networks would flush to
    zero comes through.
    """
    largest = cotangent.detach().flatten(1).abs().amax(1).float()
    exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent.clamp(-100, 100)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    with torch.inference_mode(False), full_precision():
        scaled = (cotangent / _like(scale, cotangent)).to(output.dtype)
        (gradient,) = torch.autograd.grad(output, leaf, scaled)
    return gradient * _like(scale, gradient)


def _like(scale: Tensor, tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return scale.to(wide).view(-1, *[1] * (tensor.ndim - 1))


@contextlib.contextmanager
def _no_cast_weights() -> Iterator[None]:
    """Autocast without its cache: copies of the weights that it made in inference mode have no gradient."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _OrdinaryTensors(TorchFunctionMode):
    """Hands every torch function copies of the inference tensors among its arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, _ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)


def _ordinary(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
