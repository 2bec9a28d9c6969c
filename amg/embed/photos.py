"""`photos-embedder`: the small copy-detection network bundled with the demo models.

Trained with the objective of SSCD (Pizzi et al., CVPR 2022, arXiv 2202.10261): InfoNCE over augmented copies
plus the Kozachenko-Leonenko entropy term. Script: benchmarks/zoo/train_embedder.py; card: amg/zoo/README.md.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent.parent / "zoo" / "photos-embedder" / "model.safetensors"
SIZE = 64
WIDTH = 128  # of the descriptor the objective trains
KERNEL_VARIANCE = (
    0.216  # descriptors of cosine 0.85, the edge between copies and other pictures, come out at 0.5
)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(nn.functional.silu(self.first(nn.functional.silu(self.norm(features)))))


class PhotosEmbedder(nn.Module):
    """Images float32 [B, 3, H, W] in [0, 1] -> un-normalised float32 [B, 128]; resized to 64x64
    (antialiased).

    The last, fixed layer is the random feature map of a Gaussian kernel (Rahimi and Recht 2007): the cosine
    of two embeddings is exp(-(1 - c) / 0.216), c the cosine of their descriptors, so that 0.5 means what it
    means for SSCD. No batch statistics anywhere: an image's embedding never depends on its batch-mates.
    """

    name = "photos-embedder"
    dimension = 512
    preprocessing = "antialiased bilinear resize to 64x64, (x - 0.5) / 0.25"
    sha = "untrained"

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 72, 96)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2), _Residual(widths[0])]
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), _Residual(wide)]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], WIDTH)
        generator = torch.Generator().manual_seed(0)
        # float64 would draw other numbers, whatever the host's default dtype is
        drawn = torch.randn(self.dimension, WIDTH, generator=generator, dtype=torch.float32)
        frequencies = drawn / KERNEL_VARIANCE**0.5
        phases = torch.rand(self.dimension, generator=generator, dtype=torch.float32) * 2 * math.pi
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", phases)

    def descriptor(self, images: Tensor) -> Tensor:
        """What the objective trains: un-normalised float32 [B, 128]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` must be [B, 3, H, W], got {list(images.shape)}")
        if images.shape[-2:] != (SIZE, SIZE):
            images = nn.functional.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        features = self.trunk((images - 0.5) / 0.25)
        pooled = (
            nn.functional.softplus(features.float()).clamp(min=1e-3).pow(3).mean((-2, -1)).pow(1 / 3)
        )  # GeM
        return self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        unit = nn.functional.normalize(self.descriptor(images).float())
        return (
            torch.cos(nn.functional.linear(unit, self.frequencies, self.phases)) * (2 / self.dimension) ** 0.5
        )


def load_photos(path: Path = WEIGHTS, device: str | torch.device = "cpu") -> PhotosEmbedder:
    """The bundled embedder in evaluation mode; `sha` is the SHA-256 of its weights file."""
    if not path.is_file():
        raise FileNotFoundError(f"the bundled embedder's weights are missing: {path}")
    embedder = PhotosEmbedder().float()
    embedder.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    embedder.sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return embedder.eval().requires_grad_(False).to(device)
