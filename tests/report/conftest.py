"""A small report with known numbers, shared by the tests of the page."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from amg.report import Report, Sample, Section, Table
from amg.verdict import Neighbour, TraceStep, Verdict

COLUMNS = ("off", "main")


def image(seed: int, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size // 4, size // 4, 3))
    smooth = np.kron(coarse, np.ones((4, 4, 1))) + rng.normal(0, 4, (size, size, 3))
    return np.clip(smooth, 0, 255).astype(np.uint8)


def trace(final: float, rewind: bool = False, steps: int = 50) -> tuple[TraceStep, ...]:
    order = list(range(steps)) if not rewind else [*range(29), *range(6, steps)]
    entries = []
    for n, step in enumerate(order):
        last_before = rewind and n == 28
        terms = (("dissimilarity",) if step % 3 == 0 else ()) + (("rewind",) if last_before else ())
        similarity = None if step % 5 == 4 else final * (step + 1) / steps
        entries.append(TraceStep(step, 980.0 - 20 * step, similarity, 0.3 + 0.002 * step, n, terms))
    return tuple(entries)


def verdict(similarity: float, metric: str = "cosine", threshold: float = 0.5, **more) -> Verdict:
    neighbour = more.pop("neighbour", Neighbour(7, "photos/cat.png", "a cat"))
    return Verdict(metric, similarity, threshold, neighbour, similarity > threshold, **more)


def sample(number: int, similarity: float, kind: str = "specific", prompt: str = "a cat", **more) -> Sample:
    guided = more.pop("guided", verdict(0.3, rewinds=1, evaluations=160, trace=trace(0.3, rewind=True)))
    return Sample(
        kind=kind,
        prompt=prompt,
        seed=100 + number,
        images={"off": image(3 * number), "main": image(3 * number + 1)},
        verdicts={"off": verdict(similarity, evaluations=100, trace=trace(similarity)), "main": guided},
        nearest={"off": image(9000 + number % 4), "main": image(3 * number + 2)},
        judges={"luminance correlation": {"off": 0.95 if similarity > 0.5 else 0.4, "main": 0.41}},
    )


def section(samples: list[Sample] | None = None, **more) -> Section:
    if samples is None:
        samples = [sample(n, 0.9 if n < 3 else 0.2, "specific" if n < 5 else "ordinary") for n in range(8)]
    given = {
        "title": "Captioned photographs",
        "model": "photos-sd",
        "description": "A model that memorised.",
        "metric": "cosine",
        "thresholds": {"memorised": 0.5},
        "columns": COLUMNS,
        "samples": samples,
        "table": Table(["guidance", "FID"], [["off", 71.25], ["main", 70.5]], ["FID: photos-embedder."]),
        "judges": {"luminance correlation": 0.9},
    }
    return Section(**(given | more))


def report(*sections: Section, **more) -> Report:
    given = {
        "title": "A report",
        "sections": sections or (section(),),
        "configuration": {"main": {"c1": 10.5, "rewind": {"checkpoints": [28, 40]}}, "steps": 50},
        "versions": {"torch": "2.13.0"},
        "command": "amg demo --seed 0",
        "created": "2026-02-01 12:00",
    }
    return Report(**(given | more))


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The builders of this file: make.report(make.section([make.sample(...)])), make.verdict(...) …"""
    return SimpleNamespace(
        image=image,
        trace=trace,
        verdict=verdict,
        sample=sample,
        section=section,
        report=report,
        columns=COLUMNS,
    )
