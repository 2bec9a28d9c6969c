"""How errors print the tensors they complain about."""

from torch import Tensor


def describe(tensor: Tensor) -> str:
    """Return shape, dtype and device of a tensor, as in "[8, 384] float16 on cuda:0"."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
