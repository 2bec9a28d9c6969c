"""The CIFAR-10 tables of Chen et al. (CVPR 2024, Tables 2, 3 and 5), in small.

    python benchmarks/cifar/bench_cifar.py --data train.parquet --resnet resnet20_cifar10.safetensors
    python benchmarks/cifar/bench_cifar.py --tables          # docs/cifar.md again from the CSV

One CSV line per row, written when the row is done; rows already there are skipped, so it resumes.
`--validation` draws what constants were chosen on, `--trajectories` what checks were placed by: other seeds,
other CSVs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import Subset, training_subset
from judging import Judges, figures, open_judges, real_verdicts
from report import rewrite
from rows import (
    SCALE,
    STEPS,
    Drawn,
    Row,
    ablation_rows,
    choice_rows,
    draw,
    grid_rows,
    main_rows,
    open_index,
    open_pipeline,
    open_second,
)
from sheet import write_sheet
from torch import Tensor
from trajectories import record_trajectories

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results"
HEAD = (
    *("date", "commit", "torch", "machine", "threads", "table", "condition", "guidance", "config"),
    *("images", "steps", "first seed", "guidance scale"),
)
MEASURED = (
    *("Top5% nL2", "Top1 nL2"),
    *(
        f"{share}{end}"
        for share in ("< 1.4 %", "< 1.6 %", "luminance judge %", "ResNet-20 judge %")
        for end in ("", " low", " high")
    ),
    *("FID", "class accuracy %", "before the final check %", "blocked"),
    *("rewinds/image", "retries/image", "evaluations/image", "s/image"),
)
KEY = ("table", "condition", "guidance", "config", "images", "steps", "first seed", "guidance scale")
VALIDATION_SEED = 100_000
SHOWN = 20  # pictures in a line of the sheet
LEFT_OUT = "off, its copies left out"
REAL = "real, not trained on"


@dataclass(frozen=True)
class Bench:
    """Everything a row is drawn with and judged by."""

    pipe: Any
    index: Any
    subset: Subset
    judges: Judges
    second: Any = None  # the second index


def open_bench(arguments: argparse.Namespace) -> Bench:
    """Read data, model and network, and build the index on first use."""
    subset = training_subset(arguments.data)
    index = open_index(subset, arguments.work / "cifar.amg")
    judges = open_judges(subset, arguments.data, arguments.resnet)
    print(f"ResNet-20 judge: a copy has a cosine > {judges.copies.threshold:.3f}", flush=True)
    second = open_second(subset, arguments.work / "cifar-embeddings.amg")
    return Bench(open_pipeline(arguments.model), index, subset, judges, second)


def run(bench: Bench, rows: Sequence[Row], images: int, arguments: argparse.Namespace) -> None:
    """Draw, judge and record the rows that the CSV does not have yet."""
    for row in rows:
        scale = arguments.scale if row.condition == "class" else 1.0
        key = key_of(row, images, arguments, scale)
        if key in done(arguments.out):
            continue
        seeds = range(arguments.seed, arguments.seed + images)
        drawn = draw(bench.pipe, bench.index, row, seeds, arguments.steps, scale, bench.second)
        record(arguments.out, key, drawn, bench.judges)
        if row.table == "main" and row.name == "off":
            new = without_copies(drawn)
            record(
                arguments.out,
                {**key, "guidance": LEFT_OUT, "images": str(len(new.images))},
                new,
                bench.judges,
            )
            real = real_pictures(bench, images, row.condition)
            record(arguments.out, {**key, "guidance": REAL, "config": "{}", "steps": "0"}, real, bench.judges)


def key_of(row: Row, images: int, arguments: argparse.Namespace, scale: float) -> dict[str, str]:
    """What makes a CSV line the line of this row."""
    values = (row.table, row.condition, row.name, row.config, images, arguments.steps, arguments.seed, scale)
    return {name: str(value) for name, value in zip(KEY, values, strict=True)}


def without_copies(drawn: Drawn) -> Drawn:
    """What is left of unguided pictures when those below nL2 1.4 are thrown away: the quality that guidance
    has to keep, free of the realism that copies lend."""
    keep = torch.tensor([verdict.similarity <= -1.4 for verdict in drawn.verdicts])
    verdicts = [verdict for verdict, kept in zip(drawn.verdicts, keep.tolist(), strict=True) if kept]
    labels = None if drawn.labels is None else drawn.labels[keep]
    return Drawn(drawn.images[keep], verdicts, labels, drawn.seconds * len(verdicts) / len(drawn.verdicts))


def real_pictures(bench: Bench, images: int, condition: str) -> Drawn:
    """Pictures of the same split that the model was not trained on, judged like generated ones."""
    pictures, labels = bench.judges.held_out[:images], bench.judges.held_out_labels[:images]
    verdicts = real_verdicts(pictures, bench.index)
    return Drawn(pictures, verdicts, labels if condition == "class" else None, 0.0)


def record(path: Path, key: dict[str, str], drawn: Drawn, judges: Judges) -> None:
    """Judge one row's pictures, append its line and print it."""
    found = figures(drawn.images, drawn.verdicts, drawn.labels, judges)
    found["s/image"] = drawn.seconds / len(drawn.verdicts)
    append(path, key, found)
    shown = {name: round(value, 2) for name, value in found.items() if not name.endswith((" low", " high"))}
    print(f"{key['condition']}, {key['guidance']}: {shown}", flush=True)


