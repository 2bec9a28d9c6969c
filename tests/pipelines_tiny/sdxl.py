"""Stable Diffusion XL."""

from __future__ import annotations

import diffusers
import torch

from ..integrations.conftest import tiny_sd
from .parts import SIZE, mask, picture, small_unet, text
from .sd import _control


def _xl_parts(**unet):
    from transformers import CLIPTextModelWithProjection

    base = tiny_sd()
    torch.manual_seed(1)
    return {
        "vae": base.vae,
        "unet": small_unet(
            **{
                "cross_attention_dim": 32,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 16,
                **unet,
            }
        ),
        "scheduler": base.scheduler,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(base.text_encoder.config).eval(),
        "tokenizer_2": base.tokenizer,
    }


def sdxl(batch):
    return diffusers.StableDiffusionXLPipeline(**_xl_parts(), add_watermarker=False), {**text(batch), **SIZE}


def sdxl_img2img(batch):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**_xl_parts(), add_watermarker=False)
    return pipe, {**text(batch), "image": [picture()] * batch, "strength": 0.8}


def sdxl_refiner(batch):
    parts = _xl_parts(cross_attention_dim=16, projection_class_embeddings_input_dim=5 * 8 + 16)
    parts |= {"text_encoder": None, "tokenizer": None}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, add_watermarker=False, requires_aesthetics_score=True
    )
    return pipe, {**text(batch), "image": [picture()] * batch, "strength": 0.8}


def sdxl_inpaint(batch):
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**_xl_parts(), add_watermarker=False)
    return pipe, {
        **text(batch),
        "image": [picture()] * batch,
        "mask_image": [mask()] * batch,
        "strength": 0.9,
        **SIZE,
    }


def sdxl_controlnet(batch):
    parts = _xl_parts()
    parts["controlnet"] = _control(parts["unet"])
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    return pipe, {**text(batch), "image": picture(4), **SIZE}
