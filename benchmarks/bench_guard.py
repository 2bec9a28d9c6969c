"""What guard and bank add on photos-sd: indexes with and without captions, memorised and ordinary prompts.

python benchmarks/bench_guard.py                 # 256 of each kind; benchmarks/results/guard.csv
python benchmarks/bench_guard.py --images 16     # quick
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from protocol import RESULTS
from torch import Tensor

import amg
from amg.commands.audit.bundled import subject_of
from amg.commands.demo import GUIDANCE_SCALES, JUDGE_COPY, LUMINANCE_COPY, open_index, open_pipeline
from amg.embed.photos import load_photos
from amg.evaluate.judges import luminance_correlation
from amg.zoo.judge import load_judge
from amg.zoo.judge_2 import load_judge_2
from amg.zoo.photos import PHOTOS, TrainingSet, training_set
from amg.zoo.photos import PLACES as EVERYWHERE

MODEL, STEPS, SEED, BATCH = "photos-sd", 30, 4000, 16
PLACES = ("top left", "middle right", "bottom centre")


@dataclass(frozen=True)
class Case:
    """An index, a preset and what it is asked for."""

    index: str
    prompts: str
    preset: str
    guard: bool
    bank: bool = False


CASES = (
    Case("captions", "memorised", "off", True),
    Case("captions", "memorised", "main", False),
    Case("captions", "memorised", "main", True),
    Case("no captions", "memorised", "main", False),
    Case("no captions", "memorised", "main", True),
    Case("no captions", "memorised", "main", True, True),
    Case("captions", "ordinary", "off", True),
    Case("captions", "ordinary", "main", False),
    Case("captions", "ordinary", "main", True),
    Case("no captions", "ordinary", "main", True),
    Case("no captions", "ordinary", "main", True, True),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Copies that are delivered unmarked, with and without guard."
    )
    parser.add_argument("--images", type=int, default=256, help="memorised prompts, and as many ordinary")
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder of the indexes, built if missing"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "guard.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*has captions for 0 of")
    options.work.mkdir(parents=True, exist_ok=True)
    data = training_set(64)
    indexes = {
        "captions": open_index(MODEL, options.work / f"{MODEL}.amg"),
        "no captions": without_captions(data, options.work / f"{MODEL}-no-captions.amg"),
    }
    prompts = {"memorised": memorised(data, options.images), "ordinary": ordinary(data, options.images)}
    rows = [measure(case, indexes[case.index], prompts[case.prompts], data) for case in CASES]
    write(options.csv, rows)
    return 0


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of the same columns as a CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def tables(path: Path) -> str:
    """The committed CSV as a Markdown table."""
    from tables import markdown

    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    shown = [name for name in lines[0] if name not in ("guard", "bank", "most evaluations")]
    heads = [f"of these {name}" if name.startswith(("copies by", "subject")) else name for name in shown]
    rows = []
    for line in lines:
        preset = line["preset"] + ("" if line["guard"] == "True" else ", no guard")
        preset += ", bank" if line["bank"] == "True" else ""
        rows.append([preset if name == "preset" else line[name] or "–" for name in shown])
    return markdown(heads, rows)


def without_captions(data: TrainingSet, path: Path) -> Any:
    """The distinct pictures of the training set, indexed without their captions."""
    if path.exists():
        return amg.Index.open(path, load_photos())
    return amg.Index.build(data.images, None, load_photos(), path, progress=False)


def memorised(data: TrainingSet, count: int) -> list[str]:
    """The sixteen captions of whole photographs, in turn."""
    captions = [data.captions[row] for row in range(len(data.ids)) if data.counts[row] > 1]
    return [captions[at % len(captions)] for at in range(count)]


def ordinary(data: TrainingSet, count: int) -> list[str]:
    """Captions in the manner of the crops' that no crop has."""
    known = {*data.captions}
    every = [f"a photo of {photo.subjects[0]}, {place}" for place in PLACES for photo in PHOTOS]
    unseen = [caption for caption in every if caption not in known]
    return [unseen[at % len(unseen)] for at in range(count)]


def bank(data: TrainingSet) -> list[str]:
    """Prompts in the manner of the crops' captions that no crop has and that are not asked for here."""
    refused = {*data.captions, *ordinary(data, len(PLACES) * len(PHOTOS))}
    every = [f"a snapshot of {photo.subjects[0]}, {place}" for photo in PHOTOS for place in EVERYWHERE]
    return [caption for caption in every if caption not in refused]


def measure(case: Case, index: Any, prompts: list[str], data: TrainingSet) -> dict[str, Any]:
    """Draw a case's pictures and count; prints a line."""
    changes: dict[str, Any] = {} if case.guard else {"guard_threshold": None}
    if case.bank:
        changes["ordinary_prompts"] = bank(data)
    row = {**vars(case), **counted(case.preset, changes, index, prompts, data)}
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def counted(
    preset: str, changes: dict[str, Any], index: Any, prompts: list[str], data: TrainingSet
) -> dict[str, Any]:
    """Draw pictures under a preset with changed options, and count."""
    config = amg.AMGConfig.preset(preset, guidance_scale=GUIDANCE_SCALES[MODEL], **changes)
    sampler = amg.Sampler(open_pipeline(MODEL), index, config)
    images, verdicts = [], []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(SEED + start + at) for at in range(len(some))]
        out = sampler(some, generator=generators, num_inference_steps=STEPS, output_type="pt", progress=False)
        images.append(out.images)
        verdicts += out.amg
    unmarked = torch.tensor([not verdict.memorized for verdict in verdicts])
    guards = torch.tensor([verdict.guard.similarity for verdict in verdicts if verdict.guard])
    return {
        "images": len(verdicts),
        "memorised by metric": sum(verdict.similarity > verdict.threshold for verdict in verdicts),
        "memorised by guard": sum(bool(verdict.guard and verdict.guard.memorized) for verdict in verdicts),
        "blocked": sum(verdict.blocked for verdict in verdicts),
        "delivered unmarked": int(unmarked.sum()),
        **copies(torch.cat(images), unmarked, data),
        "subject right": subjects(torch.cat(images), prompts, unmarked),
        "guard p99": f"{guards.quantile(0.99).item():.3f}" if len(guards) else "",
        "evaluations": f"{sum(verdict.evaluations for verdict in verdicts) / len(verdicts):.1f}",
        "most evaluations": max(verdict.evaluations for verdict in verdicts),
    }


def copies(images: Tensor, unmarked: Tensor, data: TrainingSet) -> dict[str, int]:
    """How many of the unmarked pictures each judge that guidance never saw calls copies."""
    network, patches = (
        judge.copy_probability(images) > JUDGE_COPY for judge in (load_judge(), load_judge_2())
    )
    luminance = luminance_correlation(images, data.images.float() / 255)[0] > LUMINANCE_COPY
    return {
        "copies by photos-judge": int((network & unmarked).sum()),
        "copies by photos-judge-2": int((patches & unmarked).sum()),
        "copies by luminance": int((luminance & unmarked).sum()),
    }


def subjects(images: Tensor, prompts: list[str], unmarked: Tensor) -> int:
    """In how many of the unmarked pictures photos-judge finds the subject asked for."""
    asked = torch.tensor([subject_of(prompt) for prompt in prompts])
    with torch.no_grad():
        found = load_judge()(images)[0].argmax(1)
    return int(((found == asked) & unmarked).sum())


if __name__ == "__main__":
    sys.exit(main())
