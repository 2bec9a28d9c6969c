"""From which step on nL2 of x0_hat tells copies: what the checks of the CIFAR-10 rows are placed by."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import FLAGGED, Row, draw

from amg.evaluate import auc, tpr_at_fpr
from amg.verdict import Verdict

MEASURE_ONLY = {"c3": 0.0, "check_at": (), "rewind_at": (), **FLAGGED}


def record_trajectories(path: Path, pipe: Any, index: Any, seeds: Sequence[int], steps: int) -> None:
    """Draw unconditional pictures unguided, measured at every step, and write `by_step` as a CSV."""
    row = Row("trajectories", "unconditional", "measured only", "main", MEASURE_ONLY)
    lines = by_step(draw(pipe, index, row, seeds, steps).verdicts)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.4g}" for name, value in line.items()} for line in lines)
    for line in lines:
        print(" ".join(f"{name} {value:.3f}" for name, value in line.items()), flush=True)


def by_step(verdicts: Sequence[Verdict]) -> list[dict[str, float]]:
    """Per step: how well sigma of x0_hat tells the images that end as copies, and the medians of both.

    A copy is what its verdict calls memorised. Every step of every trace must have been measured.
    """
    copies = torch.tensor([verdict.memorized for verdict in verdicts])
    similarity = torch.tensor([[step.similarity for step in verdict.trace] for verdict in verdicts])
    return [
        {
            "step": step,
            "AUC": auc(values, copies),
            "copies above 5 % of the others": tpr_at_fpr(values, copies, 0.05),
            "nL2 of copies": -values[copies].median().item(),
            "nL2 of others": -values[~copies].median().item(),
            "images": len(verdicts),
            "copies": int(copies.sum()),
        }
        for step, values in enumerate(similarity.T)
    ]
