"""PixArt, AuraFlow, SANA, Qwen-Image, Z-Image, DiT, DDPM and DDIM."""

from __future__ import annotations

import diffusers
import torch

from ..integrations.conftest import tiny_ddpm, tiny_sd
from .parts import SIZE, drawn, masked, none, t5, text, vae


def _pixart_transformer(**more):
    torch.manual_seed(5)
    sizes = {"attention_head_dim": 8, "cross_attention_dim": 16}
    return diffusers.PixArtTransformer2DModel(
        num_layers=1,
        patch_size=2,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        **{"sample_size": 8, "use_additional_conditions": False, **sizes, **more},
    ).eval()


def pixart(batch):
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=_pixart_transformer(),
        scheduler=diffusers.DDIMScheduler(),
        vae=vae(4),
        **none("text_encoder", "tokenizer"),
    )
    call = masked(batch) | {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**call, **SIZE}


def _pixart_text(pipeline, scheduler, batch, **transformer):
    base = tiny_sd()
    pipe = pipeline(
        transformer=_pixart_transformer(**transformer),
        scheduler=scheduler,
        vae=vae(4),
        text_encoder=t5(base.tokenizer),
        tokenizer=base.tokenizer,
    )
    more = {"negative_prompt": ["z"] * batch, "max_sequence_length": 6, "use_resolution_binning": False}
    return pipe, {**text(batch), **more, **SIZE}


def pixart_text(batch):
    """With its text encoder."""
    return _pixart_text(diffusers.PixArtSigmaPipeline, diffusers.DDIMScheduler(), batch)


def pixart_alpha_text(batch):
    """PixArt-alpha of 128 latents a side, which is told the size of the picture."""
    told = {"sample_size": 128, "use_additional_conditions": True}
    told |= {"attention_head_dim": 12, "cross_attention_dim": 24}
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_end=0.012, beta_schedule="scaled_linear")
    return _pixart_text(diffusers.PixArtAlphaPipeline, scheduler, batch, **told)


def auraflow(batch):
    torch.manual_seed(6)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    ).eval()
    pipe = diffusers.AuraFlowPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        **none("text_encoder", "tokenizer"),
    )
    call = masked(batch)
    return pipe, {**call, **SIZE}


def sana(batch):
    torch.manual_seed(7)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=32,
        sample_size=8,
    ).eval()
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    ).eval()
    pipe = diffusers.SanaPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        **none("text_encoder", "tokenizer"),
    )
    call = masked(batch) | {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**call, "height": 32, "width": 32}


def qwen(batch):
    torch.manual_seed(8)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.1, 0.9, 1.0, 1.2],
    ).eval()
    pipe = diffusers.QwenImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        **none("text_encoder", "tokenizer"),
    )
    call = {
        "prompt_embeds": drawn(batch, 4, 16),
        "prompt_embeds_mask": torch.ones(batch, 4, dtype=torch.int64),
        "negative_prompt_embeds": drawn(batch, 4, 16, seed=8),
        "negative_prompt_embeds_mask": torch.ones(batch, 4, dtype=torch.int64),
        "true_cfg_scale": 3.0,
    }
    return pipe, {**call, **SIZE}


def zimage(batch):
    torch.manual_seed(9)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    pipe = diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(4, shift_factor=0.06, scaling_factor=1.5),
        **none("text_encoder", "tokenizer"),
    )
    call = {
        "prompt_embeds": [*drawn(batch, 4, 16)],
        "negative_prompt_embeds": [*drawn(batch, 4, 16, seed=8)],
        "guidance_scale": 3.0,
    }
    return pipe, {**call, **SIZE}


def dit(batch):
    torch.manual_seed(0)
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
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae(4), scheduler=diffusers.DDIMScheduler())
    return pipe, {"class_labels": [*range(batch)]}


def ddpm(batch):
    return tiny_ddpm(), {"batch_size": batch}


def ddim(batch):
    return tiny_ddpm(cls="DDIMPipeline"), {"batch_size": batch}
