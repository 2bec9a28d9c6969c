"""Contract of guided_step: result types and argument checks shared by every implementation."""

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import describe

COEFFICIENTS = (
    "k_sample",
    "k_eps",
    "k_noise",
    "sqrt_one_minus_alpha_bar",
    "inv_sqrt_alpha_bar",
    "threshold",
    "s0",
    "c1",
    "c2",
    "c3",
)
K_NOISE = COEFFICIENTS.index("k_noise")


class GuidedStep(NamedTuple):
    """x_{t-1}, x̂0 (both like `sample`) and the free signals [B, 4]; the signals are described in ops.py."""

    prev_sample: Tensor
    x0_hat: Tensor
    signals: Tensor


class PredictX0(NamedTuple):
    """x̂0 of the plain CFG estimate (like `sample`) and its free signals [B, 3]."""

    x0_hat: Tensor
    signals: Tensor


def check_like_sample(name: str, tensor: Tensor | None, sample: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has sample's shape, device and dtype (or one of `dtypes`)."""
    if tensor is None:
        return
    right_dtype = tensor.dtype == sample.dtype or tensor.dtype in dtypes
    if right_dtype and tensor.shape == sample.shape and tensor.device == sample.device:
        return
    allowed = (sample.dtype, *dtypes)
    expected = f"{list(sample.shape)} {' or '.join(dict.fromkeys(map(str, allowed)))} on {sample.device}"
    raise ValueError(f"`{name}` must be {expected} like `sample`, got {describe(tensor)}")


def check_coefficients(coefficients: Tensor, sample: Tensor) -> None:
    """Raise ValueError unless `coefficients` is one fp32 row or one a sample (or fp64 like the sample)."""
    width = len(COEFFICIENTS)
    shapes = ((width,), (sample.shape[0], width))
    dtypes = (torch.float32, torch.float64) if sample.dtype == torch.float64 else (torch.float32,)
    if coefficients.shape in shapes and coefficients.dtype in dtypes and coefficients.device == sample.device:
        return
    raise ValueError(
        f"`coefficients` must be [{width}] or [B, {width}] float32 on {sample.device} with B = "
        f"{sample.shape[0]}, got {describe(coefficients)}"
    )


def check_sample(sample: Tensor, *eps: tuple[str, Tensor | None]) -> None:
    """Raise ValueError unless `sample` is a floating batch and every named eps is like it."""
    if sample.dim() < 2 or not sample.is_floating_point():
        raise ValueError(f"`sample` must be floating [B, C, H, W], got {describe(sample)}")
    for name, tensor in eps:
        check_like_sample(name, tensor, sample)


def check_similarity(similarity: Tensor | None, sample: Tensor, **needs_it: Tensor | None) -> None:
    """Raise ValueError unless `similarity` is there when needed, [B] fp32 and (looked at on CPU) finite."""
    if similarity is None:
        for name, tensor in needs_it.items():
            if tensor is not None:
                raise ValueError(f"`{name}` needs `similarity` to open or close the gate, got None")
        return
    dtypes = (torch.float32, torch.float64) if sample.dtype == torch.float64 else (torch.float32,)
    if (
        similarity.shape != sample.shape[:1]
        or similarity.dtype not in dtypes
        or similarity.device != sample.device
    ):
        expected = f"[{sample.shape[0]}] float32 on {sample.device}"
        raise ValueError(f"`similarity` must be {expected}, got {describe(similarity)}")
    for number, value in enumerate(similarity.tolist() if similarity.device.type == "cpu" else ()):
        if not isfinite(value):
            raise ValueError(f"`similarity` must be finite, got {value} for sample {number}")


def check_noise(noise: Tensor | None, coefficients: Tensor, sample: Tensor) -> None:
    """Raise ValueError where k_noise asks for noise that was not given (looked at on CPU only)."""
    check_like_sample("noise", noise, sample)
    if noise is not None or coefficients.device.type != "cpu":
        return
    if any(row[K_NOISE] != 0 for row in coefficients.view(-1, len(COEFFICIENTS)).tolist()):
        raise ValueError("`noise` must be given where coefficients[k_noise] is not 0, got noise=None")
