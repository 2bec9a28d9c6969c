"""guided_step in C++: hands the tensors' addresses to amg._C."""

import torch
from torch import Tensor

from ..extension import DTYPE_CODES, extension
from .contract import StepTensors

NO_ROWS = (0, 0, 0, 0)  # how many the network's tensors have is looked at only where rows are numbered


def guided_step_into(*tensors: Tensor | None) -> None:
    """Compute the step into the buffers that are given; tensors in the order of StepTensors."""
    t = StepTensors._make([None if tensor is None else tensor.contiguous() for tensor in tensors])
    sample, coefficients, state, gradient = t.sample, t.coefficients, t.state, t.similarity_grad
    elements, batch = sample.numel(), sample.shape[0]
    if elements == 0:
        if t.signals is not None:
            t.signals.zero_()
        return
    dtype, network = DTYPE_CODES[sample.dtype], DTYPE_CODES[t.eps_cond.dtype]
    *per_sample, width = coefficients.shape
    extension().guided_step(
        [0 if tensor is None else tensor.data_ptr() for tensor in t],
        NO_ROWS if t.rows is None else [0 if tensor is None else tensor.shape[0] for tensor in t[1:5]],
        (batch, elements // batch),
        (width, width if per_sample else 0, 0 if state is None else state.shape[0]),
        (dtype, network, network if gradient is None else DTYPE_CODES[gradient.dtype]),
        torch.get_num_threads(),
    )
