"""Stable Diffusion 3 and 3.5: flow matching, a joint transformer, up to three text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amg.guidance.predict import Conditions
from amg.pipelines.families.family import Family, pixels_of_token

if TYPE_CHECKING:
    from amg.engine.sampler import Request


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


def condition(pipe: Any, request: Request, guided: bool, device: Any) -> Conditions:
    """All encoders' tokens, and CLIP's pooled text."""
    cond, uncond, *pooled = pipe.encode_prompt(
        prompt=request.prompt,
        prompt_2=None,
        prompt_3=None,
        device=device,
        num_images_per_prompt=request.num_images_per_prompt,
        do_classifier_free_guidance=guided,
        negative_prompt=request.negative_prompt,
        clip_skip=request.clip_skip,
        max_sequence_length=request.max_sequence_length or 256,
    )
    halves = [
        {"encoder_hidden_states": states, "pooled_projections": text}
        for states, text in zip((cond, uncond), pooled, strict=True)
    ]
    return Conditions(halves[0], halves[1] if guided else None, {})


SD3 = Family(
    name="Stable Diffusion 3",
    classes=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ),
    encode=encode,
    said=("encoder_hidden_states", "pooled_projections"),
    condition=condition,
    bare=("StableDiffusion3Pipeline",),
    shared=("joint_attention_kwargs",),
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    takes=("clip_skip", "timesteps", "max_sequence_length"),
    flow=True,
    max_shift=1.16,
    token=pixels_of_token,
)
