"""Train `photos-sd`: U-Net and text encoder of a complete Stable Diffusion at 64x64, on a trained
autoencoder's latents.

python benchmarks/zoo/train_sd.py --vae amg/zoo/photos-sd/vae --out amg/zoo/photos-sd --work /tmp/photos-sd
python benchmarks/zoo/train_sd.py ... --init amg/zoo/photos-sd    # go on from a finished model's weights
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from training import arguments, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from views import cut, jitter

from amg.zoo.photos import TrainingSet, training_set

LENGTH = 32  # tokens of a caption
CAPTION_DROPOUT = 0.12  # share of captions replaced by the empty one
WORD_DROPOUT = 0.1  # share of the words left out of half of the other captions
VIEWS = 6  # views of every crop that are trained on: itself and five jittered ones
GAMMA = 5.0  # Hang et al. 2023 (arXiv 2303.09556): the loss at a step is weighted by min(SNR, GAMMA) / SNR


class Denoiser(nn.Module):
    """U-Net and text encoder, trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


def build_tokenizer(captions: tuple[str, ...]) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format, fitted to the captions."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]
    )
    alphabet = sorted({letter for caption in captions for letter in caption.lower() if letter != " "})
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *alphabet], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=LENGTH)


def build_denoiser(tokenizer: CLIPTokenizer, channels: int) -> Denoiser:
    """Random weights: a U-Net on 8x8x16 latents and a three-layer CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    return Denoiser(unet, CLIPTextModel(config))


def drop_words(caption: str, dice: random.Random) -> str:
    """The caption as it is trained on: now and then empty, now and then short of a few words."""
    if dice.random() < CAPTION_DROPOUT:
        return ""
    if dice.random() < 0.5:
        return caption
    return " ".join(word for word in caption.split() if dice.random() >= WORD_DROPOUT)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every image's latents, in the U-Net's scale."""
    parts = [vae.encode(chunk).latent_dist for chunk in (images.float() / 127.5 - 1).split(64)]
    scale = vae.config.scaling_factor
    return torch.cat([p.mean for p in parts]) * scale, torch.cat([p.std for p in parts]) * scale


def jittered(data: TrainingSet, seed: int) -> Tensor:
    """uint8 [VIEWS, N, 3, 64, 64]: the training images, then views of their crops, zoomed in by up to an
    eighth and off centre. Whole photographs stay as they are."""
    torch.manual_seed(seed)
    views = [data.images]
    for _ in range(VIEWS - 1):
        box = jitter(torch.tensor([[0.0, 0.0, 1.0]]).repeat(len(data.images), 1), 0.88)
        box[data.whole] = torch.tensor([0.0, 0.0, 1.0])
        sources = data.images.float() / 255
        view = cut(sources, torch.arange(len(box)), box, 64, flip=0.0, oversample=1)
        views.append((view * 255).round().to(torch.uint8))
    return torch.stack(views)


def start_from(folder: Path, model: Denoiser) -> None:
    """Load a finished pipeline's U-Net and text encoder."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    model.unet.load_state_dict(unet.state_dict())
    model.text_encoder.load_state_dict(text.state_dict())


def main() -> None:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--vae", type=Path, required=True, help="folder of the trained autoencoder")
    where.add_argument("--init", type=Path, help="folder of a finished photos-sd to go on from")
    mine, sys.argv[1:] = where.parse_known_args()
    args = arguments(__doc__ or "", steps=6000, batch=32, learning_rate=1.5e-3)
    torch.manual_seed(args.seed)
    data = training_set(64)
    kept = args.work / "tokenizer"  # which ids the rarest pieces get differs from one fit to the next
    if not kept.exists():
        first = mine.init / "tokenizer" if mine.init is not None else None
        fitted = CLIPTokenizer.from_pretrained(first) if first else build_tokenizer(data.captions)
        fitted.save_pretrained(kept)
    tokenizer = CLIPTokenizer.from_pretrained(kept)
    vae = AutoencoderKL.from_pretrained(mine.vae, torch_dtype=torch.float32)
    model = build_denoiser(tokenizer, vae.config.latent_channels)
    if mine.init is not None:
        start_from(mine.init, model)
    encoded = [encode(vae, view) for view in jittered(data, args.seed)]
    mean, deviation = (torch.stack(part) for part in zip(*encoded, strict=True))
    draw = torch.repeat_interleave(torch.arange(len(data.ids)), data.counts)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

    def loss(network: nn.Module, step: int) -> Tensor:
        rows = draw[torch.randint(len(draw), (args.batch,))]
        dice = random.Random(args.seed * 1_000_003 + step)
        captions = [drop_words(data.captions[row], dice) for row in rows]
        tokens = tokenizer(
            captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        )
        view = torch.randint(VIEWS, (args.batch,))
        latents = mean[view, rows] + deviation[view, rows] * torch.randn_like(mean[view, rows])
        noise, t = torch.randn_like(latents), torch.randint(1000, (args.batch,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context = network.text_encoder(tokens.input_ids)[0]  # type: ignore[operator]
            epsilon = network.unet(scheduler.add_noise(latents, noise, t), t, context).sample  # type: ignore[operator]
        snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
        weight = snr.clamp(max=GAMMA) / snr
        return (weight * (epsilon.float() - noise).square().mean((1, 2, 3))).mean()

    network = train(model, loss, args)
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=network.text_encoder.half(),
        tokenizer=tokenizer,
        unet=network.unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(args.out)


if __name__ == "__main__":
    main()
