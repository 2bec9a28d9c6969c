"""Every decision of the lazy search against a full one, exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import amg.kernels
from amg.guidance.flight import Flight
from amg.index.exact import ExactCosine
from amg.index.lazy import Kept, nearest_lazily, outside_bound

ANGLES = (0.0, 1e-12, 1e-7, 1e-3, 0.02, 0.1, 0.5, 2.0, math.pi)


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def turned(query: Tensor, angle: float, generator: torch.Generator) -> Tensor:
    """The query rotated by `angle` in a random direction, float64."""
    across = torch.randn(len(query), generator=generator, dtype=torch.float64)
    across -= (across @ query) * query
    return math.cos(angle) * query + math.sin(angle) * torch.nn.functional.normalize(across, dim=0)


def clustered(count: int, dimension: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows in tight clusters, a quarter of them exact copies: ties and near-ties everywhere."""
    centres = unit(max(1, count // 8), dimension, generator=generator)
    rows = centres[torch.randint(len(centres), (count,), generator=generator)]
    spread = 10.0 ** torch.randint(-8, 0, (count, 1), generator=generator)
    rows = torch.nn.functional.normalize(rows + spread * unit(count, dimension, generator=generator))
    copies = torch.randint(count, (2, count // 4), generator=generator)
    rows[copies[0]] = rows[copies[1]]
    return rows.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 300),
    dimension=st.integers(2, 24),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    coded=st.booleans(),
    angles=st.lists(st.sampled_from(ANGLES), min_size=1, max_size=8),
)
def test_random_walks_decide_as_full_searches(seed, count, dimension, share, dtype, coded, angles):
    generator = torch.Generator().manual_seed(seed)
    rows = clustered(count, dimension, dtype, generator)
    searcher = ExactCosine(rows, amg.kernels.encode_rows(rows) if coded else None)
    walkers = torch.nn.functional.normalize(rows[torch.randint(count, (3,), generator=generator)].double())
    kept, keep = [Kept() for _ in walkers], max(1, round(share * count))
    for angle in (0.0, *angles):
        walkers = torch.stack([turned(one, angle, generator) for one in walkers])
        queries = walkers.float()
        found, expected = nearest_lazily(searcher, queries, kept, keep), searcher.nearest(queries)
        assert torch.equal(found.row, expected.row)
        assert torch.equal(found.similarity, expected.similarity)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dimension=st.integers(2, 24),
    norm=st.floats(0.9, 1.1),
    angle=st.sampled_from(ANGLES),
    apart=st.sampled_from(ANGLES),
)
def test_the_bound_holds_for_the_row_that_attains_it(seed, dimension, norm, angle, apart):
    """A row of the largest norm in the plane of the rotation, on the far side: nothing can come closer."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.nn.functional.normalize(torch.randn(dimension, generator=generator).double(), dim=0)
    now = turned(before, angle, generator)
    across = torch.nn.functional.normalize(now - (now @ before) * before, dim=0)
    row = (norm * (math.cos(apart) * before + math.sin(apart) * across)).float()
    searcher = ExactCosine(row[None])
    least = float(amg.kernels.top1_cosine(before[None], row[None]).similarity)
    bound = outside_bound(least, searcher.largest_norm, before, now)
    assert float(amg.kernels.top1_cosine(now[None], row[None]).similarity) <= bound
    if 1e-3 <= angle < apart:  # no looser than s_K + τ asks: √(2τ) of angle where arccos is steepest
        assert bound <= norm * math.cos(apart - angle) + 1e-3


def test_rows_longer_than_one_are_not_missed():
    """An outside row that is 1.25 long comes nearest before one of length 1 could."""
    rows = torch.tensor([[1.0, 0.0], [0.1736, -0.9848], [0.0, 1.25]]).half()
    searcher, kept = ExactCosine(rows), [Kept()]
    for angle in torch.linspace(0, math.pi / 2, 400, dtype=torch.float64):
        query = torch.stack([angle.cos(), angle.sin()])[None].float()
        found, expected = nearest_lazily(searcher, query, kept, 2), searcher.nearest(query)
        assert found.row.tolist() == expected.row.tolist()
        assert torch.equal(found.similarity, expected.similarity)
    assert kept[0].skipped > 100


def test_an_outside_row_that_ties_is_not_missed():
    """Two copies, one kept: the query stays, the best equals the bound, and only a full search may answer."""
    rows = torch.nn.functional.normalize(torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))
    searcher, own = ExactCosine(rows), Kept()
    query = torch.tensor([[1.0, 0.0]])
    for _ in range(2):
        assert nearest_lazily(searcher, query, [own], 1).row.tolist() == [1]
    assert (own.full, own.skipped) == (2, 0)


def test_counts_and_what_is_kept():
    generator = torch.Generator().manual_seed(0)
    searcher, own = ExactCosine(unit(2000, 16, generator=generator)), Kept()
    query = torch.nn.functional.normalize(searcher.rows[:1] + 0.05)
    for step in range(5):
        nearest_lazily(searcher, query + 1e-3 * step, [own])
    assert (own.full, own.skipped, own.row.shape) == (1, 4, (256,))
    nearest_lazily(searcher, -query, [own])
    assert (own.full, own.skipped, own.row.shape) == (2, 4, (256,))
    small = ExactCosine(searcher.rows[:10])  # another index: nothing of the first is used
    nearest_lazily(small, query, [own])
    nearest_lazily(small, -query, [own])  # all rows kept: any query is answered
    assert (own.full, own.skipped, own.row.tolist()) == (3, 5, list(range(10)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), limit=st.floats(-0.5, 1.0), angle=st.sampled_from(ANGLES[3:7]))
def test_below_a_limit_only_the_named_row_may_differ(seed, limit, angle):
    generator = torch.Generator().manual_seed(seed)
    searcher = ExactCosine(unit(300, 6, generator=generator))
    walkers, kept = unit(3, 6, generator=generator).double(), [Kept() for _ in range(3)]
    for _ in range(8):
        walkers = torch.stack([turned(one, angle, generator) for one in walkers])
        expected = searcher.nearest(walkers.float())
        found = nearest_lazily(searcher, walkers.float(), kept, 20, limit)
        close = expected.similarity > limit
        assert torch.equal(found.similarity > limit, close)
        assert torch.equal(found.row[close], expected.row[close])
        assert torch.equal(found.similarity[close], expected.similarity[close])
        assert bool((found.similarity <= expected.similarity).all())
    assert all(own.full + own.skipped + own.closed == 8 for own in kept)


def test_what_no_row_can_reach_needs_no_search():
    rows = unit(500, 16, generator=torch.Generator().manual_seed(3))
    searcher, own = ExactCosine(rows), Kept()
    query = unit(1, 16, generator=torch.Generator().manual_seed(4))
    for step in range(4):
        nearest_lazily(searcher, query + 1e-3 * step, [own], 2, limit=1.0)
    assert (own.full, own.skipped + own.closed) == (1, 3)
    before = own.full
    nearest_lazily(searcher, -query, [own], 2, limit=0.0)
    assert own.full == before + 1


def test_a_sample_does_not_depend_on_its_mates():
    generator = torch.Generator().manual_seed(2)
    searcher = ExactCosine(unit(900, 12, generator=generator))
    walkers = unit(4, 12, generator=generator)
    together, alone = [Kept() for _ in walkers], [Kept() for _ in walkers]
    for step in range(20):
        walkers = torch.nn.functional.normalize(walkers + 0.02 * step * unit(4, 12, generator=generator))
        batch = nearest_lazily(searcher, walkers, together, 64)
        for at, own in enumerate(alone):
            single = nearest_lazily(searcher, walkers[at : at + 1], [own], 64)
            assert torch.equal(single.similarity[0], batch.similarity[at])
            assert (single.row[0], own.full, own.skipped) == (
                batch.row[at],
                together[at].full,
                together[at].skipped,
            )
    assert all(own.full > 1 and own.skipped > 1 for own in alone)


def test_non_finite_rows_raise_as_in_a_full_search():
    rows = torch.eye(4)
    searcher, own = ExactCosine(rows), Kept()
    nearest_lazily(searcher, rows[:1], [own], 2)
    rows[3, 3] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        nearest_lazily(ExactCosine(rows), rows[:1], [own], 2)


def test_flights_share_nothing():
    first, second = Flight.from_noise(torch.zeros(1)), Flight.from_noise(torch.zeros(1))
    assert first.kept is not second.kept
