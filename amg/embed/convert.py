"""The official SSCD files to safetensors: weights files, or TorchScript when it is asked for."""

import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.embed.network import file_sha256, tensors_sha256
from amg.embed.sscd import ARCHITECTURE, SSCD, check_weights, read_weights, sscd_preprocess
from amg.replacing import replacing

CLASSY_BLOCK = re.compile(
    r"backbone\.blocks\.(\d+)\.(\d+)\.(?:_module\.)?(convolutional_block\.\d|bn|downsample\.\d)\.(\w+)"
)
CLASSY_PARTS = {
    "convolutional_block.0": "conv1",
    "convolutional_block.1": "bn1",
    "convolutional_block.3": "conv2",
    "convolutional_block.4": "bn2",
    "convolutional_block.6": "conv3",
    "bn": "bn3",
    "downsample.0": "downsample.0",
    "downsample.1": "downsample.1",
}
CLASSY_STEMS = {
    "backbone.initial_block._module.0.": "backbone.conv1.",
    "backbone.initial_block._module.1.": "backbone.bn1.",
    "embeddings.1.": "backbone.fc.",
}


@dataclass(frozen=True)
class WeightsInfo:
    """What a converted file is; `parameters` without running statistics, `sha` as embedders carry it."""

    path: Path
    architecture: str
    parameters: int
    sha: str
    file_sha256: str
    source_sha256: str
    source_format: str
    preprocessing: str


def is_torchscript(path: Path) -> bool:
    """True for a zip archive with a `constants.pkl` at its first level: a program, not only weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.namelist())


def torchvision_name(name: str) -> str:
    """A parameter name of the Classy Vision layout in torchvision's; any other name as it is."""
    block = CLASSY_BLOCK.fullmatch(name)
    if block and block[3] in CLASSY_PARTS:
        return f"backbone.layer{int(block[1]) + 1}.{block[2]}.{CLASSY_PARTS[block[3]]}.{block[4]}"
    for stem, replacement in CLASSY_STEMS.items():
        if name.startswith(stem):
            return replacement + name.removeprefix(stem)
    return name


def read_plain(source: Path) -> dict[str, Tensor]:
    """Tensors of a `.pt` weights file, read with `weights_only=True`: nothing in the file is executed."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"`{source}` must be a file of plain tensors (the official .torchvision.pt); "
            f"torch.load(weights_only=True) refused it: {reason}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = (
            f"a dict with keys {', '.join(map(str, list(content)[:3]))}" if isinstance(content, dict) else ""
        )
        raise ValueError(
            f"`{source}` must be a dict of names to tensors, got {found or type(content).__name__}"
        )
    return {torchvision_name(name): tensor for name, tensor in content.items()}


@torch.no_grad()
def read_torchscript(source: Path) -> dict[str, Tensor]:
    """Tensors of a TorchScript archive, kept only if our network then gives what the archive's own program
    gives.

    Loading executes the archive's program: only for files whose origin is trusted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.jit.load(source, map_location="cpu").eval()
    tensors = {torchvision_name(name): tensor.detach() for name, tensor in program.state_dict().items()}
    check_weights(tensors, source)
    network = SSCD().float().eval()
    network.load_state_dict(tensors)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    error = float((network(images) - program(images)).abs().max())
    if not error < 1e-4:
        raise ValueError(
            f"`{source}` must compute SSCD; on a random image its output differs from ours by {error:.2g}"
        )
    return tensors


def write_weights(tensors: dict[str, Tensor], destination: Path, metadata: dict[str, str]) -> None:
    """Safetensors, written beside `destination` and renamed: a killed conversion leaves no half file."""
    from safetensors.torch import save_file

    with replacing(destination) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)


def check_paths(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuse a missing source, a missing folder for the destination, and silent replacement."""
    if not source.is_file():
        raise FileNotFoundError(f"`source` must be an existing file, got {source}")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"`destination` must lie in an existing folder, got {destination}")
    if destination.exists() and not overwrite:
        raise FileExistsError(
            f"`destination` must not exist (or pass `overwrite` / --force), got {destination}"
        )


def convert_sscd(
    source: str | Path, destination: str | Path, *, allow_torchscript: bool = False, overwrite: bool = False
) -> WeightsInfo:
    """Official SSCD ResNet-50 weights to safetensors, atomically.

    source: `.torchvision.pt` (or `.classy.pt`), read with `weights_only=True`; a TorchScript file holds a
    program and is refused unless `allow_torchscript`. destination: `*.safetensors`, which must not exist
    unless `overwrite`. Errors: FileNotFoundError, FileExistsError, ValueError, OSError; none leaves a file
    behind.
    """
    source, destination = Path(source), Path(destination)
    check_paths(source, destination, overwrite)
    torchscript = is_torchscript(source)
    if torchscript and not allow_torchscript:
        raise ValueError(
            f"`source` must be a weights file, got a TorchScript program ({source}): loading it runs code; "
            f"use the .torchvision.pt file, or pass `allow_torchscript` / --allow-torchscript if you trust it"
        )
    tensors = read_torchscript(source) if torchscript else read_plain(source)
    check_weights(tensors, source)
    metadata = {
        "architecture": ARCHITECTURE,
        "source_sha256": file_sha256(source),
        "source_format": "torchscript" if torchscript else "state_dict",
    }
    write_weights(tensors, destination, metadata)
    return weights_info(destination)


def weights_info(path: str | Path) -> WeightsInfo:
    """Read and check a converted file, and say what it is."""
    tensors, metadata = read_weights(path)
    statistics: Any = ("running_mean", "running_var", "num_batches_tracked")
    return WeightsInfo(
        path=Path(path),
        architecture=metadata.get("architecture", "not stated"),
        parameters=sum(t.numel() for name, t in tensors.items() if not name.endswith(statistics)),
        sha=tensors_sha256(tensors),
        file_sha256=file_sha256(path),
        source_sha256=metadata.get("source_sha256", "not stated"),
        source_format=metadata.get("source_format", "not stated"),
        preprocessing=str(sscd_preprocess()),
    )
