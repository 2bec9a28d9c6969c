"""The steps that look: which samples are due, what was found, who goes back, whose gate opens.

x0_hat -> similarity -> decision. What acts on the open ones is in `amg.engine.correct`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.correct import correct
from amg.engine.frame import Frame, Seat, Terms, predict
from amg.engine.look import Look, Tools, at_checkpoint, chosen, guarded, look, look_cheaply, too_close
from amg.guidance.checkpoint import affords, hears_alarms, is_check
from amg.guidance.gate import Gate
from amg.guidance.note import Note
from amg.guidance.ordinary import despecify
from amg.guidance.read import read


class Found(NamedTuple):
    """Of one step: the `terms` that act in it, a `Note` of every sample looked at, and the samples whose
    x0_hat or similarity is not finite."""

    terms: Terms | None
    notes: dict[int, Note]
    broken: list[int]


def looks(seat: Seat, gate: Gate | None) -> bool:
    """Whether the host must do more at this step than let the kernel run."""
    return is_due(seat) or _alarms(seat, gate)


def is_due(seat: Seat) -> bool:
    """All samples are measured at the checks, in between those suspected: with a gate open when they were
    last measured. Skipping only saves work: finished images are always checked."""
    config, step = seat.config, seat.step
    return config.active and (seat.flight.suspected or is_check(config, step.position, step.total))


def measure(frame: Frame, tools: Tools) -> Found:
    """Look at the samples that are due, mark those that go back, and find what acts on the others.

    A sample that an alarm alone sends back is told its neighbour by the student, where there is one.
    """
    predicted = predict(frame)
    due = [row for row, seat in enumerate(frame.seats) if is_due(seat)]
    alarmed: set[int] = set()
    if tools.gate is not None:
        due, alarmed = _heard(frame, tools.gate, predicted.signals, due)
    asked = sorted({*due, *alarmed})
    near, cheaply = look_cheaply(frame, tools, predicted.x0_hat, asked) if asked else ([], {})
    notes = {row: Note(seen.similarity, seen.row, estimated=True) for row, seen in cheaply.items()}
    for row in cheaply:
        frame.seats[row].flight.suspected = False
    warned = {row: cheaply[row] for row in alarmed if row in cheaply and row not in due}
    rows = [row for row in near if row not in warned]
    if not rows:
        _send_back(frame, tools, warned, alarmed, notes)
        return Found(None, notes, [])
    measured, seen_by = look(frame, tools, predicted.x0_hat, rows)
    notes.update({row: Note(seen.similarity, seen.row) for row, seen in seen_by.items()})
    broken = [row for row in rows if not seen_by[row].finite]
    whole = {row: seen for row, seen in seen_by.items() if seen.finite}
    gone = _send_back(frame, tools, {**whole, **warned}, alarmed, notes)
    opened = [row for row, seen in whole.items() if row not in gone and _opens(frame.seats[row], seen)]
    for row in whole:
        frame.seats[row].flight.suspected = row in opened
    terms = correct(frame, tools, predicted.x0_hat, rows, measured, whole, opened, gone, notes)
    return Found(terms, notes, broken)


def _opens(seat: Seat, seen: Look) -> bool:
    """Whether the terms act: sigma > lambda_t, from `terms_from` on."""
    config, step = seat.config, seat.step
    above = seen.similarity > step.threshold or not config.gated
    return above and step.position >= (config.terms_from or 0.0) * (step.total - 1)


def _alarms(seat: Seat, gate: Gate | None) -> bool:
    """Whether a calibration's alarm is listened for: first tries alone were calibrated."""
    if gate is None or not seat.config.active or not _first(seat):
        return False
    step = seat.step
    return step.position in gate.alarm and hears_alarms(seat.config, step.position, step.total)


def _first(seat: Seat) -> bool:
    return not (seat.flight.rewinds or seat.flight.retries)


def _heard(frame: Frame, gate: Gate, signals: Tensor, due: Sequence[int]) -> tuple[list[int], set[int]]:
    """`due` less the samples that a calibration calls ordinary, and those its alarm names: one read, where
    there is a rule to ask."""
    seats = frame.seats
    skips = {
        row
        for row in due
        if _first(seats[row]) and not seats[row].flight.suspected and seats[row].step.position in gate.rules
    }
    asked = sorted(skips | {row for row, seat in enumerate(seats) if _alarms(seat, gate)})
    excess = _excess(frame, gate, signals, asked)
    ordinary = {row for row in skips if excess[row][0] < 0}
    alarmed = {row for row in asked if _alarms(seats[row], gate) and excess[row][1] > 0}
    return [row for row in due if row not in ordinary], alarmed


def _excess(frame: Frame, gate: Gate, signals: Tensor, asked: Sequence[int]) -> dict[int, list[float]]:
    """How far each sample is beyond the rule and beyond the alarm of its own step."""
    columns, order = [], []
    for position in dict.fromkeys(frame.seats[row].step.position for row in asked):
        rows = [row for row in asked if frame.seats[row].step.position == position]
        now = torch.nn.functional.pad(chosen(signals, rows), (0, 1))[:, None]
        raw = torch.cat([frame.history(rows, position), now], 1)
        rules = (gate.rules.get(position), gate.alarm.get(position))
        none = torch.zeros(len(rows), dtype=torch.float64, device=raw.device)
        found = [none if rule is None else gate.excess(rule, position, raw) for rule in rules]
        columns.append(torch.stack(found, 1))
        order += rows
    if not order:
        return {}
    return dict(zip(order, read(*torch.cat(columns).unbind(1)), strict=True))


def _send_back(
    frame: Frame, tools: Tools, seen_by: dict[int, Look], alarmed: Iterable[int], notes: dict[int, Note]
) -> set[int]:
    """Mark the samples that go back after this step, too close at a checkpoint or alarmed, and choose their
    next captions; the rows marked.

    A sample that went back `max_rewinds` times stays. For one that would go back and cannot afford it nothing
    is left to try: what the terms can still do is to push a copy under the metric's threshold.
    """
    gone, samples = set(), []
    for row, seen in seen_by.items():
        seat = frame.seats[row]
        flight, config = seat.flight, seat.config
        close = at_checkpoint(seat) and too_close(config, seen)
        if not (close or row in alarmed) or flight.rewinds >= (config.max_rewinds or 0):
            continue
        if not affords(config, flight, seat.plain, seat.plain):
            flight.exhausted = True
            continue
        flight.pending = True
        gone.add(row)
        notes[row].terms.append("rewind")
        samples.append((flight, config, _named(config, seen, close)))
    despecify(tools.index, tools.denoiser, tools.ordinary, samples)
    return gone


def _named(config: AMGConfig, seen: Look, close: bool) -> int:
    """The training image that the index found close, or else its guard; -1 where neither did."""
    assert config.rewind_threshold is not None
    if not close or seen.similarity > config.rewind_threshold:
        return seen.row
    return seen.guard_row if guarded(config, seen) else -1
