"""Train the CIFAR-10 benchmark's model: a class-conditional 32x32 DDPM with a null class, until it memorises
the repeated images.

python benchmarks/cifar/train.py --data train.parquet --out benchmarks/cifar/model --work /tmp/cifar-ddpm
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from data import NULL_CLASS, training_subset
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "zoo"))
from training import train

DROPOUT = 0.15  # share of the labels replaced by the null class


def main() -> None:
    args = _arguments()
    torch.manual_seed(args.seed)
    data = training_subset(args.data)
    images = data.images.float() / 127.5 - 1
    draw = torch.repeat_interleave(torch.arange(len(images)), data.counts)
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

    network = train(_network(), loss, args)
    DDPMPipeline(network.half(), scheduler).save_pretrained(args.out)


def _network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL_CLASS + 1,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's training split as Parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder the finished model is written to")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable checkpoint")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args()


if __name__ == "__main__":
    main()
