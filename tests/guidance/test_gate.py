"""Which rows are measured at a step, and that what is skipped changes nothing of an unsuspected sample."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amg.config import AMGConfig
from amg.engine.frame import Frame, Seat
from amg.engine.measure import _heard as heard
from amg.engine.measure import is_due, looks
from amg.guidance.checkpoint import hears_alarms, restart
from amg.guidance.flight import Flight
from amg.guidance.gate import Gate, Key, Rule, steps_of
from amg.guidance.schedule import Step
from amg.verdict import TraceStep

from .. import toy
from ..one_step import S0, make_case, preset


def config(**options) -> AMGConfig:
    return AMGConfig.preset("main", rewind_threshold=-1.5, **options).for_metric("nl2")


def flights(*suspected: bool) -> list[Flight]:
    return [Flight(torch.zeros(1), suspected=one) for one in suspected]


HISTORY = (4.0, 1.0, 1.0, 1.0)  # raw signals of every step before


def seats_at(asked: AMGConfig, position: int, total: int, batch: list[Flight]) -> list[Seat]:
    step = Step(position, total, 0.0, 0.5, 0.0)
    return [Seat(flight, asked, step, 7.5, False, True, 2 * total, 0) for flight in batch]


def ask(seats: list[Seat], gate: Gate, signals: dict[int, tuple[float, ...]]) -> tuple[list[int], set[int]]:
    """The rows that are measured, and those that the alarm names."""
    nothing = torch.zeros(len(seats), 1)

    def history(rows: list[int], count: int) -> torch.Tensor:
        return torch.tensor(HISTORY).expand(len(rows), count, 4)

    def refused(*arguments: object) -> torch.Tensor:
        raise AssertionError("a gate asks no network")

    frame = Frame(seats, nothing, nothing, nothing, nothing, None, history, refused, refused)
    due = [row for row, seat in enumerate(seats) if is_due(seat)]
    return heard(frame, gate, torch.tensor([signals[row] for row in range(len(seats))]), due)


def rows_to_check(
    asked: AMGConfig,
    position: int,
    total: int,
    batch: list[Flight],
    gate: Gate | None = None,
    signals: dict[int, tuple[float, ...]] | None = None,
) -> list[int]:
    """The rows that are measured at a step."""
    seats = seats_at(asked, position, total, batch)
    if gate is None or signals is None:
        assert [looks(seat, None) for seat in seats] == [is_due(seat) for seat in seats]
        return [row for row, seat in enumerate(seats) if is_due(seat)]
    return ask(seats, gate, signals)[0]


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


def calibrated(threshold: float, sign: float = 1.0) -> Gate:
    return Gate(rules={5: Rule("gap", sign, threshold)}, mean=torch.zeros(10), deviation=torch.ones(10))


def travelled(*suspected: bool) -> list[Flight]:
    """Flights that have five steps behind them."""
    found = flights(*suspected)
    for flight in found:
        flight.trace = [TraceStep(step, 0.0, None, 0.0, None, (), (4.0, 1.0, 1.0, 1.0)) for step in range(5)]
    return found


def test_a_calibrated_check_skips_exactly_the_rows_below_the_threshold() -> None:
    asked, batch = config(check_at=(0.5,), rewind_at=(0.9,)), travelled(False, False, False, False)
    signals = {row: (gap**2, 0.0, 1.0) for row, gap in enumerate((1.0, 2.0, 2.5, 3.0))}
    rows = [rows_to_check(asked, 5, 11, batch, calibrated(at), signals) for at in (0.5, 2.0, 2.6, 9.0)]
    assert rows == [[0, 1, 2, 3], [1, 2, 3], [3], []]
    assert rows_to_check(asked, 5, 11, batch, calibrated(-2.0, -1.0), signals) == [0, 1]
    assert rows_to_check(asked, 4, 11, batch, calibrated(9.0), signals) == []
    assert rows_to_check(asked, 9, 11, batch, calibrated(9.0), signals) == [0, 1, 2, 3]  # no rule there
    every = config(check_at=(), rewind_at=(0.9,))
    assert rows_to_check(every, 5, 11, batch, calibrated(2.6), signals) == [3]


def test_suspected_rewound_and_repeated_samples_are_never_skipped() -> None:
    asked, batch = config(check_at=(0.5,), rewind_at=()), travelled(False, True, False, False)
    batch[2].rewinds, batch[3].retries = 1, 1
    signals = {row: (1.0, 0.0, 1.0) for row in range(4)}
    assert rows_to_check(asked, 5, 11, batch, calibrated(9.0), signals) == [1, 2, 3]


@pytest.mark.parametrize(("position", "heard"), [(1, False), (2, True), (9, True)])
def test_alarms_count_from_the_step_that_samples_go_back_to(position: int, heard: bool) -> None:
    config = AMGConfig.preset("main", rewind_to=0.2, rewind_at=(0.5,))
    assert restart(config, 10) == 2
    assert hears_alarms(config, position, 10) is heard
    for silent in ({"early_rewind": False}, {"rewind_at": ()}):
        assert not hears_alarms(replace(config, **silent), position, 10)


def test_an_alarm_names_first_tries_alone_at_its_step_and_a_combination_is_weighed() -> None:
    batch = travelled(False, False, False)
    batch[2].rewinds = 1
    signals = {row: (gap**2, 0.0, 1.0) for row, gap in enumerate((3.0, 1.0, 3.0))}
    rule = Rule("combined", 1.0, 2.0, (1.0, 1.0, 0.0, 0.0, 0.0, 0.0))  # 1 + log gap > 2
    gate = Gate(mean=torch.zeros(10), deviation=torch.ones(10), alarm={5: rule})
    asked = config(check_at=(1.0,), rewind_at=(0.9,), rewind_to=0.1)
    assert ask(seats_at(asked, 5, 11, batch), gate, signals) == ([], {0})
    assert ask(seats_at(asked, 4, 11, batch), gate, signals) == ([], set())
    batch[0].retries = 1
    assert ask(seats_at(asked, 5, 11, batch), gate, signals) == ([], set())
    assert [looks(seat, gate) for seat in seats_at(asked, 5, 11, batch)] == [False, True, False]


KEY = Key("photos", "ab", "DDIMScheduler", 30, 7.5, "cd", 0.5)
OTHERS = {
    "model": "other",
    "denoiser_sha256": "xy",
    "scheduler": "DDPMScheduler",
    "steps": 50,
    "guidance_scale": 2.0,
    "index_sha256": "xy",
    "threshold": 0.4,
}


@pytest.mark.parametrize(("name", "value"), list(OTHERS.items()))
def test_another_key_is_refused_by_name(name: str, value: object) -> None:
    gate = Gate(KEY, "file.json")
    gate.require(KEY)
    with pytest.raises(ValueError) as error:
        gate.require(replace(KEY, **{name: value}))
    was = getattr(KEY, name)
    assert f"file.json must be for this run's {name}={value!r}, got one for {name}={was!r}" in str(
        error.value
    )


def written(path: Path, **changes: object) -> Path:
    record = {
        "format": "amg calibration",
        "version": 3,
        "key": vars(KEY),
        "region": {"mean": [1.0], "deviation": [2.0]},
        "gate": [{"step": 3, "signal": "cosine", "sign": -1.0, "threshold": 0.1}],
        "alarm": {"step": 2, "signal": "gap", "sign": -1.0, "threshold": -0.5, "caught": 0.9, "false": 0.0},
    }
    path.write_text(json.dumps({**record, **changes}))
    return path


def test_a_file_is_read_as_written(tmp_path: Path) -> None:
    gate = Gate.load(written(tmp_path / "c.json"))
    assert gate.key == KEY and gate.rules == {3: Rule("cosine", -1.0, 0.1)}
    assert gate.alarm == {2: Rule("gap", -1.0, -0.5)}
    assert Gate.load(written(tmp_path / "c.json", alarm=None)).alarm == {}
    assert (gate.mean.tolist(), gate.deviation.tolist()) == ([1.0], [2.0])


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"format": "x"},
        {"key": {"model": "x"}},
        {"gate": [{"step": 3, "signal": "magic", "sign": 1.0, "threshold": 0.0}]},
    ],
)
def test_a_file_of_another_kind_is_refused(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`calibration` must be a file of `amg calibrate`.*bad\.json"):
        Gate.load(written(tmp_path / "bad.json", **changes))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"region": ' + "[" * 100_000, "{", "[]", "null", "\udcff"])
def test_a_file_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"`calibration` must be a file of `amg calibrate`.*bad\.json"):
        Gate.load(path)


@pytest.mark.parametrize("step", ["1e999", "null", '"x"', "[]"])
def test_a_rule_at_no_step_is_refused(step: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.json", gate=[{"step": 12345, "signal": "gap", "sign": 1, "threshold": 0}])
    path.write_text(path.read_text().replace("12345", step))
    with pytest.raises(ValueError, match=r"`calibration` must be a file of `amg calibrate`.*bad\.json"):
        Gate.load(path)


def test_the_guide_gates_rows_by_their_signals(tmp_path: Path) -> None:
    """At the check of step 4 the gate passes over the two rows with the smallest gap and keeps their bits."""
    index, case = toy.build("cosine", tmp_path / "index"), make_case(-1.0)
    every = make_case(-1.0).run(preset(), index)
    eps_uncond, eps_cond = case.outputs()
    gaps = (eps_cond - eps_uncond).flatten(1).norm(dim=1)
    limit = float(gaps.sort().values[1:3].mean())
    gate = Gate(rules={4: Rule("gap", 1.0, limit)}, mean=torch.zeros(9), deviation=torch.ones(9))
    for flight in case.flights:
        flight.trace = [TraceStep(step, 0.0, None, 0.0, None, (), (1.0, 1.0, 1.0, 1.0)) for step in range(4)]
    found = case.run(preset(), index, gate=gate)
    kept = gaps < limit
    assert int(kept.sum()) == 2 and bool(every.changed.all())
    assert torch.equal(found.changed, ~kept)
    for row, flight in enumerate(case.flights):
        assert (flight.trace[-1].similarity is None) == bool(kept[row])
        assert flight.trace[-1].signals is not None
        assert flight.trace[-1].signals[0] ** 0.5 == pytest.approx(float(gaps[row]), rel=1e-4)
    torch.testing.assert_close(found.output[~kept], every.output[~kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.output[kept], (eps_uncond + S0 * (eps_cond - eps_uncond))[kept])
