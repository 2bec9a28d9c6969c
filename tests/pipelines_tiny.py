"""Tiny random pipelines of the families people run, with text where their encoders are small, and the
arguments of a call of each."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from PIL import Image

from .integrations.conftest import tiny_ddpm, tiny_sd

SIZE = {"height": 16, "width": 16}
IMAGES = "ip_adapter_image_embeds"  # of an adapter each
PROMPTS = ("abc", "de")


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


def _masked(batch):
    """T5's tokens of both prompts, with their masks."""
    halves = {"": 7, "negative_": 8}
    embeds = {f"{half}prompt_embeds": _embeds(batch, 4, 32, seed=seed) for half, seed in halves.items()}
    return embeds | {f"{half}prompt_attention_mask": torch.ones(batch, 4) for half in halves}


def _picture(seed=3):
    pixels = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


def _mask():
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 16, 8))
    return mask


def _unet(**more):
    options = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**{**options, "out_channels": 4, **more}).eval()


def _prompts(batch):
    return [PROMPTS[at % 2] for at in range(batch)]


def _text(batch):
    return {"prompt": _prompts(batch), "guidance_scale": 5.0}


def _sd(cls, **parts):
    base = tiny_sd()
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, cls)(**{**base.components, **options, **parts})


def sd(batch):
    return _sd("StableDiffusionPipeline"), _text(batch)


def sd_img2img(batch):
    call = {**_text(batch), "image": [_picture()] * batch, "strength": 0.8}
    return _sd("StableDiffusionImg2ImgPipeline"), call


def sd_inpaint(batch):
    call = {**_text(batch), "image": [_picture()] * batch, "mask_image": [_mask()] * batch, **SIZE}
    return _sd("StableDiffusionInpaintPipeline"), call


def sd_inpaint_9(batch):
    call = {**_text(batch), "image": [_picture()] * batch, "mask_image": [_mask()] * batch, **SIZE}
    return _sd("StableDiffusionInpaintPipeline", unet=_unet(in_channels=9)), call


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
    images = [3 * _embeds(1, number, 8, seed=number) for number in (1, 2)]
    return pipe, {**call, IMAGES: [torch.cat([torch.zeros_like(one), one]) for one in images]}


def _control(unet):
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    for parameter in net.controlnet_down_blocks.parameters():  # they start as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def sd_controlnet(batch):
    torch.manual_seed(2)
    call = {**_text(batch), "image": _picture(4), **SIZE}
    pipe = _sd("StableDiffusionControlNetPipeline", controlnet=_control(tiny_sd().unet))
    return pipe, call


def _xl_parts(**unet):
    from transformers import CLIPTextModelWithProjection

    base = tiny_sd()
    torch.manual_seed(1)
    return {
        "vae": base.vae,
        "unet": _unet(
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
    return diffusers.StableDiffusionXLPipeline(**_xl_parts(), add_watermarker=False), {**_text(batch), **SIZE}


def sdxl_img2img(batch):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**_xl_parts(), add_watermarker=False)
    return pipe, {**_text(batch), "image": [_picture()] * batch, "strength": 0.8}


def sdxl_refiner(batch):
    parts = _xl_parts(cross_attention_dim=16, projection_class_embeddings_input_dim=5 * 8 + 16)
    parts |= {"text_encoder": None, "tokenizer": None}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts, add_watermarker=False, requires_aesthetics_score=True
    )
    return pipe, {**_text(batch), "image": [_picture()] * batch, "strength": 0.8}


def sdxl_inpaint(batch):
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**_xl_parts(), add_watermarker=False)
    return pipe, {
        **_text(batch),
        "image": [_picture()] * batch,
        "mask_image": [_mask()] * batch,
        "strength": 0.9,
        **SIZE,
    }


def sdxl_controlnet(batch):
    parts = _xl_parts()
    parts["controlnet"] = _control(parts["unet"])
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    return pipe, {**_text(batch), "image": _picture(4), **SIZE}


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
        "vae": _vae(4, shift_factor=0.06, scaling_factor=1.5),
        "text_encoder": encoder,
        "tokenizer": base.tokenizer,
        "text_encoder_2": encoder,
        "tokenizer_2": base.tokenizer,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }


