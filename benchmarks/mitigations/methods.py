"""Who is compared: every method with its source and the grid it is tuned on.

A point of a grid is a dict of options, as it stands in the CSVs. `build(point, context)` makes the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mitigations.attention import AttentionReweighting
from mitigations.clamping import Region, UpdateClamping
from mitigations.embedding import PromptOptimisation
from mitigations.guided import Guided, paper, released
from mitigations.initial_noise import SharpnessAwareNoise
from mitigations.interface import Mitigation
from mitigations.plain import Plain
from mitigations.prompt_noise import GaussianNoise, RandomNumbers, RandomTokens, RepeatedWords
from mitigations.transition import DynamicTransition, StaticTransition

Point = Mapping[str, Any]
RIVAL, OURS, ABLATION = "rival", "ours", "ablation"
ALL = "paper's form: all three"  # its c3 is the one that every ablation takes


@dataclass(frozen=True)
class Context:
    """What some methods need to know: the index of the training set, and Huang's region."""

    index: Any
    region: Callable[[], Region]


@dataclass(frozen=True)
class Method:
    """`label` is its short name in the pictures; `like`: the method whose chosen point it takes."""

    name: str
    label: str
    group: str
    build: Callable[[Point, Context], Mitigation] = field(repr=False)
    grid: tuple[Point, ...] = ({},)
    like: str | None = None


def _ablation(terms: tuple[str, ...], name: str) -> Method:
    label = "+".join(terms)
    return Method(
        name, label, ABLATION, lambda point, context: paper(context.index, terms, **point), like=ALL
    )


INSERTIONS = tuple({"insertions": count} for count in (1, 2, 4, 8))
METHODS = (
    Method("plain", "plain", RIVAL, lambda point, context: Plain()),
    Method(
        "prompt optimisation (Wen)",
        "Wen",
        RIVAL,
        lambda point, context: PromptOptimisation(**point),
        (
            {"target": 1.0},
            {},
            {"target": 0.5, "learning_rate": 0.1},
            {"learning_rate": 0.1},
            {"learning_rate": 0.1, "iterations": 30},
        ),
    ),
    Method(
        "random tokens (Somepalli)",
        "random tokens",
        RIVAL,
        lambda point, context: RandomTokens(**point),
        INSERTIONS,
    ),
    Method(
        "random numbers (Somepalli)",
        "random numbers",
        RIVAL,
        lambda point, context: RandomNumbers(**point),
        INSERTIONS,
    ),
    Method(
        "repeated words (Somepalli)",
        "repeated words",
        RIVAL,
        lambda point, context: RepeatedWords(**point),
        INSERTIONS,
    ),
    Method(
        "Gaussian noise (Somepalli)",
        "Gaussian noise",
        RIVAL,
        lambda point, context: GaussianNoise(**point),
        tuple({"level": level} for level in (0.1, 0.5, 1.0, 2.0)),
    ),
    Method(
        "attention re-weighting (Ren)",
        "Ren",
        RIVAL,
        lambda point, context: AttentionReweighting(**point),
        tuple(
            {"factor": factor, "mask": mask} for mask in ("padding", "summary") for factor in (1.25, 2.0, 4.0)
        ),
    ),
    Method(
        "static transition (Jain)",
        "STP",
        RIVAL,
        lambda point, context: StaticTransition(**point),
        tuple({"transition": t} for t in (800.0, 700.0, 600.0, 500.0, 300.0)),
    ),
    Method(
        "dynamic transition (Jain)",
        "DTP",
        RIVAL,
        lambda point, context: DynamicTransition(**point),
        ({"before": 0.0}, {"before": 1.0}, {"before": -1.0}, {"before": -2.0}),
    ),
    Method(
        "opposite guidance (Jain)",
        "opposite",
        RIVAL,
        lambda point, context: StaticTransition(**point),
        (
            {"transition": 650.0, "before": -1.0},
            {"transition": 650.0, "before": -2.0},
            {"transition": 650.0, "before": -4.0},
            {"transition": 800.0, "before": -2.0},
            {"transition": 500.0, "before": -2.0},
        ),
    ),
    Method(
        "initial noise (SAIL)",
        "SAIL",
        RIVAL,
        lambda point, context: SharpnessAwareNoise(**point),
        (
            {"form": "released"},
            {"form": "released", "target": 2.5},
            {"form": "released", "learning_rate": 0.1},
            {"form": "released", "alpha": 0.01, "learning_rate": 0.1, "iterations": 20},
            {"form": "paper"},
            {"form": "paper", "alpha": 0.0, "learning_rate": 0.1},
        ),
    ),
    Method(
        "update clamping (Huang)",
        "Huang",
        RIVAL,
        lambda point, context: UpdateClamping(context.region(), **point),
        tuple(
            {"leave": leave, "strong": strong}
            for leave, strong in ((0.5, 0.5), (1.0, 1.0), (1.0, 2.0), (2.0, 2.0), (2.0, 4.0), (3.0, 6.0))
        ),
    ),
    Method("released AMG", "released AMG", RIVAL, lambda point, context: released(context.index)),
    Method(
        ALL,
        "paper's AMG",
        ABLATION,
        lambda point, context: paper(context.index, ("spe", "dup", "sim"), **point),
        tuple({"c3": c3} for c3 in (1.0, 10.0, 30.0, 100.0, 300.0, 500.0, 1000.0)),
    ),
    _ablation(("spe",), "paper's form: despecification"),
    _ablation(("dup",), "paper's form: caption de-duplication"),
    _ablation(("sim",), "paper's form: dissimilarity"),
    _ablation(("spe", "dup"), "paper's form: without dissimilarity"),
    _ablation(("spe", "sim"), "paper's form: without de-duplication"),
    _ablation(("dup", "sim"), "paper's form: without despecification"),
    Method(
        "ours, no final check",
        "ours unchecked",
        ABLATION,
        lambda point, context: Guided(context.index, "main", (("on_memorized", "flag"),)),
    ),
    Method("ours, main", "ours main", OURS, lambda point, context: Guided(context.index, "main")),
    Method("ours, strong", "ours strong", OURS, lambda point, context: Guided(context.index, "strong")),
)
BY_NAME = {method.name: method for method in METHODS}