def done(path: Path) -> list[dict[str, str]]:
    """The keys of the rows a CSV already has."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: line[name] for name in KEY} for line in csv.DictReader(file)]


def append(path: Path, key: dict[str, str], found: dict[str, float]) -> None:
    """Add one line to the CSV, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    line = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "torch": torch.__version__,
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "threads": torch.get_num_threads(),
        **key,
        **{name: f"{found[name]:.5g}" for name in MEASURED},
    }
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, (*HEAD, *MEASURED), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    arguments = _arguments()
    if arguments.tables:
        rewrite(ROOT / "docs" / "cifar.md", RESULTS / "cifar.csv", RESULTS / "cifar_validation.csv")
        return
    torch.set_grad_enabled(False)
    bench = open_bench(arguments)
    few = arguments.few or max(arguments.images // 2, 2)
    if arguments.trajectories:
        seeds = range(VALIDATION_SEED, VALIDATION_SEED + arguments.images)
        record_trajectories(
            RESULTS / "cifar_trajectories.csv", bench.pipe, bench.index, seeds, arguments.steps
        )
        return
    if arguments.validation:
        for condition in arguments.conditions:
            run(bench, named(grid_rows(condition), arguments.only), max(few // 2, 2), arguments)
            run(bench, named(choice_rows(condition), arguments.only), few, arguments)
        return
    for condition in arguments.conditions:
        run(bench, named(main_rows(condition), arguments.only), arguments.images, arguments)
    if arguments.sheet:
        write_sheet(arguments.sheet, [pictures(bench, name, arguments) for name in arguments.conditions])
    if not arguments.no_ablations:
        for condition in arguments.conditions:
            run(bench, named(ablation_rows(condition), arguments.only), few, arguments)


def pictures(bench: Bench, condition: str, arguments: argparse.Namespace) -> list[Tensor]:
    """The first pictures of each main row that the sheet shows, after the unguided ones their nearest."""
    rows = {row.name: row for row in main_rows(condition)}
    seeds, lines = range(arguments.seed, arguments.seed + SHOWN), []
    for name in ("off", "main", "strong", "main, paper's terms"):
        scale = arguments.scale if condition == "class" else 1.0
        drawn = draw(bench.pipe, bench.index, rows[name], seeds, arguments.steps, scale)
        lines.append(drawn.images)
        if name == "off":
            lines.append(bench.subset.distinct[[verdict.neighbour.row for verdict in drawn.verdicts]])
    return lines


def named(rows: Sequence[Row], start: str | None) -> list[Row]:
    """The rows whose name begins with `start`; all where it is None."""
    return [row for row in rows if row.name.startswith(start or "")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10's training split as Parquet")
    parser.add_argument("--resnet", type=Path, help="ResNet-20's weights as safetensors")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder written by train.py")
    parser.add_argument("--images", type=int, default=256, help="pictures of a row of the main tables")
    parser.add_argument("--few", type=int, help="pictures of a row of the others (half as many)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, help="first seed (0; with --validation 100000)")
    parser.add_argument("--scale", type=float, default=SCALE, help="guidance scale of class-conditional rows")
    parser.add_argument("--conditions", nargs="+", default=["unconditional", "class"])
    parser.add_argument("--only", help="only rows whose name begins so")
    parser.add_argument("--no-ablations", action="store_true", help="only the main tables")
    parser.add_argument("--validation", action="store_true", help="the rows constants were chosen on")
    parser.add_argument("--trajectories", action="store_true", help="nL2 of x0_hat by step, unguided")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cifar", help="folder of the indexes")
    parser.add_argument("--out", type=Path, help="the CSV")
    parser.add_argument("--sheet", type=Path, help="write the first pictures as one PNG")
    parser.add_argument("--tables", action="store_true", help="rewrite docs/cifar.md and stop")
    arguments = parser.parse_args()
    if not arguments.tables and not (arguments.data and arguments.resnet):
        parser.error("--data and --resnet are needed, unless --tables")
    name = "cifar_validation.csv" if arguments.validation else "cifar.csv"
    arguments.out = arguments.out or RESULTS / name
    if arguments.seed is None:
        arguments.seed = VALIDATION_SEED if arguments.validation else 0
    return arguments


if __name__ == "__main__":
    main()
