"""FLUX.1: flow matching on packed latents; with a negative prompt its halves are two calls, without one its
guidance is distilled and there is a single call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amg.pipelines.families.family import Family


def encode(pipe: Any, captions: list[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """T5's tokens and CLIP's pooled text."""
    states, pooled, _ = pipe.encode_prompt(
        prompt=captions,
        prompt_2=None,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        max_sequence_length=arguments.get("max_sequence_length") or 512,
    )
    return states, pooled


FLUX = Family(
    name="FLUX.1",
    classes=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    encode=encode,
    said=("encoder_hidden_states", "pooled_projections"),
    bare=("FluxPipeline",),
    divisor=1000.0,
    separate=True,
    scale="true_cfg_scale",
    shared=("txt_ids", "img_ids", "joint_attention_kwargs"),
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
)
