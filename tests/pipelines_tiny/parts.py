"""What the pipelines are made of, and arguments of their calls."""

from __future__ import annotations

import diffusers
import torch
from PIL import Image

SIZE = {"height": 16, "width": 16}
IMAGES = "ip_adapter_image_embeds"  # of an adapter each
PROMPTS = ("abc", "de")


def vae(channels, **more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **more,
    ).eval()


def drawn(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(batch):
    """T5's tokens of both prompts, with their masks."""
    halves = {"": 7, "negative_": 8}
    embeds = {f"{half}prompt_embeds": drawn(batch, 4, 32, seed=seed) for half, seed in halves.items()}
    return embeds | {f"{half}prompt_attention_mask": torch.ones(batch, 4) for half in halves}


def t5(tokenizer):
    """A text encoder of 32 wide tokens, for the tiny tokenizer."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(11)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def picture(seed=3):
    pixels = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


def mask():
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 16, 8))
    return mask


def small_unet(**more):
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


def prompts(batch):
    return [PROMPTS[at % 2] for at in range(batch)]


def text(batch):
    return {"prompt": prompts(batch), "guidance_scale": 5.0}


def none(*names):
    return dict.fromkeys(names)
