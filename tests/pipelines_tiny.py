"""Tiny random pipelines of the families people run, called with embeddings: no text encoder is needed."""

from __future__ import annotations

import diffusers
import torch


def _vae(channels, **more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **more,
    ).eval()


def _embeds(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sd3(batch):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=96,
    ).eval()
    parts = dict.fromkeys(
        (*(f"text_encoder{n}" for n in ("", "_2", "_3")), *(f"tokenizer{n}" for n in ("", "_2", "_3")))
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, shift_factor=0.06, scaling_factor=1.5),
        **parts,
    )
    call = {
        "prompt_embeds": _embeds(batch, 4, 32),
        "negative_prompt_embeds": _embeds(batch, 4, 32, seed=8),
        "pooled_prompt_embeds": _embeds(batch, 64),
        "negative_pooled_prompt_embeds": _embeds(batch, 64, seed=8),
    }
    return pipe, call


def flux(batch):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(1, shift_factor=0.06, scaling_factor=1.5),
        **parts,
    )
    return pipe, {"prompt_embeds": _embeds(batch, 4, 32), "pooled_prompt_embeds": _embeds(batch, 32)}


def dit(batch):
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        attention_bias=True,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
    ).eval()
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=_vae(4), scheduler=diffusers.DDIMScheduler())
    return pipe, {"class_labels": [*range(batch)]}


FAMILIES = {"sd3": sd3, "flux": flux, "dit": dit}


def build(name, batch=2):
    """(pipeline, arguments of a call of `batch` pictures of 16x16 in two steps)."""
    torch.manual_seed(0)
    pipe, call = FAMILIES[name](batch)
    pipe.set_progress_bar_config(disable=True)
    if name != "dit":
        call |= {"height": 16, "width": 16}
    return pipe, {**call, "num_inference_steps": 2}
