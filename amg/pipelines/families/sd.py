"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amg.guidance.predict import Conditions
from amg.pipelines.families.family import Family

if TYPE_CHECKING:
    from amg.engine.sampler import Request


def encode(pipe: Any, captions: list[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """CLIP's hidden states."""
    found = pipe.encode_prompt(
        captions, pipe._execution_device, 1, False, clip_skip=arguments.get("clip_skip")
    )
    return (found[0],)


def condition(pipe: Any, request: Request, guided: bool, device: Any) -> Conditions:
    """CLIP's hidden states."""
    cond, uncond = pipe.encode_prompt(
        request.prompt,
        device,
        request.num_images_per_prompt,
        guided,
        negative_prompt=request.negative_prompt,
        prompt_embeds=request.prompt_embeds,
        negative_prompt_embeds=request.negative_prompt_embeds,
        clip_skip=request.clip_skip,
    )
    own, other = ({"encoder_hidden_states": states} for states in (cond, uncond))
    return Conditions(own, other if guided else None, {})


SD = Family(
    name="Stable Diffusion",
    classes=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    encode=encode,
    said=("encoder_hidden_states",),
    condition=condition,
    bare=("StableDiffusionPipeline",),
    network="unet",
    sample="sample",
)
