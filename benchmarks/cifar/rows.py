"""The rows of the CIFAR-10 tables: how each is guided, and how it is drawn."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from data import CLASSES, Subset
from torch import Tensor

import amg
from amg.verdict import Verdict

BATCH = 32
SCALE = 1.0  # of the class-conditional rows: no classifier-free guidance
STEPS = 50
C3_GRID = (30.0, 100.0, 300.0, 1000.0)
C3 = 100.0  # of the paper's form, chosen from the grid on other seeds
# Where this model's elbow lies (benchmarks/results/cifar_trajectories.csv), later than the presets' model's:
# checkpoints from step 32 of 50 on, and a threshold that ordinary pictures at that step seldom reach.
CHECKPOINTS = (0.65, 0.8, 1.0)
LATE: dict[str, Any] = {"check_at": CHECKPOINTS, "rewind_at": CHECKPOINTS, "terms_from": 0.66}
OURS: dict[str, dict[str, Any]] = {
    "off": {},
    "main": {**LATE, "rewind_threshold": -1.45, "lambda_min": -1.5, "lambda_max": -1.45},
    "strong": {**LATE, "rewind_threshold": -1.5, "lambda_min": -1.7, "lambda_max": -1.65},
}
# The paper's constant c3 from early on, with our rewinds: the better FID and the worse pictures.
EARLY: dict[str, Any] = {
    "check_at": (),
    "terms_from": 0.0,
    "step_length": "constant",
    "c3": C3,
    "rewind_at": CHECKPOINTS,
}
EARLY_TERMS: dict[str, dict[str, Any]] = {
    "main": {**EARLY, "rewind_threshold": -1.45},
    # with the preset's lambda_min of -1.8 gates open at step 0, where the constant c3 is divided by
    # sqrt(alpha_bar) = 0.008 and the sample overflows
    "strong": {
        **EARLY,
        "terms_from": 0.2,
        "rewind_threshold": -1.5,
        "lambda_min": -1.65,
        "lambda_max": -1.65,
    },
}
NO_REWINDS: dict[str, Any] = {"rewind_at": (), "on_memorized": "flag"}
FLAGGED: dict[str, Any] = {"on_memorized": "flag"}


@dataclass(frozen=True)
class Row:
    """One row: the table it belongs to, "unconditional" or "class", its name, preset and overrides."""

    table: str
    condition: str
    name: str
    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    second: bool = False  # held to a second index too, of photos-embedder

    @property
    def config(self) -> str:
        """Preset and overrides as JSON, the same text for the same config."""
        also = {"also": "photos-embedder"} if self.second else {}
        return json.dumps({"preset": self.preset, **self.overrides, **also}, sort_keys=True)


def paper_form(c3: float = C3, **overrides: Any) -> dict[str, Any]:
    """Overrides of a preset that leave what the paper has: a check at every step, terms from the first, a
    constant c3, nothing sent back and nothing run again."""
    return {
        "step_length": "constant",
        "c3": c3,
        "check_at": (),
        "terms_from": 0.0,
        **NO_REWINDS,
        **overrides,
    }


def every(steps: int, total: int = STEPS) -> tuple[float, ...]:
    """`check_at` of every `steps`-th step and of the last."""
    places = sorted({*range(0, total, steps), total - 1})
    return tuple(round(place / (total - 1), 4) for place in places)


def main_rows(condition: str) -> list[Row]:
    """The paper's Tables 2 and 3; then main held to a second index, the presets with the paper's terms, and
    main as its preset has it."""
    return [
        *[Row("main", condition, name, name, more) for name, more in OURS.items()],
        Row("main", condition, "main, a second index", "main", OURS["main"], second=True),
        *[Row("main", condition, f"{name}, paper's terms", name, more) for name, more in EARLY_TERMS.items()],
        Row("main", condition, "main, the preset as it is", "main"),
    ]


def ablation_rows(condition: str) -> list[Row]:
    """The paper's Table 5 in its form, with our rewinds, and ours."""
    paper: dict[str, dict[str, Any]] = {
        "paper's form": {},
        # from the first step on it overflows, see EARLY_TERMS
        "paper's form, ungated from step 10": {"gated": False, "terms_from": 0.2},
        "paper's form, constant lambda": {"threshold_schedule": "constant"},
        "paper's form, full gradient": {"gradient": "full"},
        "paper's form, check every 5th step": {"check_at": every(5)},
        "paper's form, check every 10th step": {"check_at": every(10)},
    }
    early, main = {**EARLY_TERMS["main"], **FLAGGED}, {**OURS["main"], **FLAGGED}
    others: dict[str, dict[str, Any]] = {
        "paper's terms and rewinds": early,
        "paper's terms and rewinds, check every 5th step": {**early, "check_at": every(5)},
        "paper's terms and rewinds, checkpoints only": {**early, "check_at": CHECKPOINTS},
        "paper's terms and rewinds, full gradient": {**early, "gradient": "full"},
        "rewinds only": {**early, "c3": 0.0},
        "ours": main,
        "ours, no rewinds": {**main, **NO_REWINDS},
        "ours, full gradient": {**main, "gradient": "full"},
        "ours, check every step": {**main, "check_at": ()},
    }
    return [
        Row("ablation", condition, "off", "off"),
        *[Row("ablation", condition, name, "main", paper_form(**more)) for name, more in paper.items()],
        *[Row("ablation", condition, name, "main", more) for name, more in others.items()],
    ]


