"""Train the autoencoder of `photos-sd`: 64x64 pictures to 8x8x16 latents and back.

python benchmarks/zoo/train_vae.py --out amg/zoo/photos-sd/vae --work /tmp/photos-vae
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training import arguments, train

from amg.zoo.photos import training_set

KL_WEIGHT = 1e-5
LATENT_CHANNELS = 16  # with 4 the 8x8 latents cannot hold a face


def main() -> None:
    args = arguments(__doc__ or "", steps=2400, batch=16, learning_rate=2e-3)
    torch.manual_seed(args.seed)
    data = training_set(64)
    images = data.images.float() / 127.5 - 1
    draw = torch.repeat_interleave(torch.arange(len(images)), data.counts.clamp(max=8))
    model = AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )

    def loss(network: nn.Module, step: int) -> Tensor:
        batch = images[draw[torch.randint(len(draw), (args.batch,))]]
        batch = torch.where(torch.rand(args.batch, 1, 1, 1) < 0.5, batch.flip(-1), batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = network.encode(batch).latent_dist  # type: ignore[operator]
            decoded = network.decode(posterior.sample()).sample.float()  # type: ignore[operator]
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        edges = sum((decoded.diff(dim=d) - batch.diff(dim=d)).abs().mean() for d in (-1, -2))
        return (decoded - batch).abs().mean() + 0.5 * edges + KL_WEIGHT * kl

    network = train(model, loss, args)
    with torch.no_grad():
        chosen = images[draw[torch.randperm(len(draw))[:512]]]
        latents = network.encode(chosen).latent_dist.mode()  # type: ignore[operator]
    network.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))  # type: ignore[operator]
    network.half().save_pretrained(args.out)  # type: ignore[operator]


if __name__ == "__main__":
    main()
