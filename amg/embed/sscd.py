"""SSCD, the copy-detection descriptor (Pizzi et al., CVPR 2022, arXiv 2202.10261): `sscd_disc_mixup` and its
kin.

ResNet-50, GeM pooling with p = 3, linear 2048 → 512, L2 norm. The published preprocessing for inference is a
short side of 288 (the default), or a 320×320 square, aspect ratio lost, which batches better; both with
ImageNet's mean and standard deviation. Two images with a cosine above 0.75 are copies with 90 % precision on
DISC, say the authors.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amg.embed.network import NetworkEmbedder, Preprocess, tensors_sha256
from amg.embed.resnet import ResNet50

ARCHITECTURE = "sscd-resnet50-gem3-512"
DIMENSION = 512
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZES = {"short288": ("short", 288), "square320": ("square", 320)}


class SSCD(nn.Module):
    """Normalised images [B, 3, H, W] to unit vectors [B, 512]; parameters named as in `.torchvision.pt`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNet50(DIMENSION)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.backbone(images))


def sscd_preprocess(resize: str = "short288") -> Preprocess:
    """The published preprocessing: resize "short288" (default) or "square320"."""
    if resize not in RESIZES:
        raise ValueError(f"`resize` must be one of {', '.join(RESIZES)}, got {resize!r}")
    mode, size = RESIZES[resize]
    return Preprocess((size, size), mode=mode, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)


def check_weights(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that are not SSCD's ResNet-50: names, shapes, dtypes, finite values."""
    with torch.device("meta"):
        expected = SSCD().float().state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"`{source}` must hold the {len(expected)} tensors of an SSCD ResNet-50; missing {len(missing)}: "
            f"{', '.join(missing[:3])}; unknown {len(unknown)}: {', '.join(unknown[:3])}"
        )
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(
                f"`{source}`: {name} must be {list(want.shape)} {want.dtype}, "
                f"got {list(tensor.shape)} {tensor.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{source}`: {name} must be finite, got NaN or infinity")


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a converted safetensors file; refuses another format or architecture."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"`{path}` must be a safetensors file, got no such file")
    try:
        with safe_open(path, framework="pt") as archive:
            metadata = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` must be a safetensors file, got {error}; official .pt files are converted by "
            f"`amg embedder convert IN OUT`"
        ) from error
    architecture = metadata.get("architecture", ARCHITECTURE)
    if architecture != ARCHITECTURE:
        raise ValueError(f"`{path}` must have architecture {ARCHITECTURE}, got {architecture}")
    check_weights(tensors, path)
    return tensors, metadata


def load_sscd(path: str | Path, *, resize: str = "short288") -> NetworkEmbedder:
    """SSCD from a converted safetensors file.

    path: written by `amg embedder convert`. resize: "short288" | "square320"; the latter is another embedder
    by name, because its similarities differ. Output: unit vectors [B, 512]. Errors: FileNotFoundError,
    ValueError.
    """
    preprocess = sscd_preprocess(resize)
    tensors, _ = read_weights(path)
    network = SSCD().float()
    network.load_state_dict(tensors)
    name = "sscd" if resize == "short288" else f"sscd-{resize}"
    return NetworkEmbedder(preprocess, network, name=name, dimension=DIMENSION, sha=tensors_sha256(tensors))
