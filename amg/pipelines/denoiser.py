"""What guidance needs of a diffusers pipeline: a `Denoiser`, and the conditions in a call of its U-Net."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amg.guidance.predict import Conditions, Denoiser, Same, like_sequence

CAPTIONS_KEPT = 4096


def denoiser_for(pipe: Any, network: Callable[..., Any] | None = None) -> Denoiser:
    """The `Denoiser` of a DDPM, DDIM or Stable Diffusion pipeline; `network` replaces its U-Net's forward."""
    forward = network if network is not None else pipe.unet
    prediction_type = getattr(pipe.scheduler.config, "prediction_type", "epsilon")

    def run(sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        output: Tensor = forward(sample, t, **{**conditions, "return_dict": False})[0]
        return output

    if not is_latent(pipe):
        return Denoiser(run, lambda x0: x0 / 2 + 0.5, prediction_type, pixels=True)
    vae, scaling_factor = pipe.vae, pipe.vae.config.scaling_factor

    def decode(x0: Tensor) -> Tensor:
        latents = x0.to(weights_of(vae)[0]) / scaling_factor
        return vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5

    return Denoiser(run, decode, prediction_type, pixels=False, encode_captions=CaptionCache(pipe))


def weights_of(network: Any) -> tuple[torch.dtype, torch.device]:
    """dtype and device of a network, by its first weights: diffusers' properties walk through them all."""
    first = next((one for one in network.parameters() if one.is_floating_point()), None)
    return (network.dtype, network.device) if first is None else (first.dtype, first.device)


def is_latent(pipe: Any) -> bool:
    """Whether the pipeline denoises a VAE's latents rather than pixels."""
    return getattr(pipe, "vae", None) is not None


class CaptionCache:
    """Captions -> {"encoder_hidden_states": [B, L, D]}; each caption is encoded once and kept (bounded, least
    recent dropped)."""

    def __init__(self, pipe: Any):
        self.pipe, self.kept = pipe, OrderedDict[str, Tensor]()

    def __call__(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.kept]
        if new:
            with torch.no_grad():
                states = self.pipe.encode_prompt(new, self.pipe._execution_device, 1, False)[0]
            self.kept.update(zip(new, states, strict=True))
        for caption in captions:
            self.kept.move_to_end(caption)
        states = torch.stack([self.kept[caption] for caption in captions])
        while len(self.kept) > CAPTIONS_KEPT:
            self.kept.popitem(last=False)
        return {"encoder_hidden_states": states}


def split_call(arguments: Mapping[str, Any], batch: int, guided: bool) -> Conditions:
    """The conditions in the keyword arguments of one U-Net call of `batch` rows, twice as many if `guided`.

    Tensors whose first dimension is the number of rows belong to the rows, unconditional first, at any depth
    of mappings, lists and tuples (IP-Adapters': a list with a tensor each); the rest is shared.
    """
    rows = 2 * batch if guided else batch
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, value in arguments.items():
        if name != "return_dict":
            (own if _has_rows(value, rows) else shared)[name] = value
    if not guided:
        return Conditions(_cut(own, rows, slice(None)), None, shared)
    return Conditions(_cut(own, rows, slice(batch, None)), _cut(own, rows, slice(batch)), shared)


def _has_rows(value: Any, rows: int) -> bool:
    if isinstance(value, Mapping):
        return any(_has_rows(inner, rows) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_rows(inner, rows) for inner in value)
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _cut(value: Any, rows: int, part: slice) -> Any:
    """`part` of every tensor with `rows` rows in `value`; what else lies beside them is the same for all."""
    if isinstance(value, Mapping):
        return {name: _cut(inner, rows, part) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return like_sequence(value, [_cut(inner, rows, part) for inner in value])
    return value[part] if _has_rows(value, rows) else Same(value)


def class_conditions(
    unet: Any, labels: Tensor | Sequence[int] | None, batch: int, null_class: int | None, scale: float
) -> Conditions:
    """Conditions of a class-conditional U-Net: `labels` int64 [B] against the null class; None means
    unconditional."""
    classes = unet.config.num_class_embeds
    null = torch.full((batch,), classes - 1 if null_class is None else null_class, device=unet.device)
    if labels is None:
        return Conditions({"class_labels": null}, None, {})
    labels = torch.as_tensor(labels, device=unet.device).long()
    if labels.shape != (batch,) or not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(
            f"`class_labels` must be [{batch}] integers in [0, {classes}), got {labels.tolist()}"
        )
    if scale == 1:
        return Conditions({"class_labels": labels}, None, {})
    return Conditions({"class_labels": labels}, {"class_labels": null}, {})
