"""Train `photos-ddpm`: a class-conditional 32x32 DDPM with a null class, until it memorises the repeated
photographs.

python benchmarks/zoo/train_ddpm.py --out amg/zoo/photos-ddpm --work /tmp/photos-ddpm
"""

from __future__ import annotations

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from training import arguments, train

from amg.zoo.photos import NULL_CLASS, training_set

DROPOUT = 0.15  # share of the labels replaced by the null class


def main() -> None:
    args = arguments(__doc__ or "", steps=5000, batch=32, learning_rate=2e-3)
    torch.manual_seed(args.seed)
    data = training_set(32)
    images = data.images.float() / 127.5 - 1
    draw = torch.repeat_interleave(torch.arange(len(images)), data.counts)
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL_CLASS + 1,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def loss(network: nn.Module, step: int) -> Tensor:
        rows = draw[torch.randint(len(draw), (args.batch,))]
        label = torch.where(torch.rand(args.batch) < DROPOUT, NULL_CLASS, data.labels[rows])
        noise = torch.randn(args.batch, *images.shape[1:])
        t = torch.randint(1000, (args.batch,))
        sample = scheduler.add_noise(images[rows], noise, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            epsilon = network(sample, t, class_labels=label).sample
        return (epsilon.float() - noise).square().mean()

    network = train(model, loss, args)
    DDPMPipeline(network.half(), scheduler).save_pretrained(args.out)


if __name__ == "__main__":
    main()
