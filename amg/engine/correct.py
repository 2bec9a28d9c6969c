"""What acts on the samples whose gate is open: the strengths of the three terms, and what they point along.

prompt's halves, neighbour's caption -> s1, s2 -> corrected x0_hat -> its similarity and gradient -> s3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amg.engine.frame import CLOSED, COLUMN, OPEN, Frame, Seat, Terms, predict
from amg.engine.look import Look, Tools, chosen
from amg.guidance import terms as guidance
from amg.guidance.checkpoint import affords
from amg.guidance.note import Note
from amg.guidance.ordinary import hold_deduplicated
from amg.similarity import Measured


class Strengths(NamedTuple):
    """s1 and s2 of one sample at this step."""

    s1: float
    s2: float


class Part(NamedTuple):
    """Rows of a frame under one config, and their x0_hat and what was measured of it."""

    rows: Sequence[int]
    x0_hat: Tensor
    measured: Measured


def correct(
    frame: Frame,
    tools: Tools,
    x0_hat: Tensor,
    rows: Sequence[int],
    measured: Measured,
    seen_by: dict[int, Look],
    opened: Sequence[int],
    gone: set[int],
    notes: dict[int, Note],
) -> Terms | None:
    """The terms of the `opened` rows; under the released form of those below lambda_t, too. `measured` is of
    `rows`, those that were looked at, `seen_by` what the host knows of it, `gone` those that go back."""
    strengths = {}
    for row in seen_by:
        if row in opened or (frame.seats[row].config.form == "released" and row not in gone):
            strengths[row] = _strengths(frame.seats[row], tools, seen_by[row], row in opened)
    acting = [row for row in strengths if row in opened or any(strengths[row])]
    if not acting:
        return None
    terms = _guided_terms(frame, tools, acting, strengths, seen_by, notes)
    moved = [row for row in acting if any(strengths[row])]
    again = [row for row in moved if _measures_again(frame.seats[row])]
    pushed = [row for row in acting if row in opened or row in again]
    pushed = [row for row in pushed if frame.seats[row].config.c3 and _affords_gradient(frame.seats[row])]
    if not pushed:
        return terms if moved else None
    parts = _parts(frame, tools, terms, x0_hat, rows, measured, pushed, again)
    return _pushed_terms(frame, tools, terms, parts, notes)


def _measures_again(seat: Seat) -> bool:
    return seat.config.step_length == "exact" or seat.config.form == "released"


def _affords_gradient(seat: Seat) -> bool:
    needed = seat.rest + seat.cost
    return seat.config.gradient != "full" or affords(seat.config, seat.flight, needed, seat.plain)


def _strengths(seat: Seat, tools: Tools, seen: Look, is_open: bool) -> Strengths:
    """s1 and s2; 0 where there is no unconditional half, and for a sample already despecified by its later
    try."""
    if not seat.guided:
        return Strengths(0.0, 0.0)
    config = seat.config
    assert config.c1 is not None and config.c2 is not None and config.c3 is not None
    constants = (seat.scale, config.c1, config.c2, config.c3)
    if config.form == "released":
        if is_open:
            hold_deduplicated(tools.index, seat.flight, seen.row, seat.step.position)
        s1, s2, _ = guidance.released_scales(seen.similarity, *constants, float(seat.step.t))
        held = seat.step.position < seat.flight.deduplicated_until
        return Strengths(s1 if seen.similarity > 0 or held else 0.0, s2 if held else 0.0)
    if seat.low:
        return Strengths(0.0, 0.0)
    return Strengths(*guidance.scales(seen.similarity, *constants)[:2])


def _guided_terms(
    frame: Frame,
    tools: Tools,
    acting: Sequence[int],
    strengths: dict[int, Strengths],
    seen_by: dict[int, Look],
    notes: dict[int, Note],
) -> Terms:
    """Despecification and de-duplication of the `acting` rows; s2 acts where the neighbour has a caption and
    `max_evaluations` allows its evaluation."""
    captions = {
        row: _caption(frame.seats[row], tools, seen_by[row]) for row in acting if strengths[row].s2 > 0
    }
    told = [row for row, caption in captions.items() if caption is not None]
    table = torch.zeros(len(frame.seats), 4, dtype=torch.float32, device="cpu")
    table[:, 0] = CLOSED
    pointers = torch.full((2, len(frame.seats)), -1, dtype=torch.int32, device="cpu")
    for row in acting:
        s1, s2 = strengths[row]
        table[row, :3] = torch.tensor([OPEN, s1, s2 if row in told else 0.0], device="cpu")
        if s1 > 0:
            notes[row].terms.append("despecification")
    eps_neighbour = None
    if told:
        eps_neighbour = frame.ask_neighbours(told, [str(captions[row]) for row in told])
        for at, row in enumerate(told):
            pointers[0, row] = at
            frame.seats[row].flight.evaluations += 1
            notes[row].terms.append("deduplication")
    device = frame.sample.device
    table = table.to(device)
    coefficients = frame.coefficients.clone()
    coefficients[:, COLUMN["threshold"]] = 0.0
    coefficients[:, COLUMN["c1"] : COLUMN["c3"] + 1] = table[:, 1:].to(coefficients.dtype)
    rows = torch.cat([frame.rows[:2], pointers.to(device)])
    return Terms(table[:, 0].contiguous(), coefficients, rows, eps_neighbour)


def _caption(seat: Seat, tools: Tools, seen: Look) -> str | None:
    caption: str | None = tools.index.captions[seen.row]
    if tools.denoiser.encode_captions is None or caption is None:
        return None
    return caption if affords(seat.config, seat.flight, seat.rest + 1, seat.plain) else None


def _parts(
    frame: Frame,
    tools: Tools,
    terms: Terms,
    x0_hat: Tensor,
    rows: Sequence[int],
    measured: Measured,
    pushed: Sequence[int],
    again: Sequence[int],
) -> list[Part]:
    """The `pushed` rows with what is known of them once the first two terms acted: measured anew where these
    moved one and its length is to be exact."""
    anew, kept = [row for row in pushed if row in again], [row for row in pushed if row not in again]
    parts = []
    if kept:
        places = torch.tensor([rows.index(row) for row in kept], device=measured.similarity.device)
        own = measured if len(kept) == len(rows) else measured.take(places)
        parts.append(Part(kept, chosen(x0_hat, kept), own))
    if anew:
        corrected = chosen(predict(frame, terms).x0_hat, anew)
        parts.append(Part(anew, corrected, tools.similarity.measure_with_gradient(corrected)))
    return [own for part in parts for own in _by_config(frame, part)]


def _by_config(frame: Frame, part: Part) -> list[Part]:
    """Rows of one config each: first tries may run beside others' re-runs."""
    configs = dict.fromkeys(frame.seats[row].config for row in part.rows)
    if len(configs) == 1:
        return [part]
    parts = []
    for config in configs:
        own = [at for at, row in enumerate(part.rows) if frame.seats[row].config == config]
        measured = part.measured.take(torch.tensor(own, device=part.measured.similarity.device))
        parts.append(Part([part.rows[at] for at in own], chosen(part.x0_hat, own), measured))
    return parts


