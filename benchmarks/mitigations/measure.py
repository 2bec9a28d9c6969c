"""Prompts by split, and what is measured of the pictures of one method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amg.commands.demo import JUDGE_COPY, LUMINANCE_COPY, caption_jobs
from amg.evaluate import (
    alignment,
    bootstrap_interval,
    class_accuracy,
    fid,
    kid,
    luminance_correlation,
    memorized_share,
    top1,
    top5,
)
from amg.zoo.judge import PhotosJudge
from amg.zoo.photos import TrainingSet

SPLITS = {"validation": 20_000, "test": 30_000}  # first seeds
CALIBRATION_SEED = 40_000
THRESHOLDS = (0.5, 0.4, 0.7)
LEVEL, RESAMPLES = 0.95, 2000


@dataclass(frozen=True)
class Prompts:
    """Per image: its prompt, the subject asked for, whether the prompt is that of a duplicated photograph,
    and its seed."""

    texts: list[str]
    labels: Tensor
    specific: Tensor
    seeds: list[int]


def prompts_of(split: str, count: int, data: TrainingSet) -> Prompts:
    """Three quarters from captions of duplicated photographs, one quarter ordinary; every other caption of
    either kind belongs to "validation", the rest to "test"."""
    if split not in SPLITS or count < 4:
        raise ValueError(
            f"`split` must be one of {tuple(SPLITS)} and `count` >= 4, got {split!r} and {count}"
        )
    kinds, odd = _captions(data), split == "test"
    texts: list[tuple[str, int]] = []
    for kind, share in (("specific", count - count // 4), ("ordinary", count // 4)):
        own = kinds[kind][odd::2]
        texts += [own[i % len(own)] for i in range(share)]
    labels = torch.tensor([label for _, label in texts])
    specific = torch.arange(count) < count - count // 4
    return Prompts([text for text, _ in texts], labels, specific, [SPLITS[split] + i for i in range(count)])


def _captions(data: TrainingSet) -> dict[str, list[tuple[str, int]]]:
    """The demo's captions by kind, each once, with their subjects."""
    jobs = caption_jobs(1024, 0, data)
    kinds: dict[str, list[tuple[str, int]]] = {"specific": [], "ordinary": []}
    for kind, text, label in zip(jobs.kinds, jobs.prompts, jobs.labels.tolist(), strict=True):
        if (text, label) not in kinds[kind]:
            kinds[kind].append((text, label))
    return kinds


@dataclass(frozen=True)
class Judges:
    """What measures: the training set's index, its pictures float [N, 3, H, W] and their features."""

    index: Any
    judge: PhotosJudge
    references: Tensor
    features: Tensor


def judges_for(index: Any, judge: PhotosJudge, data: TrainingSet) -> Judges:
    references = data.images.float() / 255
    return Judges(index, judge, references, torch.cat([judge.features(x) for x in references.split(256)]))


@torch.no_grad()
def measure(images: Tensor, prompts: Prompts, judges: Judges, fid_resamples: int) -> dict[str, float]:
    """All columns of one method's pictures, float [N, 3, H, W] in [0, 1]; shares in percent. Without
    `fid_resamples` FID gets no interval."""
    embeddings = torch.nn.functional.normalize(judges.index.embedder(images), dim=1)
    similarity = judges.index.search(embeddings).similarity.float()
    logits = judges.judge(images)[0]
    probability = logits.softmax(1).gather(1, prompts.labels[:, None])[:, 0]
    row: dict[str, float] = {}
    for threshold in THRESHOLDS:
        row |= share(f"cosine > {threshold}", similarity > threshold)
    row |= {"Top5%": top5(similarity), "Top1": top1(similarity)}
    row |= share("luminance", luminance_correlation(images, judges.references)[0] > LUMINANCE_COPY)
    row |= share("network", judges.judge.copy_probability(images) > JUDGE_COPY)
    row |= distances(judges.judge.features(images), judges.features, fid_resamples)
    row["alignment"] = alignment(logits.softmax(1), prompts.labels)
    low, high = bootstrap_interval(probability, _mean, 0, RESAMPLES, LEVEL)
    row |= {"alignment low": low, "alignment high": high}
    row["subject %"] = 100 * class_accuracy(logits, prompts.labels)
    for kind, rows in (("memorised", prompts.specific), ("ordinary", ~prompts.specific)):
        row[f"subject % {kind}"] = 100 * class_accuracy(logits[rows], prompts.labels[rows])
        row[f"alignment {kind}"] = alignment(logits[rows].softmax(1), prompts.labels[rows])
        texts = [text for text, kept in zip(prompts.texts, rows.tolist(), strict=True) if kept]
        row[f"diversity {kind}"] = diversity(embeddings[rows], texts)
        row[f"cosine > 0.5 % {kind}"] = 100 * (similarity[rows] > 0.5).float().mean().item()
    return row


def share(name: str, hits: Tensor) -> dict[str, float]:
    """A share in percent with its 95 % interval. Where no image or every image is hit the bootstrap has no
    width, so the exact binomial bound (Clopper and Pearson 1934) stands there."""
    values, count = hits.double(), len(hits)
    low, high = bootstrap_interval(values, _mean, 0, RESAMPLES, LEVEL)
    edge = ((1 - LEVEL) / 2) ** (1 / count)
    if not hits.any():
        high = 1 - edge
    if hits.all():
        low = edge
    return {
        f"{name} %": 100 * memorized_share(values, (0.5,))[0],
        f"{name} low": 100 * low,
        f"{name} high": 100 * high,
    }


def distances(features: Tensor, references: Tensor, resamples: int) -> dict[str, float]:
    """FID, its 95 % interval and KID, of features [N, D] taken already. Resampling the pictures biases FID
    upwards, so only the width of the bootstrap's interval is taken: FID ± half of it."""
    both = torch.cat([features, references])
    generated = _numbered(torch.arange(len(features)))
    reference = _numbered(torch.arange(len(features), len(both)))

    def looked_up(rows: Tensor) -> Tensor:
        return both[rows[:, 0, 0, 0].long()]

    def resampled(rows: Tensor) -> float:
        return fid(generated[rows.long()], reference, looked_up, 2048)

    distance = fid(generated, reference, looked_up, 2048)
    found = {
        "FID": distance,
        "KID": kid(generated, reference, looked_up, 2048, subset_size=min(50, len(features)))[0],
    }
    if resamples:
        rows = torch.arange(len(features)).double()
        low, high = bootstrap_interval(rows, resampled, 0, resamples, LEVEL)
        found |= {"FID low": distance - (high - low) / 2, "FID high": distance + (high - low) / 2}
    return found


def _numbered(rows: Tensor) -> Tensor:
    """Pictures [N, 3, 1, 1] that only say which row of the features is theirs."""
    return rows.float()[:, None, None, None].expand(-1, 3, 1, 1)


def diversity(embeddings: Tensor, texts: Sequence[str]) -> float:
    """Mean cosine distance between two pictures of one prompt, over the prompts that have several; unit
    vectors [N, D]. NaN if none has."""
    distances = []
    for text in dict.fromkeys(texts):
        own = embeddings[torch.tensor([other == text for other in texts])]
        if len(own) > 1:
            off = ~torch.eye(len(own), dtype=torch.bool)
            distances.append((1 - own @ own.T)[off].mean().item())
    return sum(distances) / len(distances) if distances else float("nan")


def _mean(values: Tensor) -> float:
    return values.mean().item()
