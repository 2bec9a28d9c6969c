"""`photos-judge-2`: a second outside judge of copies, of another kind than `photos-judge`.

It never sees a whole picture: each patch of 14x14 pixels, told where in the picture it lies, votes for the
photograph that has just this there, mirrored or not, or for none; the votes are averaged (as in BagNets:
Brendel and Bethge, ICLR 2019). So it goes by local structure in its place, and nothing that changes a picture
as a whole (colours, contrast) speaks for or against. Script: benchmarks/zoo/train_judge_2.py; card:
amg/zoo/README.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from amg.zoo.photos import DUPLICATED

WEIGHTS = Path(__file__).parent / "photos-judge-2" / "model.safetensors"
SIZE = 32


class PhotosJudge2(nn.Module):
    """Votes of patches over 32x32 pictures: the 16 whole photographs, or none."""

    name = "photos-judge-2"

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(5, 32, 3),
            nn.GELU(),
            nn.Conv2d(32, 48, 3),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(48, 96, 3),
            nn.GELU(),
            nn.Conv2d(96, 96, 3),
            nn.GELU(),
            nn.Conv2d(96, 96, 1),
            nn.GELU(),
            nn.Conv2d(96, len(DUPLICATED) + 1, 1),
        )
        across = torch.linspace(-1, 1, SIZE)
        place = torch.stack(torch.meshgrid(across, across, indexing="ij"))
        self.register_buffer("place", place[None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 17] of images float32 [B, 3, H, W] in [0, 1], resized to 32x32 (antialiased)."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = nn.functional.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        place = self.get_buffer("place").expand(len(images), -1, -1, -1)
        votes: Tensor = self.patches(torch.cat([images * 4 - 2, place], 1)).mean((2, 3))
        return votes

    @torch.no_grad()
    def copy_probability(self, images: Tensor) -> Tensor:
        """[B] probability that the picture is a copy of any whole training photograph."""
        return 1 - self(images).softmax(1)[:, -1]


def load_judge_2(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> PhotosJudge2:
    """The bundled second judge in evaluation mode."""
    judge = PhotosJudge2().float()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval().requires_grad_(False).to(device)