def _pushed_terms(
    frame: Frame, tools: Tools, terms: Terms, parts: Sequence[Part], notes: dict[int, Note]
) -> Terms:
    """The dissimilarity term on top, of the rows whose similarity is still above lambda_t."""
    pushes, lengths = [], []
    for part in parts:
        push, s3 = _pushed(frame, tools, part, notes)
        pushes.append(push)
        lengths.append(s3.to(terms.coefficients))
    here = torch.tensor([row for part in parts for row in part.rows], device=frame.sample.device)
    coefficients, pointers = terms.coefficients.clone(), terms.rows.clone()
    coefficients[here, COLUMN["c3"]] = torch.cat(lengths)
    pointers[3, here] = torch.arange(len(here), dtype=torch.int32, device=here.device)
    return terms._replace(coefficients=coefficients, rows=pointers, gradient=torch.cat(pushes))


def _pushed(frame: Frame, tools: Tools, part: Part, notes: dict[int, Note]) -> tuple[Tensor, Tensor]:
    """(G [R, ...] float32, 0 where the term does not act, s3 [R]) of rows of one config."""
    seats, similarity = [frame.seats[row] for row in part.rows], part.measured.similarity
    thresholds = [seat.step.threshold for seat in seats]
    threshold = torch.tensor(thresholds, dtype=torch.float32, device=similarity.device)
    ungated = torch.tensor([not seat.config.gated for seat in seats], device=similarity.device)
    begun = [seat.step.position >= (seat.config.terms_from or 0.0) * (seat.step.total - 1) for seat in seats]
    acted = ((similarity > threshold) | ungated) & torch.tensor(begun, device=similarity.device)
    push, s3 = _push(frame, tools, part.rows, part.x0_hat, part.measured, threshold)
    mask = acted.to(push.device).view(-1, *[1] * (push.ndim - 1))
    for at, row in enumerate(part.rows):
        notes[row].acted = acted[at]
    return torch.where(mask, push, 0.0).float().contiguous(), s3


def _push(
    frame: Frame, tools: Tools, pushed: Sequence[int], x0_hat: Tensor, measured: Measured, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """(G [R, ...], s3 [R]) whose s3·sqrt(1 - alpha_bar)·G is the change of the noise prediction: the gradient
    of sigma by x_t, or a shift of x0_hat of exact length."""
    config, similarity = frame.seats[pushed[0]].config, tools.similarity
    here = torch.tensor(pushed, device=frame.sample.device)
    levels = [frame.seats[row].step.alpha_bar for row in pushed]
    alpha_bar = torch.tensor(levels, dtype=torch.float32, device=here.device)
    exact = -alpha_bar.sqrt() / (1 - alpha_bar)  # a shift of x0_hat as one of eps, over sqrt(1 - alpha_bar)
    if config.step_length == "exact" and config.gradient == "frozen":
        return similarity.shift(x0_hat, measured, threshold), exact
    x0_grad = similarity.gradient(x0_hat, measured)
    root = guidance.per_sample(alpha_bar.sqrt(), x0_grad)
    gradient = x0_grad / root
    if config.gradient == "full":
        gradient = frame.ask_gradient(pushed, x0_grad)
        for row in pushed:
            frame.seats[row].flight.evaluations += frame.seats[row].cost
    if config.step_length == "exact":
        return guidance.newton_shift(gradient * root, measured.similarity, threshold), exact
    return gradient, _s3(frame, tools, pushed, measured, threshold)


def _s3(frame: Frame, tools: Tools, pushed: Sequence[int], measured: Measured, threshold: Tensor) -> Tensor:
    config = frame.seats[pushed[0]].config
    assert config.c3 is not None
    if config.form != "released":
        return torch.full_like(measured.similarity, config.c3)
    if tools.index.metric == "nl2":
        return config.c3 * (measured.similarity - threshold)
    rise = [guidance.released_rise(float(frame.seats[row].step.t)) for row in pushed]
    return config.c3 * (measured.similarity - 0.3) * measured.similarity.new_tensor(rise)
