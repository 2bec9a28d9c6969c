"""The cosine search against brute force in float64: the answer is *the* top-1, ties to the lowest row."""

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension)]
SEARCHES = [  # (impl, screened by codes)
    ("reference", False),
    pytest.param("cpp", False, marks=needs_extension),
    pytest.param("cpp", True, marks=needs_extension),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # queries, rows, dimension
    (1, 1, 1),
    (2, 7, 3),
    (5, 257, 64),
    (17, 1003, 100),
    (3, 300, 2048),
    (9, 50, 65),
    (49, 131, 512),
    (70, 131, 33),
    (33, 2049, 48),
    (8, 1200, 127),
]


def unit_rows(count: int, dimension: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dimension), dim=1).to(dtype)


def brute_force(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarity and row [B, k] from float64 products, summed alike for every row, rounded to fp32."""
    dots = torch.stack([(rows.double() * query).sum(1) for query in queries.double()])
    scores = (dots / queries.double().square().sum(1, keepdim=True).sqrt()).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), order


def search(queries: Tensor, rows: Tensor, k: int, impl: str, screened: bool) -> kernels.TopK:
    codes = kernels.encode_rows(rows, impl=impl) if screened else None
    return kernels.topk_cosine(queries, rows, k, codes=codes, impl=impl)


def assert_exact(queries: Tensor, rows: Tensor, k: int, impl: str, screened: bool) -> None:
    result = search(queries, rows, k, impl, screened)
    similarity, row = brute_force(queries, rows, k)
    assert torch.equal(result.row, row)
    torch.testing.assert_close(result.similarity, similarity, rtol=1.2e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "screened"), SEARCHES)
def test_random_rows(impl, screened, shape, dtype):
    batch, count, dimension = shape
    rows = unit_rows(count, dimension, dtype)
    queries = 3 * torch.randn(batch, dimension)
    for k in {1, min(count, 5), min(count, 100)}:
        assert_exact(queries, rows, k, impl, screened)


def adversarial_rows(kind: str, batch: int, dimension: int) -> tuple[Tensor, Tensor]:
    queries = torch.randn(batch, dimension)
    base = unit_rows(1, dimension)
    if kind == "all equal":
        return queries, base.repeat(900, 1)
    if kind == "near ties":  # below int8 resolution, some below fp32's
        steps = torch.logspace(-9, -4, 900)[torch.randperm(900), None]
        return queries, torch.nn.functional.normalize(base + steps * torch.randn(900, dimension), dim=1)
    if kind == "all negative":
        spread = torch.randn(900, dimension) * 0.05
        return queries[:1].repeat(batch, 1), torch.nn.functional.normalize(-queries[:1] + spread, dim=1)
    if kind == "copies":  # each row many times over
        return queries, unit_rows(30, dimension).repeat(30, 1)
    if kind == "ascending":  # every row beats the one before it
        along = torch.linspace(-1, 1, 900)[:, None]
        rows = along * base + (1 - along**2).sqrt() * torch.nn.functional.normalize(torch.randn(1, dimension))
        return base.repeat(batch, 1), torch.nn.functional.normalize(rows, dim=1)
    if kind == "spikes":  # codes of one large and many tiny values lose the tiny ones
        rows = torch.randn(900, dimension) * 1e-3
        rows[torch.arange(900), torch.randint(dimension, (900,))] = 1.0
        return queries, torch.nn.functional.normalize(rows, dim=1)
    if kind == "not unit":
        return queries, torch.randn(900, dimension) * torch.logspace(-6, 3, 900)[:, None]
    assert kind == "zeros among them"
    rows = unit_rows(900, dimension)
    rows[::3] = 0
    return queries, rows


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize(
    "kind",
    [
        "all equal",
        "near ties",
        "all negative",
        "copies",
        "ascending",
        "spikes",
        "not unit",
        "zeros among them",
    ],
)
@pytest.mark.parametrize(("impl", "screened"), SEARCHES)
def test_adversarial_rows(impl, screened, kind, batch):
    for dimension in (64, 130):
        queries, rows = adversarial_rows(kind, batch, dimension)
        for k in (1, 40):
            assert_exact(queries, rows, k, impl, screened)


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 20),
    count=st.integers(1, 300),
    dimension=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    screened=st.booleans(),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_cpp_hammered_with_coarse_values(batch, count, dimension, dtype, screened, levels, seed):
    """Values on a coarse grid make ties and near ties the rule."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-levels, levels + 1, (count, dimension), generator=generator).to(dtype) / 8
    queries = torch.randint(-levels, levels + 1, (batch, dimension), generator=generator).float()
    queries[:, 0] = levels
    assert_exact(queries, rows, 1, "cpp", screened)
    assert_exact(queries, rows, min(count, 7), "cpp", screened)


@needs_extension
@pytest.mark.parametrize("batch", [1, 8, 20])
def test_any_codes_that_keep_the_contract_are_enough(batch):
    """Clipped and coarse codes with honest scales and errors: the answer stays exact."""
    rows = unit_rows(700, 70)
    scales = rows.abs().amax(1) / 127 * torch.linspace(0.8, 40, 700)
    codes = (rows / scales[:, None]).round().clamp(-127, 127)
    errors = (rows.double() - codes.double() * scales.double()[:, None]).norm(dim=1).float() * (1 + 1e-6)
    assert codes.amin() == -127
    queries = torch.randn(batch, 70)
    found = kernels.topk_cosine(
        queries, rows, 5, codes=kernels.Codes(codes.char(), scales, errors), impl="cpp"
    )
    assert torch.equal(found.row, brute_force(queries, rows, 5)[1])


@needs_extension
def test_k_up_to_1024():
    rows, queries = unit_rows(3000, 40), torch.randn(2, 40)
    for screened in (False, True):
        assert_exact(queries, rows, 1024, "cpp", screened)
    assert_exact(queries, rows[:700], 700, "cpp", True)


@pytest.mark.parametrize("impl", IMPLS)
def test_agrees_with_faiss(impl):
    rows, queries = unit_rows(5000, 96), unit_rows(12, 96)
    index = faiss.IndexFlatIP(96)
    index.add(rows.numpy())
    similarity, row = index.search(queries.numpy(), 1)
    result = kernels.top1_cosine(queries, rows, impl=impl)
    assert torch.equal(result.row, torch.from_numpy(row[:, 0]))
    torch.testing.assert_close(result.similarity, torch.from_numpy(similarity[:, 0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_rows_bounds_what_it_loses(impl, dtype):
    rows = torch.cat(
        [unit_rows(200, 77, dtype), torch.zeros(1, 77, dtype=dtype), 1e-3 * unit_rows(20, 77, dtype)]
    )
    codes = kernels.encode_rows(rows, impl=impl)
    lost = (rows.double() - codes.scales.double()[:, None] * codes.codes.double()).norm(dim=1)
    assert (lost <= codes.errors.double()).all()
    assert (codes.errors.double() <= lost * (1 + 3e-7) + 1e-40).all(), "the bound is tight"
    assert codes.codes.abs().amax() == 127
    truth = kernels.encode_rows(rows, impl="reference")
    assert torch.equal(codes.codes, truth.codes) and torch.equal(codes.scales, truth.scales)


@needs_extension
def test_runs_and_thread_counts_agree_to_the_bit():
    rows, queries = unit_rows(4000, 64), torch.randn(20, 64)
    codes = kernels.encode_rows(rows)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(kernels.topk_cosine(queries, rows, 30, codes=codes, impl="cpp"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0].row, other.row) and torch.equal(results[0].similarity, other.similarity)


@pytest.mark.parametrize(("impl", "screened"), SEARCHES)
def test_layouts_change_nothing(impl, screened):
    rows, queries = unit_rows(100, 50), torch.randn(4, 50)
    truth = search(queries, rows, 3, impl, screened)
    strided = rows.repeat_interleave(2, dim=1)[:, ::2]
    misaligned = torch.cat([torch.zeros(1), rows.flatten()])[1:].view(100, 50)
    for moved in (strided, misaligned, rows.t().contiguous().t()):
        result = search(queries.double().t().contiguous().t(), moved, 3, impl, screened)
        assert torch.equal(result.row, truth.row) and torch.equal(result.similarity, truth.similarity)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_queries(impl):
    result = kernels.top1_cosine(torch.empty(0, 8), unit_rows(5, 8), impl=impl)
    assert result.similarity.shape == result.row.shape == (0,)


@pytest.mark.parametrize("value", [0.0, 1e-160, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (700, 1), (700, 40)])
@pytest.mark.parametrize("batch", [3, 20])
@pytest.mark.parametrize(("impl", "screened"), SEARCHES)
def test_a_query_without_a_direction_is_nan_and_no_other_is_touched(impl, screened, batch, count, k, value):
    rows, queries = unit_rows(count, 70), torch.randn(batch, 70).double()
    truth = search(queries, rows, k, impl, screened)
    queries[1], queries[batch - 1, 69] = value, torch.nan
    found, others = search(queries, rows, k, impl, screened), [0, *range(2, batch - 1)]
    assert torch.equal(found.similarity[others], truth.similarity[others])
    assert torch.equal(found.row[others], truth.row[others])
    for bad in (1, batch - 1):
        assert found.similarity[bad].isnan().all() and found.row[bad].tolist() == [0] * k
    alone = search(queries[[1]], rows, k, impl, screened)
    assert alone.similarity.isnan().all() and not alone.row.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_refused_where_they_are_encoded_and_nan_where_they_are_searched(
    impl, value
):
    rows = unit_rows(600, 20)
    rows[417, 3] = value
    for k in (1, 30):
        found = kernels.topk_cosine(torch.randn(3, 20), rows, k, impl=impl)
        assert found.similarity.isnan().all() and not found.row.any()
    with pytest.raises(ValueError, match="`rows` must be finite, got a non-finite value in row 417"):
        kernels.encode_rows(rows, impl=impl)


def test_bad_arguments_are_named():
    rows, queries = unit_rows(10, 8), torch.randn(3, 8)
    codes = kernels.encode_rows(rows)
    cases = {
        r"`queries` must be floating \[B, 8\] on cpu like `rows`, got \[3, 7\]": (
            queries[:, :7],
            rows,
            1,
            None,
        ),
        r"`rows` must be .* got \[10, 8\] float64": (queries, rows.double(), 1, None),
        r"`rows` must be .* got \[0, 8\]": (queries, rows[:0], 1, None),
        r"`k` must be in \[1, 10\], got 11": (queries, rows, 11, None),
        r"`codes.codes` must be \[9, 8\]": (queries, rows[:9], 1, codes),
        r"`codes.errors` must be \[10\]": (queries, rows, 1, codes._replace(errors=codes.errors[:4])),
        r"must not require grad": (queries.clone().requires_grad_(), rows, 1, None),
    }
    for message, (bad_queries, bad_rows, k, bad_codes) in cases.items():
        with pytest.raises(ValueError, match=message):
            kernels.topk_cosine(bad_queries, bad_rows, k, codes=bad_codes)
