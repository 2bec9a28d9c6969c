"""The pixel metric against brute force in float64 by direct difference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension)]
DTYPES = [torch.uint8, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (3, 60, 7), (5, 301, 192), (13, 130, 1000), (2, 75, 3072), (7, 500, 65)]


def image_rows(count: int, pixels: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randint(0, 256, (count, pixels))
    return rows.to(torch.uint8) if dtype == torch.uint8 else (rows / 255).to(dtype)


def as_pixels(rows: Tensor) -> Tensor:
    return (rows.float() / 255).double() if rows.dtype == torch.uint8 else rows.double()


def brute_force(queries: Tensor, rows: Tensor, k: int, alpha: float) -> tuple[Tensor, ...]:
    differences = queries.double()[:, None] - as_pixels(rows)
    distances = differences.square().mean(2).sqrt()
    ordered, order = distances.float().double().sort(dim=1, stable=True)
    distance, denominator = ordered[:, 0], alpha * ordered[:, :k].mean(1)
    return torch.where(distance == 0, 0.0, distance / denominator), order[:, 0], distance, denominator


def assert_exact(queries: Tensor, rows: Tensor, impl: str, k: int = 50, alpha: float = 0.5) -> None:
    result = kernels.nl2(queries, rows, k=k, alpha=alpha, impl=impl)
    value, row, distance, denominator = brute_force(queries, rows, k, alpha)
    assert torch.equal(result.row, row)
    torch.testing.assert_close(result.distance.double(), distance, rtol=1.2e-7, atol=1e-12)
    torch.testing.assert_close(result.denominator.double(), denominator, rtol=2.5e-7, atol=1e-12)
    torch.testing.assert_close(result.value.double(), value, rtol=4e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_random_images(impl, shape, dtype):
    batch, count, pixels = shape
    rows = image_rows(count, pixels, dtype)
    assert_exact(torch.rand(batch, pixels), rows, impl)
    near = as_pixels(rows)[torch.randint(count, (batch,))] + 0.02 * torch.randn(batch, pixels)
    for k in {1, min(count, 3), 10 * count}:
        assert_exact(near.float(), rows, impl, k=k, alpha=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_near_duplicates_are_told_apart(impl, dtype):
    """Rows a few steps from the query, where ‖q‖² − 2⟨q, r⟩ + ‖r‖² in fp32 has nothing left."""
    base = torch.randint(100, 150, (1, 3072))
    rows = base.repeat(200, 1)
    rows[torch.arange(200), torch.randint(3072, (200,))] += torch.randint(1, 3, (200,))
    rows = rows.to(torch.uint8) if dtype == torch.uint8 else (rows / 255).to(dtype)
    query = (as_pixels(rows)[[17, 150]]).float()
    assert_exact(query, rows, impl)
    assert_exact(query + 1e-4 * torch.randn(2, 3072), rows, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_copies_tie_to_the_lowest_row_and_zero_over_zero_is_zero(impl, dtype):
    rows = image_rows(1, 192, dtype).repeat(700, 1)
    exact = as_pixels(rows)[:1].float()
    result = kernels.nl2(exact, rows, impl=impl)
    assert result.row.tolist() == [0] and result.value.tolist() == [0.0]
    assert_exact(torch.rand(3, 192), rows, impl)
    value = kernels.nl2(torch.rand(3, 192), rows, impl=impl).value
    torch.testing.assert_close(value, torch.full((3,), 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_single_row_has_value_one_over_alpha(impl):
    result = kernels.nl2(torch.rand(4, 48), image_rows(1, 48, torch.uint8), alpha=0.25, impl=impl)
    torch.testing.assert_close(result.value, torch.full((4,), 4.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_outside_the_unit_range(impl):
    rows = image_rows(300, 100, torch.uint8)
    assert_exact(3 * torch.randn(6, 100), rows, impl)


@needs_extension
@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 9),
    count=st.integers(1, 150),
    pixels=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    levels=st.integers(1, 255),
    k=st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
def test_cpp_hammered_with_coarse_values(batch, count, pixels, dtype, levels, k, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, levels + 1, (count, pixels), generator=generator)
    queries = torch.randint(0, levels + 1, (batch, pixels), generator=generator) / 255
    rows = rows.to(torch.uint8) if dtype == torch.uint8 else (rows / 255).to(dtype)
    assert_exact(queries, rows, "cpp", k=k)


@needs_extension
def test_more_pixels_than_one_integer_segment():
    rows = torch.full((5, 70_001), 255, dtype=torch.uint8)
    rows[2, ::2] = 0
    assert_exact(torch.stack([torch.zeros(70_001), torch.ones(70_001)]), rows, "cpp", k=2)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_be_a_memory_map(impl, tmp_path):
    rows = image_rows(120, 75, torch.uint8)
    rows.numpy().tofile(tmp_path / "rows")
    mapped = torch.from_numpy(np.memmap(tmp_path / "rows", dtype=np.uint8, mode="r+", shape=(120, 75)))
    queries = torch.rand(3, 75)
    for from_map, truth in zip(
        kernels.nl2(queries, mapped, impl=impl), kernels.nl2(queries, rows, impl=impl), strict=True
    ):
        assert torch.equal(from_map, truth)


@needs_extension
def test_runs_and_thread_counts_agree_to_the_bit():
    rows, queries = image_rows(2000, 192, torch.uint8), torch.rand(6, 192)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(kernels.nl2(queries, rows, impl="cpp"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_and_empty_batches(impl):
    rows, queries = image_rows(90, 50, torch.uint8), torch.rand(4, 50)
    truth = kernels.nl2(queries, rows, impl=impl)
    moved = (queries.t().contiguous().t(), rows.repeat_interleave(3, dim=1)[:, ::3])
    for output, expected in zip(kernels.nl2(*moved, impl=impl), truth, strict=True):
        assert torch.equal(output, expected)
    assert [tensor.shape for tensor in kernels.nl2(queries[:0], rows, impl=impl)] == [(0,)] * 4


def assert_nan(result: kernels.NL2, query: int) -> None:
    assert all(part[query].isnan() for part in (result.value, result.distance, result.denominator))
    assert result.row[query] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("batch", "count", "k"), [(3, 600, 50), (7, 600, 1), (3, 1, 50)])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_is_not_finite_is_nan_and_no_other_is_touched(impl, batch, count, k, value, dtype):
    rows, queries = image_rows(count, 75, dtype), torch.rand(batch, 75)
    truth = kernels.nl2(queries, rows, k=k, impl=impl)
    queries[1], queries[batch - 1, 74] = value, torch.nan
    found, others = kernels.nl2(queries, rows, k=k, impl=impl), [0, *range(2, batch - 1)]
    for part, expected in zip(found, truth, strict=True):
        assert torch.equal(part[others], expected[others])
    for bad in (1, batch - 1):
        assert_nan(found, bad)
    assert_nan(kernels.nl2(queries[[1]], rows, k=k, impl=impl), 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_makes_every_answer_nan(impl, value):
    rows = image_rows(600, 20, torch.float32)
    rows[417, 3] = value
    for k in (1, 50):
        found = kernels.nl2(torch.rand(3, 20), rows, k=k, impl=impl)
        for query in range(3):
            assert_nan(found, query)


def test_bad_arguments_are_named():
    rows, queries = image_rows(10, 8, torch.uint8), torch.rand(3, 8)
    cases = {
        r"`queries` must be floating \[B, 8\] on cpu .* got \[3, 7\]": (queries[:, :7], rows, {}),
        r"`queries` must be floating .* got \[10, 8\] uint8": (rows, rows, {}),
        r"`rows` must be .* got \[10, 8\] int64": (queries, rows.long(), {}),
        r"`rows` must be .* got \[0, 8\]": (queries, rows[:0], {}),
        r"`k` must be >= 1, got 0": (queries, rows, {"k": 0}),
        r"`alpha` must be positive and finite, got -1": (queries, rows, {"alpha": -1.0}),
        r"must not require grad": (queries.clone().requires_grad_(), rows, {}),
    }
    for message, (bad_queries, bad_rows, keywords) in cases.items():
        with pytest.raises(ValueError, match=message):
            kernels.nl2(bad_queries, bad_rows, **keywords)
