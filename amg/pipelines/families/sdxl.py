"""Stable Diffusion XL: two text encoders, of which the second also pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amg.guidance.predict import Conditions
from amg.pipelines.families.family import Family

if TYPE_CHECKING:
    from amg.engine.sampler import Request


def encode(pipe: Any, captions: list[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Both encoders' hidden states side by side, and the second one's pooled text."""
    states, _, pooled, _ = pipe.encode_prompt(
        captions,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=arguments.get("clip_skip"),
    )
    return states, pooled


def condition(pipe: Any, request: Request, guided: bool, device: Any) -> Conditions:
    """Both encoders' hidden states, the second one's pooled text, and sizes [B, 6]: of a picture as large as
    asked for, not cut."""
    cond, uncond, *pooled = pipe.encode_prompt(
        request.prompt,
        device=device,
        num_images_per_prompt=request.num_images_per_prompt,
        do_classifier_free_guidance=guided,
        negative_prompt=request.negative_prompt,
        clip_skip=request.clip_skip,
    )
    own = pipe.default_sample_size * pipe.vae_scale_factor
    size = (request.height or own, request.width or own)
    width = pipe.text_encoder_2.config.projection_dim
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=cond.dtype, text_encoder_projection_dim=width)
    sizes = ids.to(cond.device).repeat(len(cond), 1)
    halves = [
        {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}
        for states, text in zip((cond, uncond), pooled, strict=True)
    ]
    return Conditions(halves[0], halves[1] if guided else None, {})


SDXL = Family(
    name="Stable Diffusion XL",
    classes=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    encode=encode,
    said=("encoder_hidden_states", "added_cond_kwargs.text_embeds"),
    condition=condition,
    bare=("StableDiffusionXLPipeline",),
    network="unet",
    sample="sample",
    encoders=("text_encoder_2", "tokenizer_2"),  # the refiner has the second one alone
)
