"""Tiny complete pipelines with random weights, an embedder and indexes for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")


class TinyEmbedder(nn.Module):
    name, dimension, sha, preprocessing = "tiny", 16, "0" * 64, "none"

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 16)
        )

    def forward(self, images):
        return self.net(images)


def tiny_ddpm(classes=None, cls="DDPMPipeline"):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    return getattr(diffusers, cls)(unet, diffusers.DDPMScheduler(num_train_timesteps=1000))


def tiny_sd():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,"
    vocabulary = {
        token: i
        for i, token in enumerate(
            ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
        )
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def embedder():
    return TinyEmbedder().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def pixel_index(tmp_path_factory):
    import amg

    images = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return amg.Index.build(images, None, None, tmp_path_factory.mktemp("pixels") / "p.amg", progress=False)


@pytest.fixture(scope="session")
def embedding_index(tmp_path_factory, embedder):
    import amg

    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions = [f"caption {i % 20}" for i in range(60)]
    return amg.Index.build(
        images, captions, embedder, tmp_path_factory.mktemp("embeddings") / "e.amg", progress=False
    )


@pytest.fixture
def ddpm():
    pipe = tiny_ddpm()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def class_ddpm():
    pipe = tiny_ddpm(classes=5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sd():
    return tiny_sd()
