"""Fréchet and kernel distances between generated and reference pictures, with any feature network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from amg.extras import needed

Network = Callable[[torch.Tensor], torch.Tensor]


def fid(generated: torch.Tensor, reference: torch.Tensor, network: Network, batch_size: int = 64) -> float:
    """Fréchet distance between Gaussians fitted to the features of two sets (Heusel et al. 2017, equation 6).

    generated, reference: float [N, 3, H, W] in [0, 1], N >= 2 each; network: float [B, 3, H, W] -> [B, D].
    The features are taken as the network gives them, the statistics in float64. State the network and the
    reference set with the number; with N below a few thousand it is biased upwards, so compare equal N only.
    """
    _check(generated, reference, 2)
    return fid_of_features(*(features_of(images, network, batch_size) for images in (generated, reference)))


def fid_of_features(generated: torch.Tensor, reference: torch.Tensor) -> float:
    """`fid` of features already taken: float [N, D] and [M, D], N and M >= 2."""
    _check_features(generated, reference, 2)
    module = _metrics().fid.FrechetInceptionDistance(feature=_AsGiven(generated.shape[1]))
    module.update(reference, real=True)
    module.update(generated, real=False)
    return float(module.compute())


def kid(
    generated: torch.Tensor,
    reference: torch.Tensor,
    network: Network,
    batch_size: int = 64,
    subsets: int = 100,
    subset_size: int = 50,
    seed: int = 0,
) -> tuple[float, float]:
    """Unbiased squared MMD with the cubic kernel (x·y/D + 1)^3 (Binkowski et al. 2018), mean and deviation.

    Shapes as in `fid`; each of `subsets` draws `subset_size` <= N features of either set, seeded by `seed`.
    """
    _check(generated, reference, subset_size)
    features = (features_of(images, network, batch_size) for images in (generated, reference))
    return kid_of_features(*features, subsets=subsets, subset_size=subset_size, seed=seed)


def kid_of_features(
    generated: torch.Tensor,
    reference: torch.Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 50,
    seed: int = 0,
) -> tuple[float, float]:
    """`kid` of features already taken: float [N, D] and [M, D], N and M >= `subset_size`."""
    _check_features(generated, reference, subset_size)
    with warnings.catch_warnings():  # that it keeps the features: they are kept already
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        module = _metrics().kid.KernelInceptionDistance(
            feature=_AsGiven(generated.shape[1]), subsets=subsets, subset_size=subset_size
        )
    module.update(reference, real=True)
    module.update(generated, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, deviation = module.compute()
    return float(mean), float(deviation)


@torch.no_grad()
def features_of(images: torch.Tensor, network: Network, batch_size: int = 64) -> torch.Tensor:
    """Features float64 [N, D] of images float [N, 3, H, W], taken `batch_size` at a time."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    parts = []
    for batch in images.split(batch_size):
        features = network(batch)
        if features.ndim != 2:
            raise ValueError(f"`network` must return [B, D], got {list(features.shape)}")
        parts.append(features.double())
    return torch.cat(parts)


class _AsGiven(torch.nn.Module):
    """What torchmetrics wants of a network, for features already taken; float64 out."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.double()


def _check_features(generated: torch.Tensor, reference: torch.Tensor, least: int) -> None:
    for name, features in (("generated", generated), ("reference", reference)):
        if features.ndim != 2 or len(features) < least or features.shape[1] != generated.shape[1]:
            want = f"[>= {least}, {generated.shape[-1]}]"
            raise ValueError(f"`{name}` must be features {want}, got {list(features.shape)}")


def _check(generated: torch.Tensor, reference: torch.Tensor, least: int) -> None:
    for name, images in (("generated", generated), ("reference", reference)):
        if images.ndim != 4 or len(images) < least or not images.is_floating_point():
            shape = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"`{name}` must be float [N, 3, H, W] in [0, 1] with N >= {least}, got {shape}")


def _metrics() -> Any:
    for name in ("fid", "kid"):
        needed(f"torchmetrics.image.{name}", "FID and KID")
    return needed("torchmetrics.image", "FID and KID")
