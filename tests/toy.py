"""A small, deterministic denoiser that memorises what its condition says; indexes of the same pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amg
from amg.guidance.predict import Conditions, Denoiser

SIZE, COUNT, TRAIN_STEPS, CAPTION_WEIGHT = 8, 60, 1000, 0.1


def training_pictures() -> Tensor:
    """uint8 [COUNT, 3, SIZE, SIZE]: blocks of four random colours, so that they are far from one another."""
    generator = torch.Generator().manual_seed(11)
    blocks = torch.randint(20, 236, (COUNT, 3, 2, 2), generator=generator)
    blocks = blocks.repeat_interleave(SIZE // 2, 2).repeat_interleave(SIZE // 2, 3)
    return (blocks + torch.randint(-15, 16, blocks.shape, generator=generator)).to(torch.uint8)


@dataclass(frozen=True)
class ToyEmbedder:
    """Pooled, centred pixels through a fixed layer, [B, 40]; deliberately not normalised."""

    name: str = "toy"
    dimension: int = 40
    sha: str = "ab" * 32
    preprocessing: str = "pooled to 4x4"

    def weight(self) -> Tensor:
        return torch.randn(48, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 7

    def __call__(self, images: Tensor) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(images - 0.5, 4).flatten(1)
        projected = pooled @ self.weight().to(images)
        return projected + 0.3 * projected**3


def build(metric: str, path: Path, frequent: bool = False) -> amg.Index:
    """An index of the pictures, captions "picture i"; with `frequent` every other one "picture 0"."""
    captions = [f"picture {0 if frequent and i % 2 == 0 else i}" for i in range(COUNT)]
    embedder = ToyEmbedder() if metric == "cosine" else None
    options: dict[str, Any] = {"dtype": "float32", "near_duplicate": False, "progress": False}
    return amg.Index.build(training_pictures(), captions, embedder, path, **options)


@dataclass
class ToyNetwork:
    """eps whose x0_hat is weight·picture + (1 - weight)·tanh(conv(x_t)); remembers the rows of every call.

    A condition is `picture` [B, 3, H, W] in [-1, 1] and `weight` [B]; the unconditional one has weight 0.
    """

    dtype: torch.dtype = torch.float32
    calls: list[int] = field(default_factory=list)
    pictures_seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.kernel = (torch.randn(3, 3, 3, 3, generator=generator) * 0.2).to(self.dtype)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)

    def alpha_bar(self, t: Any) -> float:
        return float(self.alphas_cumprod[min(max(round(float(t)), 0), TRAIN_STEPS - 1)])

    def __call__(self, sample: Tensor, t: Any, *, picture: Tensor, weight: Tensor) -> Tensor:
        self.calls.append(len(sample))
        self.pictures_seen.append(picture.detach())
        share = weight.to(self.dtype).view(-1, 1, 1, 1)
        free = 0.8 * torch.tanh(torch.nn.functional.conv2d(sample, self.kernel, padding=1))
        x0 = share * picture.to(self.dtype) + (1 - share) * free
        numbers = [self.alpha_bar(one) for one in torch.as_tensor(t).reshape(-1)]  # one, or one per row
        alpha_bar = torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1, 1)
        return (sample - alpha_bar.sqrt().to(sample) * x0) / (1 - alpha_bar).sqrt().to(sample)


def picture_condition(rows: Sequence[int], weights: Sequence[float]) -> dict[str, Tensor]:
    return {"picture": training_pictures()[list(rows)].float() / 127.5 - 1, "weight": torch.tensor(weights)}


def conditions(rows: Sequence[int], weights: Sequence[float], guided: bool = True) -> Conditions:
    """Row i is drawn to picture rows[i] with weights[i]; the unconditional half to nothing."""
    cond = picture_condition(rows, weights)
    uncond = {"picture": torch.zeros_like(cond["picture"]), "weight": torch.zeros(len(weights))}
    return Conditions(cond, uncond if guided else None, {})


def encode_captions(captions: Sequence[str]) -> Mapping[str, Tensor]:
    return picture_condition(
        [int(caption.split()[1]) for caption in captions], [CAPTION_WEIGHT] * len(captions)
    )


def decode(x0: Tensor) -> Tensor:
    return x0 / 2 + 0.5


def denoiser(
    network: ToyNetwork, *, pixels: bool = True, prediction_type: str = "epsilon", text: bool = True
) -> Denoiser:
    return Denoiser(network, decode, prediction_type, pixels, encode_captions if text else None)
