"""Groups at different steps share one call of the network, each row with its own timestep."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions, Denoiser
from amg.protection.group import Group, predict_together

TIMES = torch.tensor([900, 600, 300, 1])


class Network:
    """Remembers its calls; the output tells rows, times and conditions apart."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Any]] = []

    def __call__(self, sample: Tensor, t: Tensor, *, word: Tensor) -> Tensor:
        self.calls.append((len(sample), t))
        return sample + word[:, :, None, None] + (t.view(-1, 1, 1, 1) if t.ndim else t)


def group(rows: list[int], position: int, seed: int, batch: int = 4) -> Group:
    sample = torch.randn(batch, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scheduler = SimpleNamespace(timesteps=TIMES, scale_model_input=lambda sample, t: sample * (1 + t / 1000))
    return Group(scheduler, sample, rows, position)


def conditions(batch: int = 4, guided: bool = True) -> Conditions:
    words = torch.arange(batch, dtype=torch.float64)[:, None]
    return Conditions({"word": words}, {"word": -words} if guided else None, {})


def test_a_whole_batch_is_handed_over_as_it_is() -> None:
    network, one = Network(), group([0, 1, 2, 3], 1, 0)
    (found,) = predict_together(Denoiser(network, lambda x: x), [one], conditions())
    assert network.calls == [(8, TIMES[1])] and network.calls[0][1].ndim == 0
    assert torch.equal(found.model_input, one.sample * (1 + TIMES[1] / 1000))


def test_groups_share_a_call_in_the_order_of_the_batch() -> None:
    for guided in (True, False):
        network, groups = Network(), [group([1, 3], 2, 1), group([0], 0, 2)]
        found = predict_together(Denoiser(network, lambda x: x), groups, conditions(guided=guided))
        ((rows, t),) = network.calls
        assert t.tolist() == [900, 300, 300] * (2 if guided else 1) and rows == len(t)
        for one, got in zip(groups, found, strict=True):
            alone = Denoiser(Network(), lambda x: x)
            rows_of = one.of_rows(conditions(guided=guided))
            mine = one.scheduler.scale_model_input(one.sample, TIMES[one.position])[one.rows]
            own = Group(one.scheduler, one.sample[one.rows], [*range(len(one.rows))], one.position)
            (expected,) = predict_together(alone, [own], rows_of)
            assert torch.equal(got.model_input, mine)
            assert torch.equal(got.cond, expected.cond)
            assert (got.uncond is None) == (expected.uncond is None) == (not guided)
            assert got.uncond is None or torch.equal(got.uncond, expected.uncond)


def test_outputs_are_put_where_the_rows_are() -> None:
    one = group([2, 0], 0, 0)
    everywhere = one.everywhere(torch.stack([torch.full((1, 2, 2), 5.0), torch.full((1, 2, 2), 7.0)]))
    assert everywhere.flatten(1).mean(1).tolist() == [7, 0, 5, 0]
    whole = torch.zeros(4, 1, 2, 2)
    assert group([0, 1, 2, 3], 0, 0).everywhere(whole) is whole


def test_a_samples_own_generator_serves_one_group() -> None:
    flights = [Flight.from_noise(torch.full((1, 2, 2), float(row))) for row in range(3)]
    drawn = group([1], 0, 0, batch=3).noise(flights)
    assert drawn[1] is flights[1].generator
    assert not {id(drawn[0]), id(drawn[2])} & {id(flight.generator) for flight in flights}
    callers = [torch.Generator() for _ in range(3)]
    own = Group(None, torch.zeros(3, 1), [1], generator=callers)
    assert own.noise(flights) is callers
