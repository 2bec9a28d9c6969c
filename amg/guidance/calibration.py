"""What recorded generations say: regions, thresholds with a finite-sample bound, ROC by step, the elbow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amg.evaluate.detection import auc, tpr_at_fpr
from amg.guidance.combine import COMBINED, features, fit, score
from amg.guidance.signals import free_signals

ELBOW_AUC = 0.98
ALARM_CATCHES = 0.25  # of the copies, for a free signal to be worth an alarm
FEWEST_ORDINARY = 4


@dataclass(frozen=True)
class Recorded:
    """N generations of T steps: `raw` free signals [N, T, 4] (see `free_signals`), `similarity` of x0_hat
    [N, T], whether the finished image is a copy [N], whether its prompt was an ordinary one [N]."""

    raw: Tensor
    similarity: Tensor
    copies: Tensor
    ordinary: Tensor


@dataclass(frozen=True)
class Ranking:
    """One score by step: AUC and TPR at 1 % FPR of telling copies; for a free signal also what a gate needs,
    all [T]. `sign` makes larger mean copy; a sample below `threshold` is called ordinary, which befalls the
    share `skipped` of the others and `missed` of the copies; `merit` is what signals are chosen by."""

    auc: list[float]
    tpr: list[float]
    sign: list[float]
    threshold: list[float]
    skipped: list[float]
    missed: list[float]
    merit: list[tuple[float, float]]


def images_needed(miss_rate: float) -> int:
    """The fewest copies from which a threshold of that miss rate can be stated: ⌈1/α⌉ − 1."""
    return math.ceil(1 / miss_rate - 1e-9) - 1


def miss_bound(scores: Tensor, miss_rate: float) -> float:
    """The threshold below which a further copy's score falls with probability at most `miss_rate`.

    scores [n] of copies, larger = more alike; n >= `images_needed`. Split conformal prediction (Vovk et al.
    2005): the ⌈(n+1)(1−α)⌉-th largest, whatever the distribution, for exchangeable scores.
    """
    rank = math.ceil((len(scores) + 1) * (1 - miss_rate) - 1e-9)
    if rank > len(scores):
        raise ValueError(
            f"`scores` must hold at least {images_needed(miss_rate)} copies for a miss rate of {miss_rate}, "
            f"got {len(scores)}"
        )
    return float(scores.sort(descending=True).values[rank - 1])


def alarm_bound(scores: Tensor, false_alarm_rate: float) -> float:
    """The threshold above which a further ordinary image's score rises with probability at most
    `false_alarm_rate`: `miss_bound` turned round. scores [n] of ordinary images, n >= `images_needed`."""
    return -miss_bound(-scores, false_alarm_rate)


def region_of(recorded: Recorded) -> tuple[Tensor, Tensor]:
    """μ_t and τ_t of ‖x_{t−1} − x_t‖ over ordinary prompts' generations that are no copies, float64 [T−1]."""
    moves = recorded.raw[recorded.ordinary & ~recorded.copies, :-1, 3].double().sqrt()
    return moves.mean(0), moves.std(0).clamp_min(torch.finfo(torch.float32).tiny)


def check_counts(recorded: Recorded, miss_rate: float) -> None:
    """ValueError naming the number of images needed, where there are too few."""
    copies, needed = int(recorded.copies.sum()), 2 * images_needed(miss_rate)
    if copies < needed:
        raise ValueError(
            f"`--miss-rate` {miss_rate} needs {needed} memorised images (half choose the signals, half set "
            f"the thresholds), got {copies} of {len(recorded.copies)}: draw more with `--images` or "
            "`--memorized`, or state a larger miss rate"
        )
    ordinary = int((recorded.ordinary & ~recorded.copies).sum())
    if ordinary < FEWEST_ORDINARY:
        raise ValueError(
            f"`--ordinary` must give at least {FEWEST_ORDINARY} images that are no copies, got {ordinary}"
        )


def halves(copies: Tensor) -> tuple[Tensor, Tensor]:
    """Two masks [N]: every second copy and every second other image choose, the rest are held out."""
    choosing = torch.zeros_like(copies)
    for kind in (copies, ~copies):
        choosing[kind.nonzero().flatten()[::2]] = True
    return choosing, ~choosing


