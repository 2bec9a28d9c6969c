"""What a request's arguments may be: each is held to its kind before anything is done with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from amg.engine.sampler import Request

COUNTS = ("num_images_per_prompt",)
OPEN_COUNTS = (*("num_inference_steps", "batch_size", "height", "width", "clip_skip", "max_sequence_length"),)
NUMBERS = ("guidance_rescale", "eta")
OPEN_NUMBERS = ("guidance_scale", "true_cfg_scale", "strength", "deadline")
TEXTS = ("prompt", "negative_prompt")
LISTED = ("class_labels", "timesteps", "sigmas")
TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def require_request(request: Request) -> None:
    """TypeError naming the argument of a request that is not of its kind, the kind and the value."""
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    for name in (*COUNTS, *OPEN_COUNTS):
        if not (_is(Integral, values[name]) or (values[name] is None and name in OPEN_COUNTS)):
            raise TypeError(f"`{name}` must be an integer, got {values[name]!r}")
    for name in (*NUMBERS, *OPEN_NUMBERS):
        if not (_is(Real, values[name]) or (values[name] is None and name in OPEN_NUMBERS)):
            raise TypeError(f"`{name}` must be a number, got {values[name]!r}")
    for name in TEXTS:
        if not _is_text(values[name]):
            raise TypeError(f"`{name}` must be a text or a list of texts, got {_short(values[name])}")
    for name in LISTED:
        if values[name] is not None and not _is_listed(values[name]):
            raise TypeError(f"`{name}` must be a list of numbers, got {_short(values[name])}")
        if values[name] is not None and len(values[name]) == 0:
            raise ValueError(f"`{name}` must hold at least one number, got {values[name]!r}")
    for name in TENSORS:
        if values[name] is not None and not isinstance(values[name], Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {_short(values[name])}")
    if not isinstance(values["use_resolution_binning"], bool | None):
        raise TypeError(f"`use_resolution_binning` must be a bool, got {values['use_resolution_binning']!r}")
    if request.num_inference_steps is None and request.timesteps is None and request.sigmas is None:
        raise TypeError(
            "`num_inference_steps` must be an integer where neither `timesteps` nor `sigmas` is given, "
            "got None"
        )
    if values["num_images_per_prompt"] < 1:
        raise ValueError(f"`num_images_per_prompt` must be >= 1, got {values['num_images_per_prompt']}")
    _require_as_many(values["prompt"], values["negative_prompt"])


def _require_as_many(prompt: Any, negative: Any) -> None:
    if isinstance(prompt, Sequence) and isinstance(negative, Sequence) and not isinstance(negative, str):
        count = 1 if isinstance(prompt, str) else len(prompt)
        if len(negative) != count:
            raise ValueError(
                f"`negative_prompt` must be a text, or a list of {count} as `prompt` is, got {len(negative)}"
            )


def require_seed(seed: Any) -> None:
    """TypeError for what is neither a whole number nor a list of them."""
    listed = [*seed] if isinstance(seed, list | tuple) else [seed]
    if seed is not None and not all(_is(Integral, one) for one in listed):
        raise TypeError(f"`seed` must be an integer, or a list of one per image, got {_short(seed)}")


def require_generator(generator: Any, images: int | None = None) -> None:
    """TypeError for what is no `torch.Generator`, nor a list of them; ValueError for a list that has not one
    for each of `images`, where that is known."""
    listed = [*generator] if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in listed):
        raise TypeError(f"`generator` must be a torch.Generator, or a list of them, got {_short(generator)}")
    if isinstance(generator, list | tuple) and images is not None and len(generator) != images:
        raise ValueError(
            f"`generator` must be one, or a list of {images}, one per image, got {len(generator)}"
        )


def images_of(arguments: Mapping[str, Any]) -> int | None:
    """How many images a diffusers pipeline's call is to give, where its arguments say so; None where not."""
    if isinstance(arguments.get("batch_size"), Integral):
        return int(arguments["batch_size"])
    for name in ("prompt", "prompt_embeds", "class_labels"):
        value = arguments.get(name)
        if isinstance(value, str | list | tuple | Tensor):
            count = 1 if isinstance(value, str) else len(value)
            return count * (arguments.get("num_images_per_prompt") or 1)
    return None


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return True
    listed = isinstance(value, Sequence) and not isinstance(value, bytes) and len(value) > 0
    return listed and all(isinstance(one, str) for one in value)


def _is_listed(values: Any) -> bool:
    if isinstance(values, Tensor | np.ndarray):
        return values.ndim == 1
    return isinstance(values, list | tuple | range) and all(_is(Real, value) for value in values)


def _short(value: Any) -> str:
    text = f"{type(value).__name__} of {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
