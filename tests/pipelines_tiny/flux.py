"""FLUX.1."""

from __future__ import annotations

import diffusers
import torch

from ..integrations.conftest import tiny_sd
from .parts import SIZE, drawn, picture, prompts, t5, vae


def _flux_parts(**more):
    torch.manual_seed(4)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        **{"pooled_projection_dim": 32, **more},
    ).eval()
    return {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": vae(1, shift_factor=0.06, scaling_factor=1.5),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }


def flux(batch):
    call = {"prompt_embeds": drawn(batch, 4, 32), "pooled_prompt_embeds": drawn(batch, 32)}
    return diffusers.FluxPipeline(**_flux_parts()), {**call, **SIZE}


def flux_cfg(batch):
    pipe, call = flux(batch)
    return pipe, {
        **call,
        "negative_prompt_embeds": drawn(batch, 4, 32, seed=8),
        "negative_pooled_prompt_embeds": drawn(batch, 32, seed=8),
        "true_cfg_scale": 3.0,
    }


def flux_text(batch):
    """With its text encoders, true CFG and an embedding of its distilled scale."""
    base = tiny_sd()
    parts = _flux_parts(pooled_projection_dim=16, guidance_embeds=True)
    parts |= {"text_encoder": base.text_encoder, "tokenizer": base.tokenizer}
    parts |= {"text_encoder_2": t5(base.tokenizer), "tokenizer_2": base.tokenizer}
    scales = {"guidance_scale": 2.5, "true_cfg_scale": 3.0}
    text = {"prompt": prompts(batch), "negative_prompt": ["z"] * batch, "max_sequence_length": 4}
    return diffusers.FluxPipeline(**parts), {**text, **scales, **SIZE}


def flux_img2img(batch):
    _, call = flux(batch)
    return diffusers.FluxImg2ImgPipeline(**_flux_parts()), {
        **call,
        "image": [picture()] * batch,
        "strength": 0.8,
    }
