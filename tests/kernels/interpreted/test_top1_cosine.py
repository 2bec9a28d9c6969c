"""The cosine search in Triton, interpreted, against the reference: same row, same bits, whatever the data.

The interpreter's bf16 dot product is wrong, so bf16 rows are screened in fp32 on the CPU; a GPU screens them
in bf16, under the same bounds. Blocks are small so that a few hundred rows are many blocks.
"""

import pytest
import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.search import triton as search
from amg.kernels.top1_cosine import triton as launchers

from ... import reads

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [  # queries, rows, dimension
    ((1, 1, 1), torch.float32),
    ((2, 7, 3), torch.float16),
    ((5, 257, 64), torch.bfloat16),
    ((5, 257, 64), torch.float32),
    ((17, 140, 100), torch.float32),
    ((17, 140, 100), torch.float16),
    ((1, 301, 520), torch.float16),
    ((1, 301, 520), torch.bfloat16),
    ((3, 90, 2048), torch.float32),
    ((65, 33, 40), torch.float16),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(search, "BLOCK_ROWS", 32)
    monkeypatch.setattr(search, "SHARES", 24)
    monkeypatch.setattr(search, "LIST_CHUNK", 8)
    monkeypatch.setattr(search, "SCAN_CHUNK", 4)
    monkeypatch.setattr(search, "SHARE_CHUNK", 8)


def unit_rows(count: int, dimension: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dimension), dim=1).to(dtype)


def assert_exact(queries: Tensor, rows: Tensor, k: int, screened: bool) -> None:
    codes = kernels.encode_rows(rows, impl="reference") if screened else None
    result = kernels.topk_cosine(queries, rows, k, codes=codes, impl="triton")
    truth = kernels.topk_cosine(queries, rows, k, impl="reference")
    assert torch.equal(result.row, truth.row)
    assert torch.equal(result.similarity, truth.similarity)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("screened", [False, True])
def test_random_rows(screened, shape, dtype):
    batch, count, dimension = shape
    rows, queries = unit_rows(count, dimension, dtype), 3 * torch.randn(batch, dimension)
    for k in {1, min(count, 5)}:
        assert_exact(queries, rows, k, screened)


