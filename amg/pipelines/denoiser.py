"""What guidance needs of a diffusers pipeline: a `Denoiser`, and the conditions in a call of its U-Net."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amg.guidance.predict import Conditions, Denoiser, Same, like_sequence
from amg.pipelines.families import Family, Size, family_of
from amg.pipelines.supported import is_xl

CAPTIONS_KEPT = 4096
CHANNELS = "amg_channels"  # what an inpainting network is given beside x_t, kept as a condition


def denoiser_for(pipe: Any, network: Callable[..., Any] | None = None) -> Denoiser:
    """The `Denoiser` of a supported pipeline; `network` replaces its own network's forward. Of packed latents
    it decodes nothing yet: that wants their size (`decoder_of`)."""
    family = family_of(pipe)
    prediction_type = getattr(pipe.scheduler.config, "prediction_type", "epsilon")
    if family is None:
        run = _of_unet(pipe.unet if network is None else network)
        return Denoiser(run, lambda x0: x0 / 2 + 0.5, prediction_type, pixels=True)
    forward = getattr(pipe, family.network) if network is None else network
    run = _of_unet(forward) if family.network == "unet" else asked(family, forward)
    kind = "flow" if family.flow else prediction_type
    return Denoiser(run, decoder_of(pipe), kind, pixels=False, encode_captions=captions_of(pipe))


def _of_unet(forward: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        whole = with_channels(sample, conditions.pop(CHANNELS, None))
        output: Tensor = forward(whole, t, **{**conditions, "return_dict": False})[0]
        return output

    return run


def asked(family: Family, forward: Callable[..., Any]) -> Callable[..., Tensor]:
    """network(sample, t, **conditions) -> raw output in the channels of x_t, t being one timestep or [B]."""

    def network(sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        whole = with_channels(sample, conditions.pop(CHANNELS, None))
        times = torch.as_tensor(t, device=sample.device).expand(len(sample))
        if family.divisor != 1:
            times = times.to(sample.dtype) / family.divisor
        named = {family.sample: whole, "timestep": times, **conditions, "return_dict": False}
        return without_variance(forward(**named)[0], sample)

    return network


def with_channels(sample: Tensor, more: Tensor | None) -> Tensor:
    """What an inpainting network is given: x_t and what lies beside it."""
    return sample if more is None else torch.cat([sample, more.to(sample)], 1)


def without_variance(output: Tensor, sample: Tensor) -> Tensor:
    """The network's output in the channels of x_t: a learned variance is cut off."""
    return output[:, : sample.shape[1]] if output.ndim == 4 else output


def captions_of(pipe: Any, arguments: Mapping[str, Any] | None = None) -> CaptionCache | None:
    """What encodes captions for a pipeline; None, which is said, where its text encoder was freed."""
    family = family_of(pipe)
    if family is None:
        return None
    missing = [name for name in family.encoders if getattr(pipe, name, None) is None]
    if not missing:
        return CaptionCache(pipe, arguments)
    warnings.warn(
        f"{type(pipe).__name__} has no {' and no '.join(missing)}: captions cannot be encoded, so later "
        "tries keep their prompts and caption de-duplication does not act",
        stacklevel=2,
    )
    return None


def decoder_of(pipe: Any, size: Size | None = None, shown: Size | None = None) -> Callable[[Tensor], Tensor]:
    """x0 -> picture [B, 3, H, W], float32, mostly in [0, 1], as the pipeline itself decodes its latents.

    `size`: height and width of the picture, which packed latents [B, N, C] are unpacked for; `shown`: those
    that it is resized and cropped to, None: as it is.
    """
    vae, config, scale = pipe.vae, pipe.vae.config, getattr(pipe.vae.config, "scaling_factor", None) or 1.0
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    shift = getattr(config, "shift_factor", None)
    upcast = is_xl(pipe) and getattr(config, "force_upcast", False)

    def decode(x0: Tensor) -> Tensor:
        dtype = weights_of(vae)[0]
        latents = _unpacked(pipe, x0, size).to(torch.float32 if upcast else dtype)
        if mean is not None and std is not None:
            shape = (1, -1, *[1] * (latents.ndim - 2))
            centre, spread = (latents.new_tensor(one).view(shape) for one in (mean, std))
            latents = latents * spread / scale + centre
        else:
            latents = latents / scale
        if shift is not None:
            latents = latents + shift
        if upcast and dtype == torch.float16:  # in which it overflows
            return in_float32(vae, latents).float() / 2 + 0.5
        picture = vae.decode(latents.to(dtype), return_dict=False)[0]
        picture = picture[:, :, 0] if picture.ndim == 5 else picture  # a video's decoder, of one frame
        if shown is not None:
            picture = pipe.image_processor.resize_and_crop_tensor(picture, shown[1], shown[0])
        return picture.float() / 2 + 0.5

    return decode


def _unpacked(pipe: Any, x0: Tensor, size: Size | None) -> Tensor:
    """Latents as the decoder takes them, of those that a transformer takes as tokens."""
    unpack = getattr(pipe, "_unpack_latents", None)
    if x0.ndim != 3 or unpack is None or size is None:
        return x0
    known = {"height": size[0], "width": size[1], "vae_scale_factor": pipe.vae_scale_factor}
    names = inspect.signature(unpack).parameters
    latents: Tensor = unpack(x0, **{name: value for name, value in known.items() if name in names})
    return latents


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


def is_packed(pipe: Any) -> bool:
    """Whether the network takes its latents as tokens, several pixels of them in one."""
    family = family_of(pipe)
    return family is not None and family.packed > 1


class CaptionCache:
    """Captions -> the network's arguments for them, a row each; each caption is encoded once and kept
    (bounded, least recent dropped). `arguments`: the call's, of which its encoding is."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any] | None = None):
        family = family_of(pipe)
        if family is None:
            raise TypeError(f"`pipe` must be of a known family, got {type(pipe).__name__}")
        self.pipe, self.family, self.arguments = pipe, family, arguments or {}
        self.kept = OrderedDict[str, tuple[Tensor, ...]]()

    def __call__(self, captions: Sequence[str]) -> Mapping[str, Any]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.kept]
        if new:
            with torch.no_grad():
                encoded = self.family.encode(self.pipe, new, self.arguments)
            self.kept.update(zip(new, zip(*encoded, strict=True), strict=True))
        for caption in captions:
            self.kept.move_to_end(caption)
        rows = [torch.stack(own) for own in zip(*map(self.kept.get, captions), strict=True)]
        while len(self.kept) > CAPTIONS_KEPT:
            self.kept.popitem(last=False)
        said: dict[str, Any] = {}
        for path, tensor in zip(self.family.said, rows, strict=True):
            outer, _, inner = path.partition(".")
            said[outer] = {**said.get(outer, {}), inner: tensor} if inner else tensor
        return said


def split_call(
    arguments: Mapping[str, Any], batch: int, guided: bool, among: Sequence[str] = ()
) -> Conditions:
    """The conditions in the keyword arguments of one call of the network of `batch` rows, twice as many if
    `guided`.

    Tensors whose first dimension is the number of rows belong to the rows, unconditional first, at any depth
    of mappings, lists and tuples (IP-Adapters': a list with a tensor each); the rest, and what is `among`
    those that all rows share whatever their length, is shared.
    """
    rows = 2 * batch if guided else batch
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, value in arguments.items():
        if name != "return_dict":
            (own if name not in among and _has_rows(value, rows) else shared)[name] = value
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
