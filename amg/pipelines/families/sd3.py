"""Stable Diffusion 3 and 3.5: flow matching, a joint transformer, up to three text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amg.pipelines.families.family import Family


def encode(pipe: Any, captions: list[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """All encoders' tokens, and CLIP's pooled text."""
    states, _, pooled, _ = pipe.encode_prompt(
        prompt=captions,
        prompt_2=None,
        prompt_3=None,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=arguments.get("clip_skip"),
        max_sequence_length=arguments.get("max_sequence_length") or 256,
    )
    return states, pooled


SD3 = Family(
    name="Stable Diffusion 3",
    classes=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ),
    encode=encode,
    said=("encoder_hidden_states", "pooled_projections"),
    bare=("StableDiffusion3Pipeline",),
    shared=("joint_attention_kwargs",),
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
)
