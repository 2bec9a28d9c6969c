"""Codes in panels and `limit`, against brute force in float64: what is not read changes no answer."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION
from amg.kernels.top1_cosine.contract import GROUP, panel_shape, panel_width

if EXTENSION is None:
    pytest.skip("amg._C is not built", allow_module_level=True)

SHAPES = [  # queries, rows, dimension
    (1, 1, 1),
    (2, 7, 3),
    (1, 16, 32),
    (5, 17, 33),
    (3, 1000, 64),
    (17, 1003, 100),
    (2, 300, 2048),
    (70, 131, 33),
    (9, 4097, 513),
]
LIMITS = [None, -math.inf, -0.2, 0.3, 0.9, 2.0, math.nan]


def orthonormal(dimension: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64)).Q


def spectrum(dimension: int, power: float) -> Tensor:
    return torch.arange(1, dimension + 1) ** -power


def brute_force(queries: Tensor, rows: Tensor, k: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity and row [B, k] from float64 products rounded to fp32; −inf and −1 below the limit [B]."""
    dots = torch.stack([(rows.double() * query).sum(1) for query in queries.double()])
    scores = (dots / queries.double().square().sum(1, keepdim=True).sqrt()).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    similarity = scores.gather(1, order)
    below = similarity < limit[:, None]
    return similarity.masked_fill(below, -math.inf), order.masked_fill(below, -1)


