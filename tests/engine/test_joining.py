"""Calls joined by rows give what each gives alone; what differs keeps calls apart."""

import pytest
import torch

from amg.engine.joining import Call, together


def network(sample, t, *, states, added=None, flag=None):
    network.seen.append((sample, t))
    per_row = t.double().reshape(-1, 1) if t.ndim else t.double()
    extra = 0 if added is None else added["time_ids"].sum(1, keepdim=True)
    return sample * per_row + states.sum((1, 2))[:, None] + extra


@pytest.fixture(autouse=True)
def seen():
    network.seen = []
    return network.seen


def call(rows, t, seed=0, tokens=3, **more):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    states = torch.randn(rows, tokens, 2, generator=generator, dtype=torch.float64)
    return Call(network, (sample, torch.as_tensor(t)), {"states": states, **more})


def test_each_gets_its_own_rows(seen):
    added = [{"time_ids": torch.full((rows, 2), float(rows))} for rows in (2, 1, 3)]
    calls = [
        call(rows, t, seed, added=more)
        for seed, (rows, t, more) in enumerate(zip((2, 1, 3), (981, 1, 500), added, strict=True))
    ]
    assert len({one.key() for one in calls}) == 1
    outputs = together(calls)
    ((sample, t),) = seen
    assert len(sample) == 6 and t.tolist() == [981, 981, 1, 500, 500, 500] and t.dtype == torch.int64
    for one, output in zip(calls, outputs, strict=True):
        assert torch.equal(output, one.alone())


def test_a_lone_call_is_made_as_it_is(seen):
    one = call(2, 981)
    together([one])
    assert seen[0][0] is one.arguments[0] and seen[0][1] is one.arguments[1]


@pytest.mark.parametrize(
    "other",
    [
        call(1, 981.0),  # another dtype of t
        call(1, 981, tokens=4),
        call(1, 981, flag="a"),
        call(1, 981, added={"time_ids": torch.zeros(1, 2)}),
        Call(network, (torch.zeros(1, 5), torch.tensor(981)), {"states": torch.zeros(1, 3, 2)}),
        Call(torch.add, call(1, 981).arguments, call(1, 981).keywords),
    ],
    ids=["dtype", "tokens", "value", "argument", "shape", "function"],
)
def test_what_keeps_calls_apart(other):
    assert other.key() != call(1, 981).key()


def test_a_tensor_that_does_not_belong_to_the_rows_is_joined_with_itself_alone():
    table, rows = torch.zeros(7, 3, 2), torch.zeros(2, 4)
    first, second, third = (
        Call(network, (rows, torch.tensor(t)), {"states": states})
        for t, states in ((5, table), (9, table), (5, table.clone()))
    )
    assert first.key() == second.key() != third.key()


def test_a_result_that_is_not_by_rows_is_refused():
    def total(sample):
        return sample.sum(0, keepdim=True)

    with pytest.raises(ValueError, match=r"one row per sample, 3 in all, got \[1, 4\]"):
        together([Call(total, (torch.zeros(rows, 4),), {}) for rows in (1, 2)])