def adversarial_rows(kind: str, queries: Tensor, count: int = 300) -> Tensor:
    dimension = queries.shape[1]
    base = unit_rows(1, dimension)
    if kind == "all equal":
        return base.repeat(count, 1)
    if kind == "near ties":  # below int8's and TF32's resolution, some below fp32's
        steps = torch.logspace(-9, -4, count)[torch.randperm(count), None]
        return torch.nn.functional.normalize(base + steps * torch.randn(count, dimension), dim=1)
    if kind == "all negative":
        spread = torch.randn(count, dimension) * 0.05
        return torch.nn.functional.normalize(-queries[:1] + spread, dim=1)
    if kind == "copies":
        return unit_rows(count // 10, dimension).repeat(10, 1)
    if kind == "spikes":  # codes of one large and many tiny values lose the tiny ones
        rows = torch.randn(count, dimension) * 1e-3
        rows[torch.arange(count), torch.randint(dimension, (count,))] = 1.0
        return torch.nn.functional.normalize(rows, dim=1)
    if kind == "not unit":
        return torch.randn(count, dimension) * torch.logspace(-6, 3, count)[:, None]
    if kind == "tiny":
        return torch.randn(count, dimension) * torch.logspace(-40, -15, count)[:, None]
    if kind == "coarse":  # equal scores are the rule, also across blocks
        return torch.randint(-1, 2, (count, dimension)) / 8
    assert kind == "zeros"
    rows = unit_rows(count, dimension)
    rows[::3] = 0
    return rows


KINDS = [
    "all equal",
    "near ties",
    "all negative",
    "copies",
    "spikes",
    "not unit",
    "tiny",
    "coarse",
    "zeros",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("screened", [False, True])
def test_adversarial_rows(screened, kind):
    queries = torch.randint(-2, 3, (3, 70)).float()
    queries[:, 0] = 1
    rows = adversarial_rows(kind, queries)
    for k in (1, 6):
        assert_exact(queries, rows, k, screened)


@pytest.mark.parametrize("screened", [False, True])
def test_k_of_hundreds_where_a_program_takes_many_blocks(screened, monkeypatch):
    monkeypatch.setattr(search, "BLOCK_ROWS", 16)
    monkeypatch.setattr(search, "KEPT", 700)
    rows = unit_rows(1100, 48)
    for k in (64, 300):
        assert_exact(torch.randn(1, 48), rows, k, screened)
    assert_exact(torch.randn(1, 48), rows[:1].repeat(1100, 1), 64, screened)


def block_bounds(queries: Tensor, rows: Tensor, codes: kernels.Codes | None) -> search.Bounds:
    prepared = launchers.prepare(queries, torch.int8 if codes else rows.dtype)
    return launchers.block_bounds(prepared, len(queries), rows, codes)


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bounds_hold_and_exclude(dtype, screened):
    """Block by block the largest similarity lies between the bounds, and these are close."""
    rows, queries = unit_rows(320, 200, dtype), unit_rows(4, 200).double()
    rows[::7] *= 3
    codes = kernels.encode_rows(rows, impl="reference") if screened else None
    floor, lower, upper = block_bounds(queries, rows, codes)
    assert torch.equal(floor[:4], lower.amax(1))
    largest = (queries @ rows.double().T).unflatten(1, (10, 32)).amax(2)
    assert (lower < largest).all() and (largest < upper).all()
    assert (upper - lower).max() < (0.15 if screened else 0.01)


def test_bounds_hold_for_rows_whose_squares_vanish_in_fp32():
    rows, queries = 1e-22 * unit_rows(320, 200), unit_rows(4, 200).double()
    _, lower, upper = block_bounds(queries, rows, None)
    largest = (queries @ rows.double().T).unflatten(1, (10, 32)).amax(2)
    assert (lower < largest).all() and (largest < upper).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lost_by", ["row codes", "query codes", "fp16 queries"])
def test_bounds_hold_where_rounding_errors_line_up(lost_by, sign):
    """A query along what a row's code loses, or a row along what a query's rounding loses: the worst case."""
    whole = unit_rows(4, 200)
    if lost_by == "fp16 queries":
        kept = whole.half().double()
    else:
        codes, scales, _ = kernels.encode_rows(whole, impl="reference")
        kept = codes * scales.double()[:, None]
    lost = torch.nn.functional.normalize(sign * (whole.double() - kept), dim=1)
    rows, queries = (whole, lost) if lost_by == "row codes" else (lost.float(), whole.double())
    rows = (rows.half() if lost_by == "fp16 queries" else rows).repeat_interleave(32, 0)  # a block each
    codes = kernels.encode_rows(rows, impl="reference") if "codes" in lost_by else None
    _, lower, upper = block_bounds(queries, rows, codes)
    similarity = (queries * rows[::32].double()).sum(1)
    assert (lower.diagonal() < similarity).all() and (similarity < upper.diagonal()).all()


@pytest.mark.parametrize("screened", [False, True])
def test_most_blocks_are_never_scored_exactly(screened, listed_blocks):
    """Near one row a query needs that row's block; five rows in four blocks have the fifth block as floor."""
    rows = unit_rows(640, 128)
    query = torch.randn(1, 128)
    planted = torch.tensor([3, 200, 201, 420, 639])
    rows[planted] = torch.nn.functional.normalize(query + 0.2 * torch.randn(5, 128), dim=1)
    assert_exact(query, rows, 1, screened)
    assert_exact(query, rows, 5, screened)
    assert listed_blocks[0] <= 4 and listed_blocks[1] < 20


def test_tf32_screening_covers_rows_cut_to_ten_bits():
    """A GPU's TF32 drops all bits below the tenth, which the interpreter does not."""
    rows, queries = torch.rand(400, 300) + 0.5, torch.rand(20, 300).double()
    queries /= queries.norm(dim=1, keepdim=True)
    prepared = launchers.prepare(queries, torch.float32)
    rounded, losses = prepared.encoded[:20, :300], prepared.losses[:20]
    cut = (rows.view(torch.int32) & -0x2000).view(torch.float32).double()
    lost = (rounded.double() @ cut.T - queries @ rows.double().T).abs() / rows.double().norm(dim=1)
    assert torch.equal(rounded.view(torch.int32) & 0x1FFF, torch.zeros_like(rounded, dtype=torch.int32))
    assert (lost < losses[:, None]).all() and lost.max() > 0.2 * losses.min()


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_rows_is_the_reference(dtype):
    rows = torch.cat(
        [unit_rows(20, 300, dtype), torch.zeros(1, 300, dtype=dtype), 1e-3 * unit_rows(3, 300, dtype)]
    )
    rows[5] = rows[5, 0]
    codes, truth = kernels.encode_rows(rows, impl="triton"), kernels.encode_rows(rows, impl="reference")
    assert torch.equal(codes.codes, truth.codes) and torch.equal(codes.scales, truth.scales)
    lost = (rows.double() - codes.scales.double()[:, None] * codes.codes.double()).norm(dim=1)
    assert (lost <= codes.errors.double()).all()
    torch.testing.assert_close(codes.errors, truth.errors, rtol=1.2e-7, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_rows_that_are_not_finite_are_nan_and_refused_where_they_are_encoded(value, k):
    rows, queries = unit_rows(200, 20), torch.randn(1, 20).repeat(3, 1)
    rows[96:128] = -torch.nn.functional.normalize(queries[:1], dim=1)  # nothing else would list this block
    codes = kernels.encode_rows(rows, impl="reference")
    rows[117, 3] = value
    for some in (None, codes._replace(errors=torch.full((200,), torch.inf))):
        found = kernels.topk_cosine(queries, rows, k, codes=some, impl="triton")
        assert found.similarity.isnan().all() and not found.row.any()
    with pytest.raises(ValueError, match="`rows` must be finite, got a non-finite value in row 117"):
        kernels.encode_rows(rows, impl="triton")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, 1e-160, torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_a_query_without_a_direction_is_nan_and_no_other_is_touched(value, k):
    rows, queries = unit_rows(200, 20), torch.randn(3, 20).double()
    truth = kernels.topk_cosine(queries, rows, k, impl="reference")
    queries[1] = value
    for codes in (None, kernels.encode_rows(rows, impl="reference")):
        found = kernels.topk_cosine(queries, rows, k, codes=codes, impl="triton")
        for part, expected in zip(found, truth, strict=True):
            assert torch.equal(part[[0, 2]], expected[[0, 2]])
        assert found.similarity[1].isnan().all() and found.row[1].tolist() == [0] * k


def test_no_block_is_scored_for_a_query_without_a_direction(monkeypatch):
    rows, queries, lists = unit_rows(200, 20), torch.randn(2, 20), []
    queries[1, 7] = torch.nan

    def sorted_rows(exact, floor, listed, number, k, inner=search.sorted_rows):
        lists.append(number.tolist())
        return inner(exact, floor, listed, number, k)

    monkeypatch.setattr(search, "sorted_rows", sorted_rows)
    kernels.topk_cosine(queries, rows, 3, impl="triton")
    assert lists[0][0] > 0 and lists[0][1] == 0


def test_no_value_is_read(monkeypatch):
    """Called directly; the interpreter reads what it computes with, so its launches are left out."""
    rows, queries = unit_rows(200, 20), torch.randn(3, 20)
    codes = kernels.encode_rows(rows, impl="reference")
    for kernel in ("list_blocks", "best_in_list", "best_in_blocks", "best_of_shares"):
        monkeypatch.setattr(search, kernel, Unlaunched())
    for kernel in ("encode_queries", "screen_blocks"):
        monkeypatch.setattr(launchers, kernel, Unlaunched())
    found = reads.watch(monkeypatch)
    for k in (1, 3):
        for part in (None, codes):
            launchers.topk_cosine(queries, rows, part, k)
    assert found == []


class Unlaunched:
    """A kernel that is never run."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_queries_of_any_floating_dtype(dtype):
    rows, queries = unit_rows(200, 20), torch.randn(3, 20).to(dtype)
    for screened in (False, True):
        assert_exact(queries, rows, 1, screened)
        assert_exact(queries, rows, 5, screened)


def test_what_a_search_makes_lies_where_its_tensors_do():
    rows, queries = unit_rows(100, 50), torch.randn(4, 50)
    with torch.device("meta"):  # as on a GPU, where the default device is another one too
        codes = kernels.Codes(*launchers.encode_rows(rows))
        found = [launchers.topk_cosine(queries, rows, part, k)[1] for k in (1, 3) for part in (None, codes)]
    truth = kernels.topk_cosine(queries, rows, 3, impl="reference").row
    assert all(torch.equal(row, truth[:, : row.shape[1]]) for row in found)


def test_layouts_and_empty_batches():
    rows, queries = unit_rows(100, 50), torch.randn(4, 50)
    truth = kernels.topk_cosine(queries, rows, 3, impl="reference")
    moved = (queries.double().t().contiguous().t(), rows.repeat_interleave(2, dim=1)[:, ::2])
    result = kernels.topk_cosine(*moved, 3, impl="triton")
    assert torch.equal(result.row, truth.row) and torch.equal(result.similarity, truth.similarity)
    empty = kernels.topk_cosine(queries[:0], rows, 3, impl="triton")
    assert empty.similarity.shape == empty.row.shape == (0, 3)
