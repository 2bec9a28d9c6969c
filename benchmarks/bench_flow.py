"""Memorisation of a flow-matching transformer, photos-flow, at every level of protection.

python benchmarks/bench_flow.py                  # 48 memorised, 24 ordinary; benchmarks/results/flow.csv

Each level draws the same seeds: the plain pipeline; `protect` at "final", at "step" (as if its family were
not known) and at "full"; and `Sampler`. *Copies* are counted among what is delivered unmarked, by judges that
guidance never saw. Detectors (flow_detection.csv): of plain trajectories of both kinds of prompts, the area
under the ROC curve for "the finished picture is a copy" (photos-judge), a step at a time.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_guard import copies, memorised, ordinary, subjects, write
from bench_pipelines import counting
from PIL import Image
from protocol import RESULTS
from torch import Tensor

import amg
from amg import zoo
from amg.commands.demo import JUDGE_COPY, open_index
from amg.evaluate.detection import auc
from amg.pipelines.pictures import to_pil
from amg.zoo.judge import load_judge
from amg.zoo.photos import training_set

STEPS, SEED, BATCH, SCALE = 20, 6000, 16, 3.0
LEVELS = ("plain", "final", "step", "full", "Sampler")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=48, help="memorised prompts, and half as many ordinary")
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the index")
    parser.add_argument("--csv", type=Path, default=RESULTS / "flow.csv")
    parser.add_argument("--sheet", type=Path, help="a PNG of the first sixteen of each level")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    data, index = training_set(64), open_index("photos-sd", options.work / "photos-sd.amg")
    asked = {"memorised": memorised(data, options.images), "ordinary": ordinary(data, options.images // 2)}
    rows, sheet = [], []
    for kind, prompts in asked.items():
        for level in LEVELS:
            images, verdicts, cost = drawn(level, index, prompts)
            rows.append(row_of(level, kind, images, verdicts, cost, prompts, data))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            sheet.append(images[:16])
    write(options.csv, rows)
    write(
        options.csv.with_name("flow_detection.csv"),
        detectors(index, [*asked["memorised"][:64], *asked["ordinary"]]),
    )
    if options.sheet is not None:
        save(sheet, options.sheet)
    return 0


def open_pipeline() -> Any:
    pipe = zoo.load("photos-flow")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(level: str, index: Any, prompts: list[str]) -> tuple[Tensor, list[Any], float]:
    """Pictures [N, 3, 64, 64], verdicts, and rows of the network an image."""
    pipe, rows = open_pipeline(), []
    pipe.transformer.forward = counting(pipe.transformer.forward, rows)
    take = taker(level, pipe, index)
    images, verdicts = [], []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(SEED + start + at) for at in range(len(some))]
        given = {"num_inference_steps": STEPS, "max_sequence_length": 1, "guidance_scale": SCALE}
        out = take(some, generator=generators, output_type="pt", **given)
        images.append(out.images)
        verdicts += out.amg if level != "plain" else amg.check(out.images.clamp(0, 1), index)
    return torch.cat(images), verdicts, sum(rows) / len(prompts)


def taker(level: str, pipe: Any, index: Any) -> Any:
    """The pipeline at a level of protection."""
    if level == "plain":
        return pipe
    config = amg.AMGConfig.preset("main", guidance_scale=SCALE)
    if level == "Sampler":
        sampler = amg.Sampler(pipe, index, config)
        return lambda prompts, **given: sampler(prompts, progress=False, **given)
    amg.protect(pipe, index, config)
    held = pipe._amg_protection
    if level != "full":  # lower levels than it has, for comparison
        watched = None if level == "final" else dataclasses.replace(held.watched, family=None)
        pipe._amg_protection = dataclasses.replace(held, level=level, watched=watched)
    return pipe


def row_of(
    level: str, kind: str, images: Tensor, verdicts: list[Any], cost: float, prompts: list[str], data: Any
) -> dict[str, Any]:
    unmarked = torch.tensor([not verdict.memorized for verdict in verdicts])
    unmarked = torch.ones_like(unmarked) if level == "plain" else unmarked
    return {
        "prompts": kind,
        "level": level,
        "images": len(verdicts),
        "by the metric": sum(
            verdict.similarity > verdict.threshold for verdict in verdicts if not verdict.blocked
        ),
        "by the guard": sum(verdict.guard.memorized for verdict in verdicts if not verdict.blocked),
        "blocked": sum(verdict.blocked for verdict in verdicts),
        "delivered unmarked": int(unmarked.sum()),
        **copies(images, unmarked, data),
        "subject right": subjects(images, prompts, unmarked),
        "sent back": sum(bool(verdict.rewinds) for verdict in verdicts),
        "drawn again": sum(bool(verdict.retries) for verdict in verdicts),
        "network rows an image": f"{cost:.1f}",
    }


def detectors(index: Any, prompts: list[str]) -> list[dict[str, Any]]:
    """AUC by step of x0_hat's similarity, the guidance gap m_t and how far x_t moved."""
    pipe = open_pipeline()
    watching = amg.AMGConfig.preset(
        "main",
        guidance_scale=SCALE,
        on_memorized="flag",
        check_at=(),
        rewind_at=(),
        lambda_min=1.0,
        lambda_max=1.0,
    )
    amg.protect(pipe, index, watching)
    images, traces, moves = [], [], []
    for start in range(0, len(prompts), BATCH):
        some, kept = prompts[start : start + BATCH], []
        generators = [torch.Generator().manual_seed(SEED + 1000 + start + at) for at in range(len(some))]
        out = pipe(
            some,
            generator=generators,
            num_inference_steps=STEPS,
            max_sequence_length=1,
            guidance_scale=SCALE,
            output_type="pt",
            callback_on_step_end=lambda pipe, at, t, held, kept=kept: kept.append(held["latents"]) or held,
        )
        images.append(out.images)
        traces += [verdict.trace for verdict in out.amg]
        moves.append(torch.stack([(b - a).flatten(1).norm(dim=1) for a, b in itertools.pairwise(kept)]))
    labels = load_judge().copy_probability(torch.cat(images)) > JUDGE_COPY
    moved = torch.cat(moves, 1)
    rows = []
    for step in range(STEPS):
        similarity = torch.tensor([trace[step].similarity for trace in traces])
        gap = torch.tensor([trace[step].signals[0] for trace in traces]).sqrt()
        found = {
            "step": step,
            "copies": int(labels.sum()),
            "of": len(labels),
            "x0_hat": auc(similarity, labels),
        }
        found["m_t"] = auc(gap, labels)
        found["move"] = auc(-moved[step - 1], labels) if step else math.nan
        rows.append({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in found.items()})
    return rows


def tables(path: Path) -> str:
    """A committed CSV as a Markdown table."""
    from tables import markdown

    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if "step" in lines[0]:
        lines = [line for line in lines if int(line["step"]) % 3 == 0 or line is lines[-1]]
    return markdown(list(lines[0]), [list(line.values()) for line in lines])


def save(rows: list[Tensor], path: Path) -> None:
    """A row of pictures a level."""
    side = rows[0].shape[-1]
    page = Image.new("RGB", (side * 16, side * len(rows)))
    for down, images in enumerate(rows):
        for right, picture in enumerate(to_pil(images)):
            page.paste(picture, (side * right, side * down))
    page.save(path)


if __name__ == "__main__":
    sys.exit(main())