def rank_signal(values: Tensor, copies: Tensor, miss_rate: float) -> Ranking:
    """A free signal [N, T]: its sign from the choosing half, everything else from the held-out half."""
    choosing, held_out = halves(copies)
    rows: list[tuple[Any, ...]] = []
    for column in values.double().unbind(1):
        chosen = auc(column[choosing], copies[choosing])
        sign = 1.0 if chosen >= 0.5 else -1.0
        scores = sign * column
        first, _ = _cut(scores[choosing], copies[choosing], miss_rate)
        threshold, missed = _cut(scores[held_out], copies[held_out], miss_rate)
        others, rest = scores[held_out], copies[held_out]
        skipped = _share(others[~rest] < threshold)
        merit = (_share(scores[choosing & ~copies] < first), max(chosen, 1 - chosen))
        rows.append((auc(others, rest), tpr_at_fpr(others, rest), sign, threshold, skipped, missed, merit))
    return Ranking(*(list(column) for column in zip(*rows, strict=True)))


def combination_of(values: Mapping[str, Tensor], copies: Tensor) -> list[list[float]]:
    """Of every step the weights of `amg.guidance.combine.score`, fitted on the choosing half."""
    choosing, steps = halves(copies)[0], next(iter(values.values())).shape[1]
    return [fit(features(values, step)[choosing], copies[choosing]) for step in range(steps)]


def alarm_of(
    values: Mapping[str, Tensor],
    copies: Tensor,
    false_alarm_rate: float,
    weights: Sequence[Sequence[float]] = (),
    heard: range | None = None,
) -> dict[str, Any] | None:
    """The step and the free signal [N, T] that save most by sending copies back at once: the share caught
    at that rate of false alarms, times the steps not run; of the steps `heard` (None: all), chosen on one
    half, its threshold and shares are the held-out half's. None where no signal catches `ALARM_CATCHES`
    of the copies, or there are too few images that are no copies to state the rate."""
    choosing, held_out = halves(copies)
    if int((held_out & ~copies).sum()) < images_needed(false_alarm_rate):
        return None
    found = {}
    for name, columns in values.items():
        for step in range(columns.shape[1]) if heard is None else heard:
            column = columns[:, step]
            caught = _alarm(column, copies, choosing, choosing, false_alarm_rate)["caught"]
            if caught >= ALARM_CATCHES:
                found[step, name] = caught * (columns.shape[1] - 1 - step)
    if not found:
        return None
    step, name = max(found, key=lambda one: found[one])
    rule = _alarm(values[name][:, step], copies, choosing, held_out, false_alarm_rate)
    own = {"weights": list(weights[step])} if name == COMBINED else {}
    return {"step": step, "signal": name, **rule, **own, "false_alarm_rate": false_alarm_rate}


def _alarm(
    column: Tensor, copies: Tensor, choosing: Tensor, part: Tensor, false_alarm_rate: float
) -> dict[str, float]:
    """The sign from the `choosing` images, the threshold and both shares from `part`."""
    sign = 1.0 if auc(column[choosing], copies[choosing]) >= 0.5 else -1.0
    scores = sign * column[part].double()
    threshold = alarm_bound(scores[~copies[part]], false_alarm_rate)
    caught, false = (_share(scores[of] > threshold) for of in (copies[part], ~copies[part]))
    return {"sign": sign, "threshold": threshold, "caught": caught, "false": false}


def _cut(scores: Tensor, copies: Tensor, miss_rate: float) -> tuple[float, float]:
    threshold = miss_bound(scores[copies], miss_rate)
    return threshold, _share(scores[copies] < threshold)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def first_at_least(values: Sequence[float], least: float) -> int | None:
    """The first position whose value reaches `least`."""
    return next((step for step, value in enumerate(values) if value >= least), None)


def elbow_of(similarity: Sequence[float], signals: Mapping[str, Ranking]) -> dict[str, Any]:
    """The earliest steps at which similarity, and a free signal, tell copies with an AUC of `ELBOW_AUC`."""
    found = [(first_at_least(ranking.auc, ELBOW_AUC), name) for name, ranking in signals.items()]
    reached = [(step, name) for step, name in found if step is not None]
    step, name = min(reached, default=(None, None))
    return {
        "auc": ELBOW_AUC,
        "similarity": first_at_least(similarity, ELBOW_AUC),
        "signal": step,
        "signal_name": name,
    }


