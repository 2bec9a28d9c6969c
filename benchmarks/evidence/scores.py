"""Detectors out of recorded signals, cross-validated by prompt, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amg.evaluate.detection import auc, tpr_at_fpr
from amg.guidance.calibration import images_needed, miss_bound
from amg.guidance.signals import free_signals
from evidence.recording import Generations

FOLDS = 8
FPR = 0.01
MISSED = 0.1  # the miss rate `amg calibrate` takes by default
RESAMPLES = 1000
FREE = ("gap", "mean_gap", "first_minimum", "cosine", "pixel_cosine", "move", "region", "region_max")
PAIR = ("gap", "pixel_cosine")
REFERENCE = "similarity"
Detector = Callable[[Tensor, Tensor], Tensor]  # (train [N] bool, labels [N] bool) -> scores [N]


@dataclass(frozen=True)
class Worth:
    """What a detector's scores are worth: AUC, TPR at 1 % FPR, the share of negatives below a threshold that
    keeps 90 % of the positives, and 95 % intervals of the first two."""

    auc: float
    tpr: float
    skipped: float
    auc_interval: tuple[float, float]
    tpr_interval: tuple[float, float]


def first_minimum(gap: Tensor) -> Tensor:
    """Position of the first local minimum of m_t among the first k values, for k = 1..T: [N, T]; k where
    there is none yet. gap: [N, T]. A minimum at i is known at k = i + 2."""
    steps = gap.shape[1]
    seen = torch.arange(1, steps + 1).to(gap.dtype)
    if steps < 3:
        return seen.expand(len(gap), steps)
    falls, rises = gap[:, 1:-1] < gap[:, :-2], gap[:, 1:-1] <= gap[:, 2:]
    place = torch.where(falls & rises, torch.arange(1, steps - 1), steps)
    known = place.cummin(1).values.to(gap.dtype)
    padded = torch.cat([gap.new_full((len(gap), 2), steps), known], 1)
    return torch.where(padded < steps, padded, seen)


def values_of(recorded: Generations, usual: Tensor) -> dict[str, Tensor]:
    """Every single signal as known after each step, [N, T] each.

    usual [N] bool: the generations that μ_t and τ_t of ‖x_{t−1} − x_t‖ are taken over.
    """
    gap, moves = recorded.raw[..., 0].sqrt(), recorded.raw[..., 3].sqrt()
    mean, deviation = region_of(recorded, usual)
    outside = (moves - mean).abs() / deviation
    before = free_signals(recorded.raw, mean, deviation)
    return {
        "gap": gap,
        "mean_gap": before["mean_gap"],
        "first_minimum": first_minimum(gap),
        "cosine": before["cosine"],
        "pixel_cosine": recorded.pixel_cosine,
        "move": moves,
        "region": outside,
        "region_max": outside.cummax(1).values,
        REFERENCE: recorded.similarity,
    }


def region_of(recorded: Generations, usual: Tensor) -> tuple[Tensor, Tensor]:
    """μ_t and τ_t of ‖x_{t−1} − x_t‖ over the generations `usual`, [T] each."""
    moves = recorded.raw[usual, :, 3].sqrt()
    return moves.mean(0), moves.std(0).clamp_min(torch.finfo(torch.float32).tiny)


def detectors(recorded: Generations, ordinary: Tensor, seen: int) -> dict[str, Detector]:
    """Every detector after `seen` steps by name. ordinary [N] bool: ordinary prompt and no copy."""

    def column(names: Sequence[str], train: Tensor) -> Tensor:
        values = values_of(recorded, train & ordinary)
        return torch.stack([values[name][:, seen - 1] for name in names], 1)

    def single(name: str) -> Detector:
        return lambda train, labels: signed(column([name], train)[:, 0], train, labels)

    def joined(names: Sequence[str]) -> Detector:
        return lambda train, labels: regressed(column(names, train), train, labels)

    def gate(train: Tensor, labels: Tensor) -> Tensor:
        known = free_signals(recorded.raw, *region_of(recorded, train & ordinary))
        return chosen({name: values[:, seen - 1] for name, values in known.items()}, train, labels)

    return {
        **{name: single(name) for name in FREE},
        "gate": gate,
        " + ".join(PAIR): joined(PAIR),
        "combined": joined(FREE),
        REFERENCE: single(REFERENCE),
    }


def signed(values: Tensor, train: Tensor, labels: Tensor) -> Tensor:
    """`values` [N] turned so that on `train` larger means copy."""
    return values if auc(values[train], labels[train]) >= 0.5 else -values


def regressed(features: Tensor, train: Tensor, labels: Tensor) -> Tensor:
    """Logits [N] of a logistic regression on standardised `features` [N, F], fitted on `train`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(features[train].numpy(), labels[train].numpy())
    return torch.from_numpy(model.decision_function(features.numpy()))


