"""Judges of the CIFAR-10 benchmark that guidance never sees, and the figures of one table row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import Subset, read_rows
from resnet20 import ResNet20, load_resnet20
from torch import Tensor
from torch.nn import functional

from amg.config import AMGConfig
from amg.evaluate import (
    MEMORIZED_CORRELATION,
    bootstrap_interval,
    class_accuracy,
    fid,
    luminance_correlation,
    memorized_share,
    top1,
    top5,
)
from amg.guidance.flight import Flight
from amg.promise import check
from amg.verdict import Verdict

HELD_OUT = slice(10_000, 14_000)  # rows of the Parquet that are in no training set
QUANTILE = 0.995  # of the held-out images' largest similarity: the copy threshold
BATCH = 250


@dataclass(frozen=True)
class CopyJudge:
    """ResNet-20's layouts of the training images, centred and of unit length, [N, 2048]; a picture whose
    cosine to one of them exceeds `threshold` is a copy. `centre` [2048] is their mean."""

    network: ResNet20
    centre: Tensor
    rows: Tensor
    threshold: float

    @torch.no_grad()
    def similarity(self, images: Tensor) -> Tensor:
        """Largest cosine to a training image, float32 [B]; images float32 [B, 3, 32, 32] in [0, 1]."""
        found = [
            (_unit(self.network.layout(batch) - self.centre) @ self.rows.T).amax(1)
            for batch in images.split(BATCH)
        ]
        return torch.cat(found)


def copy_judge(
    network: ResNet20, training: Tensor, held_out: Tensor, quantile: float = QUANTILE
) -> CopyJudge:
    """The judge of a training set, float32 [N, 3, 32, 32] in [0, 1]. Its threshold is the `quantile` of
    `held_out`'s largest similarity: real pictures of the same kind that nobody copied."""
    with torch.no_grad():
        layouts = torch.cat([network.layout(batch) for batch in training.split(BATCH)])
    centre = layouts.mean(0)
    judge = CopyJudge(network, centre, _unit(layouts - centre), 1.0)
    threshold = torch.quantile(judge.similarity(held_out), quantile).item()
    return CopyJudge(network, centre, judge.rows, threshold)


def _unit(rows: Tensor) -> Tensor:
    return functional.normalize(rows, dim=1)


@dataclass(frozen=True)
class Judges:
    """What pictures are judged against: the distinct training images and ResNet-20."""

    references: Tensor
    network: ResNet20
    copies: CopyJudge
    held_out: Tensor
    held_out_labels: Tensor


def open_judges(subset: Subset, data: Path, resnet: Path) -> Judges:
    """The judges of a training subset; `data` is the Parquet, `resnet` the safetensors file."""
    network = load_resnet20(resnet)
    images, labels = read_rows(data, HELD_OUT)
    held_out = images.float() / 255
    copies = copy_judge(network, subset.distinct, held_out)
    return Judges(subset.distinct, network, copies, held_out, labels)


def figures(
    images: Tensor, verdicts: Sequence[Verdict], labels: Tensor | None, judges: Judges
) -> dict[str, float]:
    """The measured columns of one row. images float32 [N, 3, 32, 32] in [0, 1]; labels int64 [N] asked for.

    Shares are in per cent over the delivered images (blocked ones are counted apart), with bootstrap 95 %
    intervals; nL2 is positive, so Top5% is its 5th percentile and Top1 its minimum.
    """
    kept = torch.tensor([not verdict.blocked for verdict in verdicts])
    similarity = torch.tensor([verdict.similarity for verdict in verdicts])[kept]
    late = torch.tensor([float(bool(verdict.retries) or verdict.memorized) for verdict in verdicts])
    images = images[kept]
    luminance = luminance_correlation(images, judges.references)[0]
    with torch.no_grad():
        logits = judges.network(images)
    count = len(verdicts)
    return {
        "Top5% nL2": -top5(similarity),
        "Top1 nL2": -top1(similarity),
        **_share("< 1.4 %", similarity, -1.4),
        **_share("< 1.6 %", similarity, -1.6),
        **_share("luminance judge %", luminance, MEMORIZED_CORRELATION),
        **_share("ResNet-20 judge %", judges.copies.similarity(images), judges.copies.threshold),
        "FID": fid(images, judges.references, judges.network.features),
        "class accuracy %": float("nan") if labels is None else 100 * class_accuracy(logits, labels[kept]),
        "before the final check %": 100 * late.mean().item(),
        "blocked": float(count - int(kept.sum())),
        "rewinds/image": sum(verdict.rewinds for verdict in verdicts) / count,
        "retries/image": sum(verdict.retries for verdict in verdicts) / count,
        "evaluations/image": sum(verdict.evaluations for verdict in verdicts) / count,
    }


def real_verdicts(images: Tensor, index: Any) -> list[Verdict]:
    """The final check of pictures that nobody generated: how near real ones come to the training set."""
    flights = [Flight.from_noise(image) for image in images]
    return check(images, index, (), AMGConfig.preset("off").for_metric(index.metric), flights)


def _share(name: str, values: Tensor, threshold: float) -> dict[str, float]:
    above = (values > threshold).float()
    low, high = bootstrap_interval(above, lambda chosen: chosen.mean().item(), seed=0)
    share = memorized_share(values, (threshold,))[0]
    return {name: 100 * share, f"{name} low": 100 * low, f"{name} high": 100 * high}
