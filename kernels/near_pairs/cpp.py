"""near_pairs in C++: hands the tensors' addresses to amg._C."""

import torch
from torch import Tensor

from ..extension import DTYPE_CODES, extension
from ..top1_cosine.contract import Codes
from .contract import NearPairs, reach


def near_pairs(
    rows: Tensor, others: Tensor, sketches: Tensor, codes: Codes, least: float, earlier: bool
) -> NearPairs:
    """Arguments as in amg.kernels.near_pairs."""
    tensors = [tensor.contiguous() for tensor in (rows, others, sketches, *codes)]
    answer: list[Tensor] = []

    def allocate(count: int) -> list[int]:
        kinds = (torch.int64, torch.int64, torch.float32)
        answer.extend(torch.empty(count, dtype=kind, device="cpu") for kind in kinds)
        return [tensor.data_ptr() for tensor in answer]

    extension().near_pairs(
        *(tensor.data_ptr() for tensor in tensors),
        (len(rows), len(others), rows.shape[1]),
        DTYPE_CODES[rows.dtype],
        reach(rows.shape[1], rows.dtype, least),
        least,
        earlier,
        torch.get_num_threads(),
        allocate,
    )
    return NearPairs(*answer)