def choices_of(total: int, preset: set[int], elbow: int | None) -> dict[str, list[int]]:
    """The sets of check steps that are compared."""
    choices = {"every step": list(range(total)), "preset": sorted(preset)}
    if elbow is not None:
        choices["elbow"] = [elbow]
        choices["elbow and two after"] = sorted({elbow, (elbow + total - 1) // 2, total - 1})
    return choices


def cost_of(steps: Sequence[int], close: Tensor, skipped: Tensor, copies: Tensor) -> dict[str, float]:
    """Measuring at `steps`: `close` [N, T] similarity above the rewind threshold, `skipped` [N, T] by the
    gate.

    `measured`: measurements per image that is no copy; `missed`: share of copies no measurement finds close
    (the final check still does); `false_alarms`: share of the others that one finds close.
    """
    at = list(steps)
    measured = ~skipped[:, at]
    found = (close[:, at] & measured).any(1)
    return {
        "measured": measured[~copies].double().sum(1).mean().item(),
        "missed": _share(~found[copies]),
        "false_alarms": _share(found[~copies]),
    }


def calibrate(
    recorded: Recorded,
    miss_rate: float,
    preset: set[int],
    close_at: float,
    false_alarm_rate: float = 0.01,
    guided: range | None = None,
    restart: int = 0,
) -> dict[str, Any]:
    """The body of a calibration file, as plain JSON values.

    preset: the check steps of the preset. close_at: its rewind threshold. guided: the steps that were guided,
    outside which no rule counts (None: all); restart: the step that samples go back to, before which no alarm
    is heard. Errors: ValueError with the number of images needed.
    """
    check_counts(recorded, miss_rate)
    copies, (mean, deviation) = recorded.copies, region_of(recorded)
    values: Mapping[str, Tensor] = free_signals(recorded.raw, mean, deviation)
    weights = combination_of(values, copies)
    scores = [score(features(values, step), own) for step, own in enumerate(weights)]
    values = {**values, COMBINED: torch.stack(scores, 1)}
    signals = {name: rank_signal(value, copies, miss_rate) for name, value in values.items()}
    columns = recorded.similarity.double().unbind(1)
    similarity = [auc(column, copies) for column in columns]
    elbow = elbow_of(similarity, signals)
    guided = range(len(columns)) if guided is None else guided
    gate, skipped = _gate(signals, values, weights, guided)
    close, held_out = recorded.similarity > close_at, halves(copies)[1]
    parts = (close[held_out], skipped[held_out], copies[held_out])
    open_parts = (parts[0], torch.zeros_like(parts[1]), parts[2])
    choices = choices_of(len(similarity), preset, elbow["similarity"])
    return {
        "miss_rate": miss_rate,
        "false_alarm_rate": false_alarm_rate,
        "images": {
            "all": len(copies),
            "ordinary": int(recorded.ordinary.sum()),
            "memorized": int(copies.sum()),
            "held_out_memorized": int(copies[held_out].sum()),
        },
        "region": {"mean": mean.tolist(), "deviation": deviation.tolist()},
        "similarity": {"auc": similarity, "tpr": [tpr_at_fpr(column, copies) for column in columns]},
        "signals": {name: _plain(ranking) for name, ranking in signals.items()},
        "gate": gate,
        "alarm": alarm_of(values, copies, false_alarm_rate, weights, guided[restart:]),
        "elbow": elbow,
        "choices": [
            {"name": name, "steps": at, "ungated": cost_of(at, *open_parts), "gated": cost_of(at, *parts)}
            for name, at in choices.items()
        ],
    }


def _plain(ranking: Ranking) -> dict[str, Any]:
    return {name: values for name, values in vars(ranking).items() if name != "merit"}


def _gate(
    signals: Mapping[str, Ranking],
    values: Mapping[str, Tensor],
    weights: Sequence[Sequence[float]],
    guided: range,
) -> tuple[list[dict[str, Any]], Tensor]:
    """The rule of each guided step, the signal with the most merit, and what the rules skip [N, T]."""
    rules, skipped = [], []
    first = next(iter(values.values()))
    for step in range(first.shape[1]):
        if step not in guided:
            skipped.append(torch.zeros(len(first), dtype=torch.bool))
            continue
        name = max(signals, key=lambda one: signals[one].merit[step])
        rank = signals[name]
        sign, threshold = rank.sign[step], rank.threshold[step]
        own = {"weights": list(weights[step])} if name == COMBINED else {}
        rules.append({"step": step, "signal": name, "sign": sign, "threshold": threshold, **own})
        skipped.append(sign * values[name][:, step] < threshold)
    return rules, torch.stack(skipped, 1)
