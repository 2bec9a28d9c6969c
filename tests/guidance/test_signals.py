"""Free signals against the definition in float64, and how traces come by them."""

from itertools import pairwise

import torch

from amg.guidance.flight import Flight
from amg.guidance.signals import SIGNALS, free_signals
from amg.protection.guide import note_moves, traced
from amg.verdict import TraceStep


def test_signals_equal_their_definition_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    count, steps = 5, 7
    uncond, cond = torch.randn(2, count, steps, 48, generator=generator, dtype=torch.float64)
    moves = torch.rand(count, steps, generator=generator, dtype=torch.float64)
    gap = cond - uncond
    raw = torch.stack([(gap**2).sum(-1), (uncond * gap).sum(-1), (uncond**2).sum(-1), moves**2], -1).float()
    mean, deviation = torch.rand(2, steps - 1, generator=generator, dtype=torch.float64) + 0.1
    found = free_signals(raw, mean, deviation)
    assert tuple(found) == SIGNALS
    for row in range(count):
        worst = 0.0
        for step in range(steps):
            own = {name: found[name][row, step].item() for name in SIGNALS}
            wanted = gap[row].norm(dim=-1)
            cosine = torch.cosine_similarity(uncond[row, step], gap[row, step], dim=0).item()
            before = moves[row, step - 1].item() if step else 0.0
            if step:
                worst = max(worst, abs(before - mean[step - 1].item()) / deviation[step - 1].item())
            expected = (wanted[step].item(), wanted[: step + 1].mean().item(), cosine, before, worst)
            for name, value in zip(SIGNALS, expected, strict=True):
                assert abs(own[name] - value) < 1e-5 * max(1.0, abs(value)), (name, row, step)


def test_a_prefix_gives_the_same_signals_as_the_whole() -> None:
    raw = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(2)).double()
    mean, deviation = torch.full((5,), 0.5), torch.full((5,), 0.2)
    whole, part = free_signals(raw, mean, deviation), free_signals(raw[:, :4], mean, deviation)
    assert all(torch.equal(whole[name][:, :4], part[name]) for name in SIGNALS)


def test_no_gap_is_a_cosine_of_zero() -> None:
    found = free_signals(torch.zeros(1, 1, 4), torch.zeros(0), torch.zeros(0))
    assert all(found[name].tolist() == [[0.0]] for name in SIGNALS)


def test_moves_are_told_to_the_step_before_and_not_across_a_rewind() -> None:
    flights = [Flight(torch.zeros(3, 4, 4)) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    samples = [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3)]
    for position, sample in enumerate(samples):
        if position:
            note_moves(flights, samples[position - 1], sample, position)
        for flight in flights:
            flight.trace.append(TraceStep(position, 0.0, None, 0.0, None, (), (1.0, 2.0, 3.0)))
    moved = [(after - before).double().flatten(1).square().sum(1) for before, after in pairwise(samples)]
    wanted = torch.stack(moved, 1)
    raw = traced(flights, 3)
    torch.testing.assert_close(raw[:, :2, 3], wanted, rtol=1e-6, atol=0)
    assert raw[:, 2, 3].tolist() == [0, 0] and raw[:, :, :3].unique().tolist() == [1, 2, 3]
    flights[0].rewinds = 1
    note_moves(flights, samples[2], samples[1], 3)  # row 0 went back, and row 1 did not
    assert [len(flight.trace[-1].signals or ()) for flight in flights] == [3, 4]
    assert traced(flights, 2).shape == (2, 2, 4)
