"""PixArt-alpha and PixArt-Sigma: a transformer whose learned variance is cut off after guidance."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amg.guidance.predict import Conditions, Same
from amg.pipelines.families.family import Family, Size, pixels_of_token

if TYPE_CHECKING:
    from amg.engine.sampler import Request

BINS = {32: 256, 64: 512, 128: 1024, 256: 2048}  # sides of a transformer's latents, and of its pictures


def encode(pipe: Any, captions: list[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """T5's tokens and which of them are the caption's, cleaned as the call cleans its prompt."""
    length = arguments.get("max_sequence_length")
    states, mask, *_ = pipe.encode_prompt(
        captions,
        do_classifier_free_guidance=False,
        num_images_per_prompt=1,
        device=pipe._execution_device,
        clean_caption=arguments.get("clean_caption", True),
        **({} if length is None else {"max_sequence_length": length}),
    )
    return states, mask


def condition(pipe: Any, request: Request, guided: bool, device: Any) -> Conditions:
    """T5's tokens, which of them are text, and, for a network of 128 latents a side, the picture's size and
    shape."""
    length = request.max_sequence_length
    found = pipe.encode_prompt(
        request.prompt,
        guided,
        negative_prompt="" if request.negative_prompt is None else request.negative_prompt,
        num_images_per_prompt=request.num_images_per_prompt,
        device=device,
        clean_caption=True,
        **({} if length is None else {"max_sequence_length": length}),
    )
    sizes = _sizes(pipe, request, found[0])
    halves = [
        {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}
        for states, mask in (found[:2], found[2:])
    ]
    return Conditions(halves[0], halves[1] if guided else None, {})


def _sizes(pipe: Any, request: Request, states: Tensor) -> dict[str, Any]:
    """PixArt-alpha's resolution [B, 2] and aspect ratio [B, 1]; nothing for any other."""
    if not (_class_of(pipe).__name__ == "PixArtAlphaPipeline" and pipe.transformer.config.sample_size == 128):
        return {"resolution": Same(None), "aspect_ratio": Same(None)}
    height, width = size_asked(pipe, request)
    resolution, ratio = (states.new_tensor([value]) for value in ((height, width), (height / width,)))
    return {
        "resolution": resolution.repeat(len(states), 1),
        "aspect_ratio": ratio.repeat(len(states), 1),
    }


def size_asked(pipe: Any, request: Request) -> Size:
    """Height and width in pixels."""
    own = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return request.height or own, request.width or own


def drawn(pipe: Any, request: Request) -> Size:
    """The size closest in shape among those that its transformer was made for."""
    size = size_asked(pipe, request)
    if request.use_resolution_binning is False:
        return size
    own, module = pipe.transformer.config.sample_size, sys.modules[_class_of(pipe).__module__]
    ratios = getattr(module, f"ASPECT_RATIO_{BINS.get(own)}_BIN", None)
    if ratios is None:
        raise ValueError(
            f"`use_resolution_binning` must be False for a transformer of {own} latents a side, as "
            f"{_class_of(pipe).__name__} knows no sizes for it, got {request.use_resolution_binning}"
        )
    for name, side in zip(("height", "width"), size, strict=True):
        if side < 1:
            raise ValueError(f"`{name}` must be >= 1, got {side}")
    height, width = pipe.image_processor.classify_height_width_bin(*size, ratios=ratios)
    return height, width


def _class_of(pipe: Any) -> type:
    """Its class in diffusers."""
    return next(base for base in type(pipe).__mro__ if base.__name__ in PIXART.classes)


PIXART = Family(
    name="PixArt",
    classes=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    encode=encode,
    said=("encoder_hidden_states", "encoder_attention_mask"),
    condition=condition,
    bare=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    takes=("timesteps", "max_sequence_length", "use_resolution_binning"),
    variances=True,
    token=pixels_of_token,
    drawn=drawn,
)
