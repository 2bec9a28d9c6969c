"""Stable Diffusion 3."""

from __future__ import annotations

import diffusers
import torch

from ..integrations.conftest import tiny_sd
from .parts import SIZE, picture, text, vae


def _sd3_parts():
    from transformers import CLIPTextModelWithProjection

    base = tiny_sd()
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=96,
    ).eval()
    encoder = CLIPTextModelWithProjection(base.text_encoder.config).eval()
    return {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": vae(4, shift_factor=0.06, scaling_factor=1.5),
        "text_encoder": encoder,
        "tokenizer": base.tokenizer,
        "text_encoder_2": encoder,
        "tokenizer_2": base.tokenizer,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }


def sd3(batch):
    pipe = diffusers.StableDiffusion3Pipeline(**_sd3_parts())
    return pipe, {**text(batch), "max_sequence_length": 4, **SIZE}


def sd3_img2img(batch):
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**_sd3_parts())
    return pipe, {
        **text(batch),
        "max_sequence_length": 4,
        "image": [picture()] * batch,
        "strength": 0.8,
        **SIZE,
    }
