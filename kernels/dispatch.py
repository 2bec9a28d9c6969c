"""Which implementation of an op runs: the named one, or CPU → C++, CUDA → Triton, else the reference."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .extension import EXTENSION, extension

FOLDERS = {
    "guided_step": "guided_step",
    "predict_x0": "guided_step",
    "encode_rows": "top1_cosine",
    "topk_cosine": "top1_cosine",
    "nl2": "nl2",
}
HALF_TO_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
Dtypes = dict[str, tuple[torch.dtype, ...]]
CPP_DTYPES: Dtypes = {
    **dict.fromkeys(("guided_step", "predict_x0", "encode_rows", "topk_cosine"), HALF_TO_FLOAT),
    "nl2": (torch.uint8, *HALF_TO_FLOAT),
}
TRITON_DTYPES: Dtypes = {}


def choose(op: str, tensor: Tensor, impl: str | None) -> Callable:
    """Return the function that computes `op` on tensors like `tensor`.

    A named impl is used or refused (RuntimeError where it is missing, ValueError where it does not fit the
    tensor), never replaced.
    """
    if impl is None:
        return launcher(op, default_impl(op, tensor))
    if impl not in ("reference", "cpp", "triton"):
        raise ValueError(f"`impl` must be 'reference', 'cpp', 'triton' or None, got {impl!r}")
    if impl == "cpp":
        require(op, impl, tensor, CPP_DTYPES, "cpu")
        extension()
    elif impl == "triton":
        require(op, impl, tensor, TRITON_DTYPES, "cuda")
    return launcher(op, impl)


def default_impl(op: str, tensor: Tensor) -> str:
    """Return the fastest implementation there is for this op, device and dtype."""
    if tensor.device.type == "cpu" and EXTENSION is not None and tensor.dtype in CPP_DTYPES.get(op, ()):
        return "cpp"
    if tensor.device.type == "cuda" and tensor.dtype in TRITON_DTYPES.get(op, ()):
        return "triton"
    return "reference"


def require(op: str, impl: str, tensor: Tensor, table: Dtypes, device: str) -> None:
    """Raise unless `impl` of `op` exists and takes this device and dtype."""
    if op not in table:
        raise RuntimeError(f"impl={impl!r} is not available: {op} has no {impl} implementation")
    if tensor.device.type != device or tensor.dtype not in table[op]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in table[op])
        got = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        raise ValueError(f"impl={impl!r} of {op} takes {allowed} on {device}, got {got}")


@functools.cache
def launcher(op: str, impl: str) -> Callable:
    """Import and return the launcher of one implementation; only what is used is imported."""
    module = importlib.import_module(f".{FOLDERS[op]}.{impl}", __package__)
    return getattr(module, op)
