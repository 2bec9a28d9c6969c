"""The pixel metric in C++: hands the tensors' addresses to amg._C."""

import torch
from torch import Tensor

from ..extension import DTYPE_CODES, extension


def nl2(queries: Tensor, rows: Tensor, k: int, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value, row, distance and denominator [B]; arguments as in amg.kernels.nl2."""
    queries, rows = queries.double().contiguous(), rows.contiguous()
    value, distance, denominator = (
        torch.empty(len(queries), dtype=torch.float32, device="cpu") for _ in range(3)
    )
    row = torch.empty(len(queries), dtype=torch.int64, device="cpu")
    if len(queries) > 0:
        extension().nl2(
            queries.data_ptr(),
            rows.data_ptr(),
            *(output.data_ptr() for output in (value, row, distance, denominator)),
            len(queries),
            *rows.shape,
            k,
            alpha,
            DTYPE_CODES[rows.dtype],
            torch.get_num_threads(),
        )
    return value, row, distance, denominator
