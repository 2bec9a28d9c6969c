"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amg.pipelines.families.family import Family


def encode(pipe: Any, captions: list[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """CLIP's hidden states."""
    found = pipe.encode_prompt(
        captions, pipe._execution_device, 1, False, clip_skip=arguments.get("clip_skip")
    )
    return (found[0],)


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
    bare=("StableDiffusionPipeline",),
    network="unet",
    sample="sample",
)
