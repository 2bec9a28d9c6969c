"""Stable Diffusion XL: two text encoders, of which the second also pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amg.pipelines.families.family import Family


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
    bare=("StableDiffusionXLPipeline",),
    network="unet",
    sample="sample",
    encoders=("text_encoder_2", "tokenizer_2"),  # the refiner has the second one alone
)
