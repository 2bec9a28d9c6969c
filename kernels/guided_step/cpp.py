"""guided_step in C++: hands the tensors' addresses to amg._C."""

from typing import Any

import torch
from torch import Tensor

from ..extension import DTYPE_CODES, extension
from .contract import COEFFICIENTS


def guided_step(
    sample: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    eps_neighbour: Tensor | None,
    similarity_grad: Tensor | None,
    similarity: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return prev_sample, x0_hat and signals [B, 4]; arguments as in amg.kernels.guided_step."""
    inputs = [sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, noise, coefficients]
    outputs = [torch.empty(sample.shape, dtype=sample.dtype, device="cpu") for _ in range(2)]
    signals = torch.empty(sample.shape[0], 4, dtype=torch.float32, device="cpu")
    launch(inputs, [*outputs, signals])
    return outputs[0], outputs[1], signals


def predict_x0(
    sample: Tensor, eps_uncond: Tensor, eps_cond: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x0_hat of the plain CFG estimate and signals [B, 3]; arguments as in amg.kernels.predict_x0."""
    x0_hat = torch.empty(sample.shape, dtype=sample.dtype, device="cpu")
    signals = torch.empty(sample.shape[0], 3, dtype=torch.float32, device="cpu")
    launch([sample, eps_uncond, eps_cond, None, None, None, None, coefficients], [None, x0_hat, signals])
    return x0_hat, signals


def launch(inputs: list[Tensor | None], outputs: list[Any]) -> None:
    """Call the extension; inputs in the op's order; outputs prev_sample (or None), x0_hat, signals."""
    inputs = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    sample, similarity_grad, coefficients = inputs[0], inputs[4], inputs[-1]
    assert sample is not None and coefficients is not None
    if sample.numel() == 0:
        outputs[-1].zero_()
        return
    stride = len(COEFFICIENTS) if coefficients.dim() == 2 else 0
    batch = sample.shape[0]
    extension().guided_step(
        *map(address, inputs),
        stride,
        *map(address, outputs),
        batch,
        sample.numel() // max(batch, 1),
        DTYPE_CODES[sample.dtype],
        DTYPE_CODES[sample.dtype if similarity_grad is None else similarity_grad.dtype],
        torch.get_num_threads(),
    )


def address(tensor: Tensor | None) -> int:
    """Return where a contiguous tensor starts, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
