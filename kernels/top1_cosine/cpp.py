"""The cosine search in C++: hands the tensors' addresses to amg._C."""

import torch
from torch import Tensor

from ..extension import DTYPE_CODES, extension
from .contract import Codes


def topk_cosine(queries: Tensor, rows: Tensor, codes: Codes | None, k: int) -> tuple[Tensor, Tensor]:
    """Return similarity [B, k] and row [B, k], best first; arguments as in amg.kernels.topk_cosine."""
    queries, rows = queries.double().contiguous(), rows.contiguous()
    # on the CPU whatever the program's default device is
    similarity = torch.empty(len(queries), k, dtype=torch.float32, device="cpu")
    row = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")
    parts = [] if codes is None else [part.contiguous() for part in codes]
    if len(queries) > 0:
        extension().topk_cosine(
            queries.data_ptr(),
            rows.data_ptr(),
            *([part.data_ptr() for part in parts] or [0, 0, 0]),
            similarity.data_ptr(),
            row.data_ptr(),
            len(queries),
            *rows.shape,
            k,
            DTYPE_CODES[rows.dtype],
            torch.get_num_threads(),
        )
    return similarity, row


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [N, D], scales [N] and errors [N]; arguments as in amg.kernels.encode_rows."""
    rows = rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8, device="cpu")
    scales, errors = (torch.empty(len(rows), dtype=torch.float32, device="cpu") for _ in range(2))
    outputs = [tensor.data_ptr() for tensor in (codes, scales, errors)]
    dtype = DTYPE_CODES[rows.dtype]
    extension().encode_rows(rows.data_ptr(), dtype, *rows.shape, *outputs, torch.get_num_threads())
    return codes, scales, errors
