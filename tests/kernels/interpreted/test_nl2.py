"""The pixel metric in Triton, interpreted, against the reference: same row, same bits, whatever the data.

The interpreter's bf16 dot product is wrong, so bf16 rows are screened in fp32 on the CPU; a GPU screens them
in bf16, under the same bounds. Blocks are small so that a few hundred rows are many blocks.
"""

import pytest
import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.nl2 import triton as launchers
from amg.kernels.search import triton as search

DTYPES = [torch.uint8, torch.float32, torch.float16, torch.bfloat16]
CASES = [  # queries, rows, pixels
    ((1, 1, 1), torch.uint8),
    ((3, 60, 7), torch.float16),
    ((5, 301, 192), torch.uint8),
    ((5, 301, 192), torch.float32),
    ((17, 130, 100), torch.uint8),
    ((2, 75, 3072), torch.uint8),
    ((2, 75, 3072), torch.float16),
    ((2, 75, 3072), torch.float32),
    ((4, 200, 65), torch.bfloat16),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(search, "BLOCK_ROWS", 32)
    monkeypatch.setattr(search, "EXACT_ROWS", 32)
    monkeypatch.setattr(search, "SHARES", 24)
    monkeypatch.setattr(search, "LIST_CHUNK", 8)
    monkeypatch.setattr(search, "SCAN_CHUNK", 4)
    monkeypatch.setattr(search, "SHARE_CHUNK", 8)


def image_rows(count: int, pixels: int, dtype: torch.dtype) -> Tensor:
    return as_dtype(torch.randint(0, 256, (count, pixels)), dtype)


def as_dtype(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(torch.uint8) if dtype == torch.uint8 else (numbers / 255).to(dtype)


def as_pixels(rows: Tensor) -> Tensor:
    return rows.float() / 255 if rows.dtype == torch.uint8 else rows.float()


def assert_exact(queries: Tensor, rows: Tensor, k: int = 50, alpha: float = 0.5) -> None:
    result = kernels.nl2(queries, rows, k=k, alpha=alpha, impl="triton")
    truth = kernels.nl2(queries, rows, k=k, alpha=alpha, impl="reference")
    assert torch.equal(result.row, truth.row)
    assert torch.equal(result.distance, truth.distance)
    torch.testing.assert_close(result.denominator, truth.denominator, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(result.value, truth.value, rtol=2.4e-7, atol=0)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_random_images(shape, dtype):
    batch, count, pixels = shape
    rows = image_rows(count, pixels, dtype)
    near = as_pixels(rows)[torch.randint(count, (batch,))] + 0.02 * torch.randn(batch, pixels)
    assert_exact(near, rows, k=1)
    assert_exact(torch.rand(batch, pixels), rows, k=min(3, count), alpha=0.7)
    assert_exact(near, rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_duplicates_are_told_apart(dtype):
    """Rows a few steps from the query, where ‖q‖² − 2⟨q, r⟩ + ‖r‖² in fp32 has nothing left."""
    numbers = torch.randint(100, 150, (1, 1000)).repeat(120, 1)
    numbers[torch.arange(120), torch.randint(1000, (120,))] += torch.randint(1, 3, (120,))
    rows = as_dtype(numbers, dtype)
    query = as_pixels(rows)[[17, 110]]
    for k in (1, 50):
        assert_exact(query, rows, k)
    assert_exact(query + 1e-4 * torch.randn(2, 1000), rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_tie_to_the_lowest_row_and_zero_over_zero_is_zero(dtype):
    rows = image_rows(1, 96, dtype).repeat(300, 1)
    result = kernels.nl2(as_pixels(rows)[:1], rows, impl="triton")
    assert result.row.tolist() == [0] and result.value.tolist() == [0.0] and result.distance.tolist() == [0.0]
    assert_exact(torch.rand(3, 96), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 3])
def test_coarse_values_make_ties_the_rule(levels, dtype):
    rows = as_dtype(torch.randint(0, levels + 1, (300, 40)), dtype)
    queries = torch.randint(0, levels + 1, (3, 40)) / 255
    for k in (1, 7):
        assert_exact(queries, rows, k)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_queries_and_rows_outside_the_unit_range(dtype):
    rows = image_rows(200, 100, dtype)
    assert_exact(3 * torch.randn(3, 100), rows, k=5)
    assert_exact(1e5 * torch.randn(2, 100), rows, k=1)  # beyond fp16
    if dtype == torch.float32:
        assert_exact(torch.rand(3, 100), rows * torch.logspace(-30, 15, 200)[:, None], k=5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_bounds_hold_and_exclude(dtype, monkeypatch):
    """Block by block the smallest distance lies between the bounds, and these are close; in segments too."""
    rows, queries = image_rows(320, 1000, dtype), torch.rand(4, 1000).double()
    queries[0] = as_pixels(rows)[40].double()
    distances = (queries[:, None] - as_pixels(rows).double()).square().mean(2).sqrt()
    nearest = distances.unflatten(1, (10, 32)).amin(2)
    for segment in (1024, 256):
        monkeypatch.setattr(launchers, "BYTE_SEGMENT", segment)
        monkeypatch.setattr(launchers, "FLOAT_SEGMENT", segment)
        _, lower, upper = launchers.block_bounds(queries, rows)
        assert (-upper < nearest).all() and (nearest < -lower).all()
        assert ((upper - lower)[nearest > 0.1] < 0.01).all()


def test_the_spread_of_floating_rows_counts_every_segment(monkeypatch):
    """√(‖q − r‖² ± ρ·(‖q‖ + ‖r‖)²), the norms of all pixels: q and r lie in different segments."""
    monkeypatch.setattr(launchers, "FLOAT_SEGMENT", 64)
    halves = torch.eye(2).repeat_interleave(64, 1)
    spread = search.dot_error(64 + 2, torch.float32) * (4.0 + 8.0) ** 2
    for query, row in ((0, 1), (1, 0)):
        _, lower, upper = launchers.block_bounds(0.5 * halves[[query]].double(), halves[[row]])
        for bound, square in ((lower, 80 + spread), (upper, 80 - spread)):
            torch.testing.assert_close(bound, torch.tensor([[-((square / 128) ** 0.5)]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_most_blocks_are_never_scored_exactly(dtype, listed_blocks):
    rows = image_rows(640, 192, dtype)
    query = as_pixels(rows)[[100]] + 0.02 * torch.randn(1, 192)
    for k in (1, 3):
        assert_exact(query, rows, k)
    assert listed_blocks[0] == 1 and listed_blocks[1] < 10


def test_more_pixels_than_one_integer_segment():
    rows = torch.full((5, 70_001), 255, dtype=torch.uint8)
    rows[2, ::2] = 0
    rows[3, 5] = 254
    queries = torch.stack([torch.zeros(70_001), torch.ones(70_001)])
    assert_exact(queries, rows, k=2)
    _, lower, upper = launchers.block_bounds(queries.double(), rows)
    nearest = torch.tensor([[(35_000 / 70_001) ** 0.5], [0.0]])
    torch.testing.assert_close(-lower, nearest, rtol=0, atol=1e-5)
    torch.testing.assert_close(-upper, nearest, rtol=0, atol=1e-5)


def assert_nan(result: kernels.NL2, query: int) -> None:
    assert all(part[query].isnan() for part in (result.value, result.distance, result.denominator))
    assert result.row[query] == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_a_row_that_is_not_finite_makes_every_answer_nan(value, k):
    rows = image_rows(200, 20, torch.float32)
    rows[96:128] = 5.0  # nothing else would list this block
    rows[117, 3] = value
    found = kernels.nl2(torch.rand(3, 20), rows, k=k, impl="triton")
    for query in range(3):
        assert_nan(found, query)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_a_query_that_is_not_finite_is_nan_and_no_other_is_touched(value, k, dtype):
    rows, queries = image_rows(200, 20, dtype), torch.rand(3, 20)
    truth = kernels.nl2(queries, rows, k=k, impl="triton")
    queries[1, 7] = value
    found = kernels.nl2(queries, rows, k=k, impl="triton")
    for part, expected in zip(found, truth, strict=True):
        assert torch.equal(part[[0, 2]], expected[[0, 2]])
    assert_nan(found, 1)


def test_layouts_default_device_and_empty_batches():
    rows, queries = image_rows(90, 50, torch.uint8), torch.rand(4, 50)
    truth = kernels.nl2(queries, rows, impl="triton")
    with torch.device("meta"):
        assert all(map(torch.equal, launchers.nl2(queries, rows, 50, 0.5), truth))
    moved = (queries.t().contiguous().t(), rows.repeat_interleave(3, dim=1)[:, ::3])
    for output, expected in zip(kernels.nl2(*moved, impl="triton"), truth, strict=True):
        assert torch.equal(output, expected)
    assert [tensor.shape for tensor in kernels.nl2(queries[:0], rows, impl="triton")] == [(0,)] * 4
