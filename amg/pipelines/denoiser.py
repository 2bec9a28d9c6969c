"""What guidance needs of a diffusers pipeline: a `Denoiser`, and the conditions in a call of its U-Net."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amg.guidance.predict import Conditions, Denoiser, Same, like_sequence
from amg.pipelines.supported import is_xl

CAPTIONS_KEPT = 4096


def denoiser_for(pipe: Any, network: Callable[..., Any] | None = None) -> Denoiser:
    """The `Denoiser` of a supported pipeline; `network` replaces its U-Net's forward."""
    forward = network if network is not None else pipe.unet
    prediction_type = getattr(pipe.scheduler.config, "prediction_type", "epsilon")

    def run(sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        output: Tensor = forward(sample, t, **{**conditions, "return_dict": False})[0]
        return output

    if not is_latent(pipe):
        return Denoiser(run, lambda x0: x0 / 2 + 0.5, prediction_type, pixels=True)
    return Denoiser(run, decoder_of(pipe), prediction_type, pixels=False, encode_captions=CaptionCache(pipe))


def decoder_of(pipe: Any) -> Callable[[Tensor], Tensor]:
    """x0 -> picture [B, 3, H, W], float32, mostly in [0, 1], as the pipeline itself decodes its latents."""
    vae, config, xl = pipe.vae, pipe.vae.config, is_xl(pipe)
    mean, std = (getattr(config, name, None) if xl else None for name in ("latents_mean", "latents_std"))
    upcast = xl and getattr(config, "force_upcast", False)

    def decode(x0: Tensor) -> Tensor:
        dtype = weights_of(vae)[0]
        latents = x0.to(torch.float32 if upcast else dtype)
        if mean is not None and std is not None:
            centre, spread = (latents.new_tensor(one).view(1, -1, 1, 1) for one in (mean, std))
            latents = latents * spread / config.scaling_factor + centre
        else:
            latents = latents / config.scaling_factor
        if upcast and dtype == torch.float16:  # in which it overflows
            return in_float32(vae, latents).float() / 2 + 0.5
        return vae.decode(latents.to(dtype), return_dict=False)[0].float() / 2 + 0.5

    return decode


class _Decoding(torch.nn.Module):
    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        picture: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return picture


def in_float32(vae: Any, latents: Tensor) -> Tensor:
    """What a decoder makes of latents with its weights in float32; itself, as the pipeline holds it, is not
    touched."""
    decoding = _Decoding(vae)
    weights = {name: weight.float() for name, weight in decoding.named_parameters()}
    picture: Tensor = torch.func.functional_call(decoding, weights, (latents,))
    return picture


def weights_of(network: Any) -> tuple[torch.dtype, torch.device]:
    """dtype and device of a network, by its first weights: diffusers' properties walk through them all."""
    first = next((one for one in network.parameters() if one.is_floating_point()), None)
    return (network.dtype, network.device) if first is None else (first.dtype, first.device)


def is_latent(pipe: Any) -> bool:
    """Whether the pipeline denoises a VAE's latents rather than pixels."""
    return getattr(pipe, "vae", None) is not None


class CaptionCache:
    """Captions -> the network's arguments for them, a row each; each caption is encoded once and kept
    (bounded, least recent dropped)."""

    def __init__(self, pipe: Any):
        self.pipe, self.kept = pipe, OrderedDict[str, tuple[Tensor, ...]]()

    def __call__(self, captions: Sequence[str]) -> Mapping[str, Any]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.kept]
        if new:
            with torch.no_grad():
                self.kept.update(zip(new, zip(*self._encode(new), strict=True), strict=True))
        for caption in captions:
            self.kept.move_to_end(caption)
        states, *pooled = (torch.stack(rows) for rows in zip(*map(self.kept.get, captions), strict=True))
        while len(self.kept) > CAPTIONS_KEPT:
            self.kept.popitem(last=False)
        said: dict[str, Any] = {"encoder_hidden_states": states}
        return {**said, "added_cond_kwargs": {"text_embeds": pooled[0]}} if pooled else said

    def _encode(self, captions: list[str]) -> tuple[Tensor, ...]:
        """The encoded captions; SDXL's second encoder pools them, too."""
        device = self.pipe._execution_device
        if is_xl(self.pipe):
            states, _, pooled, _ = self.pipe.encode_prompt(
                captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            return states, pooled
        return (self.pipe.encode_prompt(captions, device, 1, False)[0],)


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
