"""The cosine search in C++: hands the tensors' addresses to amg._C."""

import torch
from torch import Tensor

from ..extension import DTYPE_CODES, extension
from .contract import Codes, Panels


def topk_cosine(
    queries: Tensor, rows: Tensor, codes: Codes | Panels | None, k: int, limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return similarity [B, k] and row [B, k], best first; arguments as in amg.kernels.topk_cosine."""
    queries, rows = queries.double().contiguous(), rows.contiguous()
    # on the CPU whatever the program's default device is
    similarity = torch.empty(len(queries), k, dtype=torch.float32, device="cpu")
    row = torch.empty(len(queries), k, dtype=torch.int64, device="cpu")
    turned, width = queries, 0
    given = () if codes is None else codes[:4]
    parts: list[Tensor | None] = [part.contiguous() for part in given]
    parts += [None] * (4 - len(parts))
    if isinstance(codes, Panels):
        width = 4 * codes.codes.shape[2]
        turned = queries if codes.rotation is None else queries @ codes.rotation
    tensors = (queries, turned, rows, *parts, None if limit is None else limit.contiguous(), similarity, row)
    if len(queries) > 0:
        extension().topk_cosine(
            [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
            (len(queries), *rows.shape, k, width),
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
