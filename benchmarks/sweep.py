"""Sweep guidance's options on a bundled model: what each term, the exact step and the rewind contribute.

    python benchmarks/sweep.py photos-ddpm --images 64      # benchmarks/results/sweep_photos-ddpm.csv

One line per configuration, the demo's protocol and columns, with `on_memorized="flag"` so that the figures
are those of guidance and rewinds alone. Resumes: configurations already in the CSV are skipped. `--sheet DIR`
keeps the pictures.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from amg.commands.demo import (
    COLUMN_NAMES,
    caption_jobs,
    class_jobs,
    copies_said,
    draw,
    further_judges,
    measure,
    open_index,
    open_pipeline,
)
from amg.config import AMGConfig
from amg.zoo.judge import load_judge
from amg.zoo.photos import training_set

RESULTS = Path(__file__).parent / "results"
NO_TERMS = {"c1": 0.0, "c2": 0.0, "c3": 0.0}
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "photos-ddpm": [
        ("off", {}),
        ("main", {"rewind_at": ()}),
        ("main", {**NO_TERMS}),
        ("main", {}),
        ("strong", {}),
        ("main", {"terms_from": 0.0}),
        ("main", {"rewind_guidance": 2.5}),
        ("main", {"check_at": ()}),
        ("main", {"rewind_at": (0.56,)}),
        *[("main", {"step_length": "constant", "c3": c3, "rewind_at": ()}) for c3 in (3.0, 30.0)],
    ],
    "photos-sd": [
        ("off", {}),
        ("released", {}),
        ("main", {"rewind_at": ()}),
        ("main", {**NO_TERMS}),
        ("main", {}),
        ("strong", {}),
        ("main", {"check_at": ()}),
        ("main", {"rewind_caption": "prompt"}),
        ("main", {"rewind_caption": "prompt", "rewind_guidance": 0.0}),
        ("main", {"c3": 0.0}),
        ("main", {"c1": 0.0, "c2": 0.0}),
        ("main", {"c1": 0.0, "c2": 0.0, "rewind_at": ()}),
        ("main", {"c3": 0.0, "rewind_at": ()}),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=tuple(CASES))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1000, help="first seed; the demo's own seeds start at 0")
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the index")
    parser.add_argument("--sheet", type=Path, help="folder for one contact sheet per configuration")
    parser.add_argument("--case", action="append", help="PRESET:JSON, instead of the built-in list")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    name, path = arguments.model, arguments.out or RESULTS / f"sweep_{arguments.model}.csv"
    pipe, index, judge = open_pipeline(name), open_index(name, arguments.work / f"{name}.amg"), load_judge()
    data = training_set(32 if name == "photos-ddpm" else 64)
    jobs = (class_jobs if name == "photos-ddpm" else caption_jobs)(arguments.images, arguments.seed, data)
    references = data.images.float() / 255
    cases = [_parse(text) for text in arguments.case] if arguments.case else CASES[name]
    for preset, overrides in cases:
        title = f"{preset} {json.dumps(overrides)}"
        if (title, str(arguments.images)) in _done(path):
            continue
        config = AMGConfig.preset(preset, **{**overrides, "on_memorized": "flag"})
        judges = further_judges(name, preset, arguments.work)
        column = draw(pipe, index, config, jobs, arguments.steps, title, judges)
        said = copies_said(column.images, references, judge)
        row = measure(title, column, jobs, judge, references, said)
        _append(path, row, arguments)
        print(" ".join(value if isinstance(value, str) else f"{value:.3g}" for value in row), flush=True)
        if arguments.sheet:
            _sheet(column.images, arguments.sheet / f"{title.replace('/', '_')}.png")


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    preset, _, overrides = text.partition(":")
    values = json.loads(overrides or "{}")
    return preset, {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _done(path: Path) -> set[tuple[str, str]]:
    if not path.exists():
        return set()
    with path.open(newline="") as lines:
        return {(row["guidance"], row["images"]) for row in csv.DictReader(lines)}


def _append(path: Path, row: list[str | float], arguments: argparse.Namespace) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    with path.open("a", newline="") as lines:
        writer = csv.writer(lines)
        if fresh:
            writer.writerow([*COLUMN_NAMES, "images", "steps", "first seed", "torch", "machine", "commit"])
        values = [value if isinstance(value, str) else round(value, 4) for value in row]
        writer.writerow(
            [
                *values,
                arguments.images,
                arguments.steps,
                arguments.seed,
                torch.__version__,
                platform.machine(),
                commit,
            ]
        )


def _sheet(images: torch.Tensor, path: Path, columns: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (columns * 66, -(-len(array) // columns) * 66))
    for number, image in enumerate(array):
        sheet.paste(
            Image.fromarray(image).resize((64, 64), Image.Resampling.NEAREST),
            (number % columns * 66, number // columns * 66),
        )
    sheet.save(path)


if __name__ == "__main__":
    main()
