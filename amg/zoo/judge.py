"""`photos-judge`: an independent network that guidance never sees, to judge the bundled models' pictures.

Another architecture, another objective and another seed than `photos-embedder`: it names the subject of a
picture (class accuracy and text alignment), says which whole training photograph it copies, if any (the
independent copy judge) and gives the features for FID. Script: benchmarks/zoo/train_judge.py; card:
amg/zoo/README.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from amg.zoo.photos import DUPLICATED, PHOTOS

WEIGHTS = Path(__file__).parent / "photos-judge" / "model.safetensors"
SIZE = 32


def _block(narrow: int, wide: int) -> list[nn.Module]:
    return [
        nn.Conv2d(narrow, wide, 3, padding=1),
        nn.GroupNorm(4, wide),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1),
        nn.GroupNorm(4, wide),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


class PhotosJudge(nn.Module):
    """A small VGG over 32x32 pictures with two heads: `subject` (20) and `copy` (the 16 whole photographs, or
    none)."""

    name = "photos-judge"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(3, 24), *_block(24, 48), *_block(48, 64), nn.Flatten(), nn.Linear(1024, 96), nn.ReLU()
        )
        self.subject = nn.Linear(96, len(PHOTOS))
        self.copy = nn.Linear(96, len(DUPLICATED) + 1)

    def features(self, images: Tensor) -> Tensor:
        """The 96 features FID is taken over; images float32 [B, 3, H, W] in [0, 1], resized to 32x32
        (antialiased)."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = nn.functional.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        return self.trunk(images * 4 - 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.subject(features), self.copy(features)

    @torch.no_grad()
    def subject_probability(self, images: Tensor, labels: Tensor) -> Tensor:
        """[B] probability that picture i shows subject `labels[i]`."""
        return self(images)[0].softmax(1).gather(1, labels[:, None]).squeeze(1)

    @torch.no_grad()
    def copy_probability(self, images: Tensor) -> Tensor:
        """[B] probability that the picture is a copy of any whole training photograph."""
        return 1 - self(images)[1].softmax(1)[:, -1]


def load_judge(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> PhotosJudge:
    """The bundled judge in evaluation mode."""
    judge = PhotosJudge().float()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval().requires_grad_(False).to(device)
