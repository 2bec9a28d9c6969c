"""These tests run the Triton kernels on the CPU, in a process of their own: see ../test_interpreted.py.

Kernels are interpreted only if TRITON_INTERPRET=1 is set before triton is imported; else nothing is
collected.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def listed_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the blocks that screening leaves the first query of each search, and spoil all others.

    Their rows become NaN once they are screened, so that reading one would show; floating rows only.
    """
    from amg.kernels.search import triton as search

    numbers: list[int] = []

    def spoilt(exact, kept):
        numbers.append(int(kept.sum()))
        excluded = ~kept.repeat_interleave(search.BLOCK_ROWS)[: len(exact.rows), None]
        floating = exact.rows.is_floating_point()
        return exact._replace(rows=exact.rows.masked_fill(excluded, torch.nan)) if floating else exact

    def best_row(exact, floor, upper, inner=search.best_row):
        return inner(spoilt(exact, upper[0] >= floor[0]), floor, upper)

    def sorted_rows(exact, floor, listed, number, k, inner=search.sorted_rows):
        kept = torch.zeros(listed.shape[1], dtype=torch.bool)
        kept[listed[0, : number[0]].long()] = True
        return inner(spoilt(exact, kept), floor, listed, number, k)

    monkeypatch.setattr(search, "best_row", best_row)
    monkeypatch.setattr(search, "sorted_rows", sorted_rows)
    return numbers
