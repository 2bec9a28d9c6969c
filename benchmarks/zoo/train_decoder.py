"""Second stage of `photos-sd`'s autoencoder: the encoder is frozen, so latents stay valid; the decoder alone
is sharpened.

python benchmarks/zoo/train_decoder.py --vae FIRST_STAGE --out amg/zoo/photos-sd/vae --work
/tmp/photos-decoder
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training import arguments, train

from amg.zoo.photos import training_set


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every image's latents, in the encoder's own scale."""
    parts = [vae.encode(chunk).latent_dist for chunk in images.split(64)]
    return torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])


class Decoder(nn.Module):
    """The trainable half of an autoencoder."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def main() -> None:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--vae", type=Path, required=True, help="folder of the first stage")
    mine, sys.argv[1:] = where.parse_known_args()
    args = arguments(__doc__ or "", steps=2000, batch=16, learning_rate=2e-3)
    data = training_set(64)
    images = data.images.float() / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(mine.vae, torch_dtype=torch.float32)
    mean, deviation = encode(vae, images)
    draw = torch.repeat_interleave(torch.arange(len(images)), data.counts.clamp(max=32))

    def loss(network: nn.Module, step: int) -> Tensor:
        rows = draw[torch.randint(len(draw), (args.batch,))]
        latents = mean[rows] + deviation[rows] * torch.randn_like(mean[rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = network(latents).float()
        edges = sum((decoded.diff(dim=d) - images[rows].diff(dim=d)).abs().mean() for d in (-1, -2))
        return (decoded - images[rows]).abs().mean() + 0.5 * edges

    network = train(Decoder(vae), loss, args)
    vae.post_quant_conv.load_state_dict(network.post_quant_conv.state_dict())  # type: ignore[union-attr]
    vae.decoder.load_state_dict(network.decoder.state_dict())  # type: ignore[union-attr]
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