def grid_rows(condition: str) -> list[Row]:
    """The grid that c3 of the paper's form was chosen from; drawn from other seeds than the tables."""
    return [
        Row("c3", condition, "off", "off"),
        *[Row("c3", condition, f"c3 = {c3:g}", "main", paper_form(c3)) for c3 in C3_GRID],
    ]


def choice_rows(condition: str) -> list[Row]:
    """What the presets' fields for this model were chosen from, on the same other seeds."""
    return [
        Row("choice", condition, "off", "off"),
        Row("choice", condition, "main, ours", "main", OURS["main"]),
        Row("choice", condition, "main, paper's terms", "main", EARLY_TERMS["main"]),
        Row("choice", condition, "strong, paper's terms", "strong", EARLY_TERMS["strong"]),
    ]


@dataclass(frozen=True)
class Drawn:
    """Pictures float32 [N, 3, 32, 32] in [0, 1], their verdicts, the labels asked for, and seconds of
    processor time."""

    images: Tensor
    verdicts: list[Verdict]
    labels: Tensor | None
    seconds: float


def open_pipeline(folder: Path) -> Any:
    """The trained DDPM with a DDIM scheduler (its `clip_sample`: x0_hat clipped to [-1, 1], the noise
    prediction kept). The U-Net runs under bf16 autocast as in training, float32 in and out."""
    from diffusers import DDIMScheduler, DDPMPipeline

    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"`--model` must be a folder written by train.py, got {folder}")
    pipe = DDPMPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    plain = pipe.unet.forward

    def forward(*arguments: Any, **more: Any) -> tuple[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (plain(*arguments, **more)[0].float(),)

    pipe.unet.forward = forward
    return pipe


def open_index(subset: Subset, path: Path) -> amg.Index:
    """The nL2 index of the training images, repetitions folded into counts; built on first use."""
    if path.exists():
        return amg.Index.open(path)
    places = torch.repeat_interleave(torch.arange(len(subset.counts)), subset.counts)
    first = torch.cat([torch.zeros(1, dtype=torch.bool), places[1:] == places[:-1]])
    ids = [
        f"{subset.rows[place]}#{copy}" if again else f"{subset.rows[place]}"
        for copy, (place, again) in enumerate(zip(places.tolist(), first.tolist(), strict=True))
    ]
    return amg.Index.build(subset.images[places], None, None, path, ids=ids)


def open_second(subset: Subset, path: Path) -> amg.Index:
    """A cosine index of the distinct training images under photos-embedder, which was trained on other
    pictures; built on first use."""
    from amg.embed.photos import load_photos

    if path.exists():
        return amg.Index.open(path, load_photos())
    return amg.Index.build(subset.images, None, load_photos(), path)


def draw(
    pipe: Any,
    index: Any,
    row: Row,
    seeds: Sequence[int],
    steps: int,
    scale: float = SCALE,
    second: Any = None,
) -> Drawn:
    """Draw one picture per seed under a row's config; classes take turns. An image depends on its seed and
    class alone, not on its batch."""
    from tqdm import tqdm

    also = (second,) if row.second else ()
    sampler = amg.Sampler(pipe, index, amg.AMGConfig.preset(row.preset, **row.overrides), also)
    labels = torch.arange(len(seeds)) % len(CLASSES) if row.condition == "class" else None
    images, verdicts = [], []
    began = time.process_time()
    title = f"{row.table}: {row.condition}, {row.name}"
    for start in tqdm(range(0, len(seeds), BATCH), desc=title, unit="batch"):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        asked = (
            {"batch_size": len(generators)}
            if labels is None
            else {"class_labels": labels[part], "guidance_scale": scale}
        )
        out = sampler(
            **asked, generator=generators, num_inference_steps=steps, output_type="pt", progress=False
        )
        images.append(out.images)
        verdicts += out.amg
    return Drawn(torch.cat(images), verdicts, labels, time.process_time() - began)