def assert_exact(
    queries: Tensor, rows: Tensor, k: int, codes: kernels.Panels, limit: Tensor | float | None
) -> None:
    found = kernels.topk_cosine(queries, rows, k, codes=codes, limit=limit, impl="cpp")
    limits = torch.as_tensor(-math.inf if limit is None else limit).float().expand(len(queries))
    similarity, row = brute_force(queries, rows, k, limits)
    assert torch.equal(found.row, row)
    torch.testing.assert_close(found.similarity, similarity, rtol=1.2e-7, atol=1e-12)
    whole = kernels.topk_cosine(queries, rows, k, impl="cpp")
    reached = row >= 0
    assert torch.equal(
        found.similarity[reached].view(torch.int32), whole.similarity[reached].view(torch.int32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("power", [0.0, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_rows(shape, power, turned, dtype):
    batch, count, dimension = shape
    rows = normalize(torch.randn(count, dimension) * spectrum(dimension, power), dim=1).to(dtype)
    codes = kernels.encode_panels(rows, rotation=orthonormal(dimension) if turned else None)
    queries = 3 * torch.randn(batch, dimension) * spectrum(dimension, power)
    queries[0] = rows[-1].float() + 0.1 * queries[0] / queries[0].norm()
    for k in {1, min(count, 40)}:
        for limit in LIMITS:
            assert_exact(queries, rows, k, codes, limit)


@pytest.mark.parametrize("kind", ["all equal", "copies", "negative", "not unit", "zeros", "late", "spikes"])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_adversarial_rows(kind, batch):
    dimension, count = 130, 3000
    queries, rows = torch.randn(batch, dimension), normalize(torch.randn(count, dimension), dim=1)
    if kind == "all equal":
        rows = rows[:1].repeat(count, 1)
    elif kind == "copies":  # ties to the lowest row, which lies in another group
        rows = rows[:30].repeat(100, 1)
        queries[0] = rows[7]
    elif kind == "negative":
        rows = normalize(-queries[:1] + 0.05 * rows, dim=1)
        queries = queries[:1].repeat(batch, 1)
    elif kind == "not unit":
        rows = rows * torch.logspace(-6, 3, count)[torch.randperm(count), None]
    elif kind == "zeros":
        rows[::3] = 0
    elif kind == "late":  # what the first panels say is reversed by the last columns
        rows[:, :96] = queries[:1, :96] * torch.linspace(1, 0.5, count)[:, None]
        rows[:, 96:] = queries[:1, 96:] * torch.linspace(-1, 1, count)[:, None]
    elif kind == "spikes":
        rows = rows * 1e-3
        rows[torch.arange(count), torch.randint(dimension, (count,))] = 1.0
    for rotation in (None, orthonormal(dimension)):
        codes = kernels.encode_panels(rows, rotation=rotation)
        for limit in (None, 0.5, -0.5):
            for k in (1, 40):
                assert_exact(queries, rows, k, codes, limit)


def test_limits_at_a_similarity_and_beside_it_each_query_its_own():
    rows = normalize(torch.randn(500, 70), dim=1)
    query = torch.randn(1, 70)
    best = kernels.top1_cosine(query, rows, impl="reference").similarity
    up, down = (torch.nextafter(best, torch.full((1,), sign * math.inf)) for sign in (1, -1))
    limit = torch.cat([best, up, down, torch.tensor([math.nan])])
    for codes in (None, kernels.encode_rows(rows), kernels.encode_panels(rows)):
        for impl in ("reference", "cpp"):
            found = kernels.top1_cosine(query.expand(4, -1), rows, codes=codes, limit=limit, impl=impl)
            assert (found.row >= 0).tolist() == [True, False, True, True]
            assert found.similarity[1] == -math.inf and torch.equal(
                found.similarity[[0, 2, 3]], best.expand(3)
            )


@pytest.mark.parametrize("limit", [None, 0.5, 2.0])
@pytest.mark.parametrize("batch", [1, 12])
def test_a_query_that_is_not_finite_is_nan_alone(batch, limit):
    rows = normalize(torch.randn(2000, 90), dim=1)
    codes = kernels.encode_panels(rows, rotation=orthonormal(90))
    queries = torch.cat([rows[:batch] + 0.01, torch.randn(3, 90)])
    for value in (math.nan, math.inf, 0.0):
        broken = queries.clone()
        broken[-1] = value
        found = kernels.topk_cosine(broken, rows, 3, codes=codes, limit=limit)
        truth = kernels.topk_cosine(queries, rows, 3, codes=codes, limit=limit)
        assert found.similarity[-1].isnan().all() and found.row[-1].tolist() == [0, 0, 0]
        assert torch.equal(found.row[:-1], truth.row[:-1])
        assert torch.equal(found.similarity[:-1], truth.similarity[:-1])


def test_panels_hold_the_codes_of_the_turned_rows():
    rows, rotation = normalize(torch.randn(50, 70), dim=1).half(), orthonormal(70)
    panels, plain = kernels.encode_panels(rows, rotation=rotation), kernels.encode_rows(rows)
    unturned = kernels.encode_panels(rows)
    assert panels.codes.shape == panel_shape(50, 70) and panel_width(70) == 32
    for part in (panels, unturned):
        by_rows = part.codes.permute(1, 3, 0, 2, 4).reshape(-1, 96)
        assert not by_rows[50:].any() and not by_rows[:, 70:].any() and not part.scales[50:].any()
        assert torch.equal(part.squares, by_rows.int().square().sum(1).int())
        basis = torch.eye(70, dtype=torch.float64) if part.rotation is None else part.rotation
        lost = rows.double() @ basis - by_rows[:50, :70].double() * part.scales[:50].double()[:, None]
        assert (lost.norm(dim=1) <= part.errors[:50].double()).all()
        assert (part.errors[:50].double() <= lost.norm(dim=1) * (1 + 1e-6) + 2e-7).all(), "the bound is tight"
        if part is unturned:
            assert torch.equal(by_rows[:50, :70], plain.codes)


def test_runs_and_thread_counts_agree_to_the_bit():
    rows, queries = normalize(torch.randn(9000, 96) * spectrum(96, 0.7), dim=1), torch.randn(5, 96)
    codes, threads, results = kernels.encode_panels(rows), torch.get_num_threads(), []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results += [kernels.topk_cosine(queries, rows, k, codes=codes, limit=0.1) for k in (1, 30)]
    torch.set_num_threads(threads)
    for at, other in enumerate(results[2:]):
        assert torch.equal(results[at % 2].row, other.row)
        assert torch.equal(results[at % 2].similarity, other.similarity)


@given(st.integers(1, 20), st.integers(1, 400), st.integers(1, 140), st.integers(0, 1 << 30), st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(batch, count, dimension, seed, data):
    torch.manual_seed(seed)
    coarse = torch.randint(-2, 3, (count, dimension)).float()  # many ties
    rows = coarse if data.draw(st.booleans()) else normalize(torch.randn(count, dimension), dim=1)
    queries = torch.randn(batch, dimension) + 2 * rows[torch.randint(count, (batch,))]
    rotation = orthonormal(dimension) if data.draw(st.booleans()) else None
    limit = data.draw(st.sampled_from([None, -1.0, 0.0, 0.7, 1.0]))
    k = data.draw(st.integers(1, min(count, 30)))
    assert_exact(queries, rows, k, kernels.encode_panels(rows, rotation=rotation), limit)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_every_level_answers_alike(level):
    """In a process of its own: the level is chosen once."""
    if (
        level
        not in ("scalar", "avx2", "avx512")[
            : 1 + ["scalar", "avx2", "avx512"].index(EXTENSION.detected_level())
        ]
    ):
        pytest.skip(f"this CPU has no {level}")
    code = "import pytest, sys; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    tests = [f"{__file__}::{name}" for name in ("test_adversarial_rows", "test_any_shape")]
    ran = subprocess.run(
        [sys.executable, "-c", code, *tests], env={**os.environ, "AMG_CPU_LEVEL": level}, capture_output=True
    )
    assert ran.returncode == 0, ran.stdout.decode()[-3000:]


def test_ops_and_bad_arguments():
    rows, queries = normalize(torch.randn(40, 24), dim=1), torch.randn(3, 24)
    codes = kernels.encode_panels(rows, rotation=orthonormal(24))
    arguments = (queries, rows, *codes[:3], 4, None, *codes[3:], torch.full((3,), 0.2))
    torch.library.opcheck(torch.ops.amg.topk_cosine.default, arguments)
    cases = {
        r"`limit` must be a number or \[3\] float32 on cpu, got \[2\]": {"limit": torch.zeros(2)},
        r"`limit` must be .* got \[3\] float64": {"limit": torch.zeros(3).double()},
        r"`codes.squares` must be \[": {"codes": codes._replace(squares=codes.squares[:8])},
        r"`codes.rotation` must be \[24, 24\] torch.float64": {
            "codes": codes._replace(rotation=torch.eye(24))
        },
        r"`codes.codes` must be \[1, ": {"codes": codes._replace(codes=codes.codes.flatten())},
    }
    for message, keywords in cases.items():
        with pytest.raises(ValueError, match=message):
            kernels.topk_cosine(queries, rows, 1, **keywords)
    with pytest.raises(ValueError, match=r"`rotation` must be orthonormal to 1e-09, is off by"):
        kernels.encode_panels(rows, rotation=2 * torch.eye(24).double())
    with pytest.raises(
        ValueError, match=r"`rotation` must be \[24, 24\] float64, got \[24, 24\] torch.float32"
    ):
        kernels.encode_panels(rows, rotation=torch.eye(24))
    rows[17, 3] = math.nan
    with pytest.raises(ValueError, match="`rows` must be finite, got a non-finite value in row 17"):
        kernels.encode_panels(rows)
    assert len(codes.scales) % GROUP == 0
