"""The one place where values of tensors come to the host while samples are in flight."""

from __future__ import annotations

import torch
from torch import Tensor


def read(*columns: Tensor) -> list[list[float]]:
    """Columns [B] of any dtype as B rows of numbers, in one transfer. float64 keeps every float32 and every
    row number below 2⁵³."""
    device = columns[0].device
    return _to_host(torch.stack([column.to(device, torch.float64) for column in columns], 1))


def read_all(*tensors: Tensor) -> list[list[float]]:
    """Each tensor's values, flattened, in one transfer."""
    device = tensors[0].device
    flat = _to_host(torch.cat([tensor.detach().to(device, torch.float64).flatten() for tensor in tensors]))
    sizes = [tensor.numel() for tensor in tensors]
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def read_bytes(rows: Tensor) -> list[bytes]:
    """The bytes of each row [N, ...] as float32, in one transfer."""
    return _bytes_to_host(rows.detach().float().contiguous())


def _bytes_to_host(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.numpy(force=True)]


def _to_host(values: Tensor) -> list:
    return values.tolist()  # type: ignore[no-any-return]