def chosen(values: Mapping[str, Tensor], train: Tensor, labels: Tensor) -> Tensor:
    """The gate's rule: the one signal that on `train` skips most negatives at the miss rate, then by AUC."""

    def merit(scores: Tensor) -> tuple[float, float]:
        threshold = miss_bound(scores[train & labels], MISSED)
        return (scores[train & ~labels] < threshold).double().mean().item(), auc(scores[train], labels[train])

    return max((signed(values[name], train, labels) for name in values), key=merit)


def folds_of(prompts: Sequence[str], kinds: Sequence[str], count: int = FOLDS) -> Tensor:
    """The fold of each image, int64 [N]: all images of a prompt in one, every kind spread evenly."""
    numbers: dict[str, int] = {}
    for kind in dict.fromkeys(kinds):
        mine = dict.fromkeys(p for p, k in zip(prompts, kinds, strict=True) if k == kind)
        numbers |= {prompt: place % count for place, prompt in enumerate(mine)}
    return torch.tensor([numbers[prompt] for prompt in prompts])


def held_out(detector: Detector, labels: Tensor, folds: Tensor) -> Tensor:
    """Scores [N], each from the folds that do not hold the image's prompt, in standard deviations from the
    mean of those folds' negatives, so that folds can be pooled."""
    scores = torch.zeros(len(labels), dtype=torch.float64)
    for fold in folds.unique():
        train = folds != fold
        found = detector(train, labels).double()
        usual = found[train & ~labels]
        spread = usual.std()
        scores[~train] = ((found - usual.mean()) / spread)[~train] if spread > 1e-12 else 0.0
    return scores


def worth(scores: Tensor, labels: Tensor, counts: np.ndarray) -> Worth:
    """What `scores` [N] are worth; counts [R, N]: how often each image is in each bootstrap resample."""
    areas, rates = weighted(scores.numpy(), labels.numpy(), counts)
    return Worth(*_point(scores, labels), _interval(areas), _interval(rates))


def gain(scores: Tensor, rival: Tensor, labels: Tensor, counts: np.ndarray) -> Worth:
    """By how much `scores` are worth more than `rival`, both [N]; intervals over the same resamples."""
    both = [weighted(one.numpy(), labels.numpy(), counts) for one in (scores, rival)]
    areas, rates = (mine - theirs for mine, theirs in zip(*both, strict=True))
    points = zip(_point(scores, labels), _point(rival, labels), strict=True)
    return Worth(*(mine - theirs for mine, theirs in points), _interval(areas), _interval(rates))


def _point(scores: Tensor, labels: Tensor) -> tuple[float, float, float]:
    skipped = (scores[~labels] < kept_at(scores[labels], MISSED)).double().mean().item()
    return auc(scores, labels), tpr_at_fpr(scores, labels, FPR), skipped


def kept_at(positives: Tensor, missed: float) -> float:
    """The largest threshold below which at most the share `missed` of `positives` [n] lies."""
    if len(positives) < images_needed(missed):
        raise ValueError(f"`positives` must be at least {images_needed(missed)}, got {len(positives)}")
    return float(positives.sort().values[int(missed * len(positives) + 1e-9)])


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def resamples(prompts: Sequence[str], kinds: Sequence[str], count: int, seed: int) -> np.ndarray:
    """int [count, N]: prompts drawn with replacement within each kind; how often each image came along."""
    generator, numbers = np.random.default_rng(seed), np.zeros((count, len(prompts)), dtype=np.int64)
    for kind in dict.fromkeys(kinds):
        names = list(dict.fromkeys(p for p, k in zip(prompts, kinds, strict=True) if k == kind))
        place = {name: i for i, name in enumerate(names)}
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        rows = [row for row, k in enumerate(kinds) if k == kind]
        numbers[:, rows] = drawn[:, [place[prompts[row]] for row in rows]]
    return numbers


def weighted(scores: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and TPR at 1 % FPR, [R] each, image i counted counts[r, i] times; see `amg.evaluate.detection`."""
    positive, negative = scores[labels], scores[~labels]
    above = (positive[:, None] > negative).astype(float) + 0.5 * (positive[:, None] == negative)
    more, less = counts[:, labels].astype(float), counts[:, ~labels].astype(float)
    areas = np.einsum("rp,pn,rn->r", more, above, less, optimize=True) / (more.sum(1) * less.sum(1))
    levels, place = np.unique(-scores, return_inverse=True)
    share = []
    for mask, total in ((labels, more.sum(1)), (~labels, less.sum(1))):
        by_level = np.zeros((len(counts), len(levels)))
        np.add.at(by_level.T, place[mask], counts[:, mask].T)
        share.append(by_level.cumsum(1) / total[:, None])
    rates = np.where(share[1] <= FPR + 1e-12, share[0], 0.0).max(1)
    return areas, rates
