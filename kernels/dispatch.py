"""Which implementation of an op runs: the named one, or CPU → C++, CUDA → Triton, else the reference."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from .extension import EXTENSION, extension
from .triton_backend import triton_devices, triton_missing

FOLDERS = {
    "guided_step_into": "guided_step",
    "encode_rows": "top1_cosine",
    "topk_cosine": "top1_cosine",
    "nl2": "nl2",
    "near_pairs": "near_pairs",
}
HALF_TO_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
COMPILED_DTYPES: dict[str, tuple[torch.dtype, ...]] = {  # of cpp and triton; the reference takes more
    **dict.fromkeys(("guided_step_into", "encode_rows", "topk_cosine"), HALF_TO_FLOAT),
    **dict.fromkeys(("nl2", "near_pairs"), (torch.uint8, *HALF_TO_FLOAT)),
}


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
        require(op, impl, tensor, ("cpu",))
        extension()
    elif impl == "triton":
        if reason := triton_missing():
            raise RuntimeError(f"impl='triton' is not available: {reason}")
        require(op, impl, tensor, triton_devices())
    return launcher(op, impl)


def default_impl(op: str, tensor: Tensor) -> str:
    """Return the fastest implementation there is for this op, device and dtype."""
    if tensor.dtype in COMPILED_DTYPES[op]:
        if tensor.device.type == "cpu" and EXTENSION is not None:
            return "cpp"
        if tensor.device.type == "cuda" and not triton_missing():
            return "triton"
    return "reference"


def require(op: str, impl: str, tensor: Tensor, devices: tuple[str, ...]) -> None:
    """Raise ValueError unless `impl` of `op` takes this dtype and device."""
    if tensor.device.type not in devices or tensor.dtype not in COMPILED_DTYPES[op]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPILED_DTYPES[op])
        got = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        raise ValueError(f"impl={impl!r} of {op} takes {allowed} on {' or '.join(devices)}, got {got}")


@functools.cache
def launcher(op: str, impl: str) -> Callable:
    """Import and return the launcher of one implementation; only what is used is imported."""
    module = importlib.import_module(f".{FOLDERS[op]}.{impl}", __package__)
    function = getattr(module, op)
    return on_device_of_first(function) if impl == "triton" else function


def on_device_of_first(function: Callable) -> Callable:
    """Wrap a launcher so that its first tensor's GPU is current: Triton launches on the current one."""

    @functools.wraps(function)
    def run(tensor: Tensor, *arguments: object) -> tuple[Tensor, ...]:
        device = tensor.device.index
        if device is None or device == torch.cuda.current_device():
            return function(tensor, *arguments)
        with torch.cuda.device_of(tensor):
            return function(tensor, *arguments)

    return run
