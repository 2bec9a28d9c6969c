"""Which rows are measured at a step, and that what is skipped changes nothing of an unsuspected sample."""

from pathlib import Path

import pytest
import torch

from amg.config import AMGConfig
from amg.flight import Flight
from amg.gate import rows_to_check, steps_of

from . import toy
from .one_step import S0, make_case, preset


def config(**options) -> AMGConfig:
    return AMGConfig.preset("main", rewind_threshold=-1.5, **options).for_metric("nl2")


def flights(*suspected: bool) -> list[Flight]:
    return [Flight(torch.Generator(), suspected=one) for one in suspected]


def test_fractions_are_steps_of_the_trajectory() -> None:
    assert steps_of((0.0, 0.56, 1.0), 30) == {0, 16, 29}
    assert steps_of((0.5,), 1) == {0}


def test_every_row_at_checks_and_checkpoints_suspects_in_between() -> None:
    asked = config(check_at=(0.5,), rewind_at=(0.9,))
    rows = [rows_to_check(asked, position, 11, flights(False, True, False)) for position in range(11)]
    assert [len(found) for found in rows] == [1, 1, 1, 1, 1, 3, 1, 1, 1, 3, 1]
    assert rows[0] == [1]


def test_no_checks_means_every_step() -> None:
    asked = config(check_at=(), rewind_at=(0.9,))
    assert all(rows_to_check(asked, position, 11, flights(False, True)) == [0, 1] for position in range(11))


@pytest.mark.parametrize("field", ["check_at", "terms_from"])
def test_fractions_outside_the_trajectory_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"`{field}`.* in \\[0, 1\\], got"):
        AMGConfig.preset("main", **{field: (1.5,) if field == "check_at" else 1.5})


def test_an_unchecked_row_keeps_its_bits_and_its_trace_says_so(tmp_path: Path) -> None:
    """Step 4 of 10 is no check: the suspected rows 1 and 3 are corrected, the others are plain guidance."""
    index = toy.build("cosine", tmp_path / "index")
    every, some = make_case(-1.0), make_case(-1.0)
    for row in (1, 3):
        some.flights[row].suspected = True
    wanted = every.run(preset(), index)
    found = some.run(preset(check_at=(1.0,)), index)
    assert bool(wanted.changed.all())
    assert found.changed.tolist() == [False, True, False, True, False]
    eps_uncond, eps_cond = some.outputs()
    for row, flight in enumerate(some.flights):
        kept = eps_uncond[row] + S0 * (eps_cond[row] - eps_uncond[row])
        if row in (1, 3):
            torch.testing.assert_close(found.output[row], wanted.output[row], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(found.output[row], kept)
        assert (flight.trace[-1].similarity is None) == (row not in (1, 3))
        assert flight.suspected == (row in (1, 3))
