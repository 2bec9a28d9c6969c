"""Stable Diffusion 1/2 and latent consistency models."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from ..integrations.conftest import tiny_sd
from .parts import IMAGES, SIZE, drawn, mask, picture, small_unet, text


def _sd(cls, **parts):
    base = tiny_sd()
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, cls)(**{**base.components, **options, **parts})


def sd(batch):
    return _sd("StableDiffusionPipeline"), text(batch)


def sd_lora(batch):
    """With a LoRA loaded on its U-Net, not fused."""
    peft = pytest.importorskip("peft")
    pipe, call = sd(batch)
    config = peft.LoraConfig(
        r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]
    )
    pipe.unet.add_adapter(config)
    return pipe, call


def sd_ip_adapter(batch):
    """With two IP-Adapters, whose images hold for every picture of a call."""
    pipe, call = sd(batch)
    unet, processors = pipe.unet, {}
    for name, attention in unet.named_modules():
        if hasattr(attention, "set_processor"):
            made = attention.processor
            if name.endswith("attn2"):
                sizes = (attention.inner_dim, unet.config.cross_attention_dim)
                made = IPAdapterAttnProcessor2_0(*sizes, num_tokens=(2, 2), scale=[1.0, 1.0])
            processors[f"{name}.processor"] = made
    unet.set_attn_processor(processors)
    layers = [ImageProjection(8, unet.config.cross_attention_dim, 2) for _ in range(2)]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    images = [3 * drawn(1, number, 8, seed=number) for number in (1, 2)]
    return pipe, {**call, IMAGES: [torch.cat([torch.zeros_like(one), one]) for one in images]}


def sd_img2img(batch):
    call = {**text(batch), "image": [picture()] * batch, "strength": 0.8}
    return _sd("StableDiffusionImg2ImgPipeline"), call


def sd_inpaint(batch):
    call = {**text(batch), "image": [picture()] * batch, "mask_image": [mask()] * batch, **SIZE}
    return _sd("StableDiffusionInpaintPipeline"), call


def sd_inpaint_9(batch):
    call = {**text(batch), "image": [picture()] * batch, "mask_image": [mask()] * batch, **SIZE}
    return _sd("StableDiffusionInpaintPipeline", unet=small_unet(in_channels=9)), call


def _control(unet):
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    for parameter in net.controlnet_down_blocks.parameters():  # they start as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def sd_controlnet(batch):
    torch.manual_seed(2)
    call = {**text(batch), "image": picture(4), **SIZE}
    pipe = _sd("StableDiffusionControlNetPipeline", controlnet=_control(tiny_sd().unet))
    return pipe, call


def lcm(batch):
    pipe = _sd(
        "LatentConsistencyModelPipeline",
        unet=small_unet(in_channels=4, time_cond_proj_dim=8),
        scheduler=diffusers.LCMScheduler(),
    )
    return pipe, {**text(batch), **SIZE}
