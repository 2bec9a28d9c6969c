"""FLUX.1: flow matching on packed latents; with a negative prompt its halves are two calls, without one its
guidance is distilled and there is a single call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amg.guidance.predict import Conditions
from amg.pipelines.families.family import Family

if TYPE_CHECKING:
    from amg.engine.sampler import Request

DISTILLED_SCALE = 3.5  # that the network is told, where none is asked for


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


def condition(pipe: Any, request: Request, guided: bool, device: Any) -> Conditions:
    """T5's tokens, CLIP's pooled text and the scale of its distilled guidance; where the tokens stand is
    shared."""
    halves = [
        _half(pipe, request, text, device) for text in (request.prompt, request.negative_prompt)[: 1 + guided]
    ]
    states = halves[0]["encoder_hidden_states"]
    rows, columns = (
        (side or pipe.default_sample_size * pipe.vae_scale_factor) // pixels_of_token(pipe)
        for side in (request.height, request.width)
    )
    kind = (states.dtype, states.device)
    places = {"txt_ids": text_places(states.shape[1], *kind), "img_ids": image_places(rows, columns, *kind)}
    return Conditions(halves[0], halves[1] if guided else None, places)


def _half(pipe: Any, request: Request, text: Any, device: Any) -> dict[str, Any]:
    states, pooled, _ = pipe.encode_prompt(
        prompt=text,
        prompt_2=None,
        device=device,
        num_images_per_prompt=request.num_images_per_prompt,
        max_sequence_length=request.max_sequence_length or 512,
    )
    half = {"encoder_hidden_states": states, "pooled_projections": pooled}
    if pipe.transformer.config.guidance_embeds:
        scale = DISTILLED_SCALE if request.guidance_scale is None else float(request.guidance_scale)
        half["guidance"] = torch.full([len(states)], scale, dtype=torch.float32, device=device)
    return half


@functools.lru_cache(64)
def text_places(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where text stands: nowhere, [T, 3]. Equal ones are the same tensor, so that requests share calls."""
    with torch.inference_mode(False):
        return torch.zeros(tokens, 3, dtype=dtype, device=device)


@functools.lru_cache(64)
def image_places(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the tokens of a picture stand, [rows·columns, 3]: (0, row, column)."""
    with torch.inference_mode(False):
        places = [torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))]
        return torch.cartesian_prod(*places).to(device, dtype)


def sigmas_of(pipe: Any, steps: int) -> list[float] | None:
    """The pipeline's own levels, from 1 down to 1 / steps."""
    if pipe.scheduler.config.get("use_flow_sigmas"):
        return None
    return [float(level) for level in np.linspace(1.0, 1 / steps, steps)]


def pixels_of_token(pipe: Any) -> int:
    """Two by two latents are packed into one."""
    return 2 * int(pipe.vae_scale_factor)


FLUX = Family(
    name="FLUX.1",
    classes=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    encode=encode,
    said=("encoder_hidden_states", "pooled_projections"),
    condition=condition,
    bare=("FluxPipeline",),
    divisor=1000.0,
    separate=True,
    scale="true_cfg_scale",
    shared=("txt_ids", "img_ids", "joint_attention_kwargs"),
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    takes=("max_sequence_length", "true_cfg_scale"),
    flow=True,
    sigmas=sigmas_of,
    packed=4,
    token=pixels_of_token,
)