def sd3(batch):
    pipe = diffusers.StableDiffusion3Pipeline(**_sd3_parts())
    return pipe, {**_text(batch), "max_sequence_length": 4, **SIZE}


def sd3_img2img(batch):
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**_sd3_parts())
    return pipe, {
        **_text(batch),
        "max_sequence_length": 4,
        "image": [_picture()] * batch,
        "strength": 0.8,
        **SIZE,
    }


def _flux_parts():
    torch.manual_seed(4)
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
    return {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": _vae(1, shift_factor=0.06, scaling_factor=1.5),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }


def flux(batch):
    call = {"prompt_embeds": _embeds(batch, 4, 32), "pooled_prompt_embeds": _embeds(batch, 32)}
    return diffusers.FluxPipeline(**_flux_parts()), {**call, **SIZE}


def flux_cfg(batch):
    pipe, call = flux(batch)
    return pipe, {
        **call,
        "negative_prompt_embeds": _embeds(batch, 4, 32, seed=8),
        "negative_pooled_prompt_embeds": _embeds(batch, 32, seed=8),
        "true_cfg_scale": 3.0,
    }


def flux_img2img(batch):
    _, call = flux(batch)
    return diffusers.FluxImg2ImgPipeline(**_flux_parts()), {
        **call,
        "image": [_picture()] * batch,
        "strength": 0.8,
    }


def pixart(batch):
    torch.manual_seed(5)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    ).eval()
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
        vae=_vae(4),
        **_none("text_encoder", "tokenizer"),
    )
    call = _masked(batch) | {"negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**call, **SIZE}


def _none(*names):
    return dict.fromkeys(names)


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
        vae=_vae(4),
        **_none("text_encoder", "tokenizer"),
    )
    call = _masked(batch)
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
        **_none("text_encoder", "tokenizer"),
    )
    call = _masked(batch) | {"negative_prompt": None, "use_resolution_binning": False}
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
        **_none("text_encoder", "tokenizer"),
    )
    call = {
        "prompt_embeds": _embeds(batch, 4, 16),
        "prompt_embeds_mask": torch.ones(batch, 4, dtype=torch.int64),
        "negative_prompt_embeds": _embeds(batch, 4, 16, seed=8),
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
        vae=_vae(4, shift_factor=0.06, scaling_factor=1.5),
        **_none("text_encoder", "tokenizer"),
    )
    call = {
        "prompt_embeds": [*_embeds(batch, 4, 16)],
        "negative_prompt_embeds": [*_embeds(batch, 4, 16, seed=8)],
        "guidance_scale": 3.0,
    }
    return pipe, {**call, **SIZE}


def lcm(batch):
    pipe = _sd(
        "LatentConsistencyModelPipeline",
        unet=_unet(in_channels=4, time_cond_proj_dim=8),
        scheduler=diffusers.LCMScheduler(),
    )
    return pipe, {**_text(batch), **SIZE}


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
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=_vae(4), scheduler=diffusers.DDIMScheduler())
    return pipe, {"class_labels": [*range(batch)]}


def ddpm(batch):
    return tiny_ddpm(), {"batch_size": batch}


def ddim(batch):
    return tiny_ddpm(cls="DDIMPipeline"), {"batch_size": batch}


FAMILIES = {
    builder.__name__: builder
    for builder in (
        *(sd, sd_lora, sd_ip_adapter, sd_img2img, sd_inpaint, sd_inpaint_9, sd_controlnet),
        *(sdxl, sdxl_img2img, sdxl_refiner, sdxl_inpaint, sdxl_controlnet),
        *(sd3, sd3_img2img, flux, flux_cfg, flux_img2img, pixart),
        *(auraflow, sana, qwen, zimage, lcm, dit, ddpm, ddim),
    )
}


def build(name, batch=2, steps=4):
    """(pipeline, arguments of a call of `batch` pictures of 16x16 in `steps` steps)."""
    torch.manual_seed(0)
    pipe, call = FAMILIES[name](batch)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": steps}


def cut(call, row):
    """The arguments of a call of one of its pictures."""
    rows = {
        key: value[row : row + 1] if isinstance(value, (list, torch.Tensor)) and key != IMAGES else value
        for key, value in call.items()
    }
    return {**rows, "batch_size": 1} if "batch_size" in rows else rows
