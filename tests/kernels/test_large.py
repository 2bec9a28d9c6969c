"""Indexes of more than 2^31 elements: sparse files, mapped, with the nearest row planted near their end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")]


def mapped_zeros(file: Path, count: int, width: int, dtype: type) -> Tensor:
    """Rows [count, width] of zeros that take no room on disk."""
    return torch.from_numpy(np.memmap(file, dtype=dtype, mode="w+", shape=(count, width)))


def test_bytes_beyond_two_to_the_31(tmp_path):
    width = 1024
    count = 2**31 // width + 5
    rows = mapped_zeros(tmp_path / "rows", count, width, np.uint8)
    near = torch.randint(0, 256, (width,), dtype=torch.uint8)
    rows[11], rows[count - 2] = near // 2, near
    assert rows.numel() > 2**31 and (tmp_path / "rows").stat().st_blocks * 512 < 2**20
    query = (near.double() / 255)[None]
    value, row, distance, denominator = kernels.nl2(query, rows, k=2, impl="cpp")
    second = (query - (rows[11].float() / 255).double()).square().mean().sqrt().item()
    assert row.tolist() == [count - 2] and distance.item() < 1e-7
    assert denominator.item() == pytest.approx(0.5 * (distance.item() + second) / 2, rel=1e-6)
    assert value.item() == pytest.approx(distance.item() / denominator.item(), rel=1e-6)


def test_halves_and_codes_beyond_two_to_the_31(tmp_path):
    width = 512
    count = 2**31 // width + 9
    rows = mapped_zeros(tmp_path / "rows", count, width, np.float16)
    queries = torch.nn.functional.normalize(torch.randn(2, width), dim=1)
    planted = {3: 0.5 * queries[0], 4: 0.5 * queries[1], count - 7: 0.9 * queries[1], count - 1: queries[0]}
    for row, vector in planted.items():
        rows[row] = vector.half()
    expected = [[count - 1, 3], [count - 7, 4]]
    truth = torch.stack([(rows[expected[q]].double() @ queries[q].double()) for q in (0, 1)])
    truth = (truth / queries.double().norm(dim=1, keepdim=True)).float()
    codes = kernels.encode_rows(rows, impl="cpp")
    assert torch.equal(codes.codes[list(planted)], kernels.encode_rows(rows[list(planted)]).codes)
    assert int(codes.scales.count_nonzero()) == len(planted)
    for parts in (codes, None):
        result = kernels.topk_cosine(queries, rows, 2, codes=parts, impl="cpp")
        assert result.row.tolist() == expected
        torch.testing.assert_close(result.similarity, truth, rtol=1.2e-7, atol=0)
