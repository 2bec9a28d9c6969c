"""Every near pair, and no other: against float64 of all pairs."""

import pytest
import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def unit_rows(count: int, dimension: int, dtype: torch.dtype, spread: float) -> Tensor:
    """Families of about three around common centres, their cosines on both sides of what is asked for."""
    centres = torch.randn(max(1, count // 3), dimension)
    noise = spread * torch.rand(count, 1) * torch.randn(count, dimension)
    rows = centres[torch.randint(len(centres), (count,))] + noise
    return torch.nn.functional.normalize(rows, dim=1).to(dtype)


def sketched(rows: Tensor, scale: float = 1.0) -> Tensor:
    """The first elements of a rotation of rows: never lengthens."""
    width = min(64, rows.shape[1])
    basis = torch.linalg.qr(torch.randn(rows.shape[1], width, dtype=torch.float64)).Q
    return torch.nn.functional.pad((rows.double() * scale @ basis).float(), (0, 64 - width))


def joint_sketches(rows: Tensor, others: Tensor, scale: float = 1.0) -> tuple[Tensor, kernels.Codes]:
    both = sketched(torch.cat([rows, others]), scale)
    return both[: len(rows)], kernels.encode_rows(both[len(rows) :])


def assert_all_found(rows: Tensor, others: Tensor, least: float, impl: str, scale: float = 1.0) -> int:
    sketches, codes = joint_sketches(rows, others, scale)
    found = kernels.near_pairs(rows, others, sketches=sketches, codes=codes, least=least, impl=impl)
    left, right = rows.double(), others.double()
    if rows.dtype == torch.uint8:
        apart = (left[:, None] - right[None]) / 255
        closeness = -apart.square().mean(2).sqrt()
    else:
        closeness = left @ right.T
    expected = (closeness.float() >= least).nonzero()
    assert torch.equal(torch.stack([found.left, found.right], 1), expected)
    torch.testing.assert_close(
        found.closeness.double(), closeness[found.left, found.right], rtol=1.2e-7, atol=1e-9
    )
    return len(expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("count", "others", "dimension"), [(1, 1, 3), (33, 70, 64), (200, 601, 130), (65, 9, 512)]
)
def test_unit_rows(impl, dtype, count, others, dimension):
    rows = unit_rows(count + others, dimension, dtype, 0.4)
    least = 0.9 if dimension > 3 else -0.5
    found = assert_all_found(rows[:count], rows[count:], least, impl)
    assert found > 100 or count * others < 3000


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dimension", [12, 300, 3072])
def test_bytes(impl, dimension):
    centres = torch.randint(0, 256, (20, dimension))
    noise = 12 * torch.rand(400, 1) * torch.randn(400, dimension)
    rows = (centres[torch.randint(20, (400,))] + noise).round().clamp(0, 255).to(torch.uint8)
    assert assert_all_found(rows[:150], rows[150:], -0.02, impl, 1 / 255) > 100


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("least", [-1.0, 0.0, 0.5, 0.999, 1.0])
def test_any_threshold(impl, least):
    rows = unit_rows(150, 40, torch.float32, 0.3)
    rows[100:] = rows[:50]
    assert assert_all_found(rows[:80], rows[80:], least, impl) > 0 or least == 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_sketches_that_say_nothing_lose_nothing(impl):
    """All zero, all alike, or with one element that makes the codes of the others coarse."""
    rows = unit_rows(120, 96, torch.float16, 0.3)
    for sketches in (torch.zeros(120, 64), torch.ones(120, 64), torch.eye(64)[0].repeat(120, 1) * 1e6):
        codes = kernels.encode_rows(sketches)
        found = kernels.near_pairs(rows, rows, sketches=sketches, codes=codes, least=0.9, impl=impl)
        expected = ((rows.double() @ rows.double().T).float() >= 0.9).nonzero()
        assert torch.equal(torch.stack([found.left, found.right], 1), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_earlier_pairs_alone(impl):
    rows = unit_rows(300, 64, torch.float32, 0.4)
    sketches, codes = joint_sketches(rows, rows)
    found = kernels.near_pairs(rows, rows, sketches=sketches, codes=codes, least=0.9, earlier=True, impl=impl)
    left, right = torch.where((rows.double() @ rows.double().T).float() >= 0.9)
    expected = torch.stack([left, right], 1)[right < left]
    assert torch.equal(torch.stack([found.left, found.right], 1), expected) and len(expected) > 50


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("count", "others"), [(0, 5), (5, 0), (0, 0)])
def test_none_of_nothing(impl, count, others):
    sketches = torch.zeros(count, 64)
    codes = kernels.Codes(torch.zeros(others, 64, dtype=torch.int8), torch.zeros(others), torch.zeros(others))
    found = kernels.near_pairs(
        torch.zeros(count, 8), torch.zeros(others, 8), sketches=sketches, codes=codes, least=0.9, impl=impl
    )
    assert [len(part) for part in found] == [0, 0, 0]


@needs_extension
def test_as_many_threads_as_there_are_find_the_same():
    rows = unit_rows(3000, 64, torch.float16, 0.5)
    sketches, codes = joint_sketches(rows, rows)
    threads, answers = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            answers.append(
                kernels.near_pairs(rows, rows, sketches=sketches, codes=codes, least=0.9, impl="cpp")
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for answer in answers[1:] for a, b in zip(answers[0], answer, strict=True))


@needs_extension
def test_a_sketch_that_is_not_finite_is_refused():
    rows = unit_rows(4, 64, torch.float32, 0.5)
    sketches, codes = joint_sketches(rows, rows)
    sketches[2, 5] = torch.nan
    with pytest.raises(ValueError, match="`sketches` must be finite, got a non-finite value in row 2"):
        kernels.near_pairs(rows, rows, sketches=sketches, codes=codes, least=0.9, impl="cpp")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", {"rows": torch.zeros(4)}),
        ("rows", {"rows": torch.zeros(4, 8, dtype=torch.int64)}),
        ("others", {"others": torch.zeros(3, 9)}),
        ("others", {"others": torch.zeros(3, 8, dtype=torch.float16)}),
        ("sketches", {"sketches": torch.zeros(4, 63)}),
        ("codes.codes", {"codes": kernels.encode_rows(torch.ones(2, 64))}),
        ("codes.codes", {"codes": kernels.encode_rows(torch.ones(3, 32))}),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(name, change):
    given = {
        "rows": torch.zeros(4, 8),
        "others": torch.zeros(3, 8),
        "sketches": torch.zeros(4, 64),
        "codes": kernels.encode_rows(torch.ones(3, 64)),
    } | change
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        kernels.near_pairs(given.pop("rows"), given.pop("others"), **given, least=0.9)
