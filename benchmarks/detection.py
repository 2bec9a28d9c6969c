"""How well free signals tell copies from new pictures on `photos-sd`, single and combined, by steps seen.

    python benchmarks/detection.py            # benchmarks/results/detection.csv, docs/detection.{md,png}
    python benchmarks/detection.py --tables   # the page and the chart again, from the CSV alone

Records plain generations into a folder of `--work` (resumes batch by batch), scores them on held-out prompts
and writes one line per label, signal and number of steps seen.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from charts import fill
from evidence.recording import KINDS, MODEL, Generations, Job, jobs_of, record
from evidence.scores import (
    PAIR,
    REFERENCE,
    RESAMPLES,
    detectors,
    folds_of,
    gain,
    held_out,
    resamples,
    worth,
)
from protocol import RESULTS, ROOT, commit

from amg.commands.demo import GUIDANCE_SCALES, open_index, open_pipeline
from amg.replacing import replacing
from amg.zoo.photos import training_set

SEEN = (1, 2, 3, 5, 8, 10, 15, 20, 30)
COUNTS, STEPS, SEED = (256, 256, 128, 64), 30, 50_000
COPY = 0.5
BEGIN, END = "<!-- detection: begin -->", "<!-- detection: end -->"
PAGE, CSV = ROOT / "docs/detection.md", RESULTS / "detection.csv"
COLUMNS = (
    *("date", "commit", "torch", "model", "steps", "guidance_scale", "label", "signal", "seen"),
    *("auc", "auc_low", "auc_high", "tpr_at_1_fpr", "tpr_low", "tpr_high", "skipped_at_10_missed"),
    *("positives", "negatives", "prompts_with_positives", "prompts"),
)
NAMES = {
    "gap": "m_t = ‖ε_c − ε_u‖ (Wen)",
    "mean_gap": "running mean of m_t (Wen)",
    "first_minimum": "first local minimum of m_t (Jain)",
    "cosine": "cos(ε_u, ε_c − ε_u), whole sample",
    "pixel_cosine": "the same per pixel, averaged (Asthana)",
    "move": "‖x_{t−1} − x_t‖",
    "region": "s_t (Huang)",
    "region_max": "max s_t (Huang)",
    "gate": "best single signal of the step (our gate)",
    " + ".join(PAIR): "m_t and per-pixel cosine (Asthana)",
    "combined": "all eight, logistic regression",
    REFERENCE: "similarity of x0_hat (not free)",
}
GAIN, RECORDED = "combined - gate", "recorded"
LABELS = {
    "kind": "memorised against ordinary prompts",
    "copy": f"finished picture a copy (cosine > {COPY}), all prompts",
}
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, nargs=len(KINDS), default=COUNTS, metavar="N", help=f"of {', '.join(KINDS)}"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first image")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap resamples of the prompts")
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder of the index and the recordings"
    )
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--page", type=Path, default=PAGE, help="the chart goes beside it")
    parser.add_argument(
        "--tables", action="store_true", help="only fill the page and draw the chart from --out"
    )
    options = parser.parse_args()
    if not options.tables:
        recorded, jobs = recordings(options)
        write(options.out, lines_of(recorded, jobs, options.steps, options.resamples))
    fill(options.page, tables(options.out), BEGIN, END)
    draw(read(options.out), options.page.with_suffix(".png"))
    print(tables(options.out))


def recordings(options: argparse.Namespace) -> tuple[Generations, list[Job]]:
    options.work.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(training_set(64), options.images, options.seed)
    index = open_index(MODEL, options.work / f"{MODEL}.amg")
    folder = options.work / f"detection-{options.steps}-{options.seed}"
    return record(open_pipeline(MODEL), index, jobs, options.steps, folder), jobs


def lines_of(recorded: Generations, jobs: Sequence[Job], steps: int, count: int) -> Iterator[Line]:
    """One line per label, signal and number of steps seen, in the order of COLUMNS."""
    head = (datetime.datetime.now().astimezone().isoformat(timespec="seconds"), commit(), torch.__version__)
    head = (*head, MODEL, steps, GUIDANCE_SCALES[MODEL])
    copies = recorded.finished > COPY
    kinds = [job.kind for job in jobs]
    ordinary = torch.tensor([kind == "ordinary" for kind in kinds])
    for kind in KINDS:
        yield dict(zip(COLUMNS, (*head, RECORDED, kind, *tally(jobs, kind, copies)), strict=True))
    counted = {
        "kind": (torch.tensor([kind in ("memorised", "ordinary") for kind in kinds]), ~ordinary),
        "copy": (torch.ones_like(ordinary), copies),
    }
    for label, (chosen, positive) in counted.items():
        rows = chosen.nonzero().flatten().tolist()
        part = Generations(**{name: value[chosen] for name, value in vars(recorded).items()})
        mine = [jobs[row] for row in rows]
        scores = scored(part, mine, positive[chosen], (ordinary & ~copies)[chosen], count, steps)
        for values in scores:
            yield dict(zip(COLUMNS, (*head, label, *values), strict=True))


def scored(
    recorded: Generations, jobs: Sequence[Job], labels: Any, ordinary: Any, count: int, steps: int
) -> Iterator[tuple[Any, ...]]:
    """Signal, steps seen, its worth and the counts, for every detector."""
    prompts, kinds = [job.prompt for job in jobs], [job.kind for job in jobs]
    folds, drawn = folds_of(prompts, kinds), resamples(prompts, kinds, count, seed=0)
    positive_prompts = {prompt for prompt, hit in zip(prompts, labels.tolist(), strict=True) if hit}
    counts = (int(labels.sum()), int((~labels).sum()), len(positive_prompts), len(set(prompts)))
    for seen in (seen for seen in SEEN if seen <= steps):
        scores = {
            name: held_out(detector, labels, folds)
            for name, detector in detectors(recorded, ordinary, seen).items()
        }
        found = {name: worth(values, labels, drawn) for name, values in scores.items()}
        found[GAIN] = gain(scores["combined"], scores["gate"], labels, drawn)
        for name, one in found.items():
            areas, rates = (one.auc, *one.auc_interval), (one.tpr, *one.tpr_interval, one.skipped)
            yield name, seen, *(f"{value:.4f}" for value in (*areas, *rates)), *counts


def tally(jobs: Sequence[Job], kind: str, copies: Any) -> tuple[Any, ...]:
    """A kind's images that are copies and that are none, prompts with a copy, prompts; after empty cells."""
    mine = [(job.prompt, hit) for job, hit in zip(jobs, copies.tolist(), strict=True) if job.kind == kind]
    hits = [prompt for prompt, hit in mine if hit]
    numbers = (len(hits), len(mine) - len(hits), len(set(hits)), len({prompt for prompt, _ in mine}))
    return *[""] * 8, *numbers


def write(path: Path, lines: Iterator[Line]) -> None:
    """Write the table; a run replaces the last one."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow(line)
            print(line["label"], line["signal"], line["seen"], line["auc"], line["tpr_at_1_fpr"], flush=True)


def read(path: Path) -> list[Line]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables(path: Path) -> str:
    """The page's tables out of the CSV, Markdown: AUC, TPR and what a gate may skip, by label."""
    lines = read(path)
    first = lines[0]
    text = [
        f"{first['model']}, DDIM, {first['steps']} steps, guidance scale {first['guidance_scale']}, "
        f"torch {first['torch']}, commit {first['commit']}, recorded {first['date'][:10]}.",
        _recorded([line for line in lines if line["label"] == RECORDED]),
    ]
    for label, title in LABELS.items():
        mine = [line for line in lines if line["label"] == label]
        one = mine[0]
        text.append(
            f"### {title[0].upper()}{title[1:]}\n\n{one['positives']} positive images of "
            f"{one['prompts_with_positives']} prompts, {one['negatives']} negative; "
            f"{one['prompts']} prompts in all."
        )
        text.append("AUC, and its 95 % interval:\n\n" + _by_step(mine, "auc", ("auc_low", "auc_high")))
        rate = _by_step(mine, "tpr_at_1_fpr", ("tpr_low", "tpr_high"))
        text.append("True positives at 1 % false positives, and the 95 % interval:\n\n" + rate)
        skipped = _by_step(mine, "skipped_at_10_missed", None)
        text.append(
            "Share of negatives a check may skip when 10 % of the positives may be missed:\n\n" + skipped
        )
        text.append("What combining adds to the best single signal, held-out:\n\n" + _gain(mine))
    return "\n\n".join(text)


def _recorded(lines: Sequence[Line]) -> str:
    rows = ["| prompts | distinct | images | copies | prompts with a copy |", "|---|--:|--:|--:|--:|"]
    for line in lines:
        images = int(line["positives"]) + int(line["negatives"])
        numbers = (line["prompts"], images, line["positives"], line["prompts_with_positives"])
        rows.append(f"| {line['signal']} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(rows)


def _gain(lines: Sequence[Line]) -> str:
    mine = [line for line in lines if line["signal"] == GAIN]
    rows = [
        "| gain, steps seen: | " + " | ".join(line["seen"] for line in mine) + " |",
        "|---|" + "--:|" * len(mine),
    ]
    intervals = {"auc": ("auc_low", "auc_high"), "tpr_at_1_fpr": ("tpr_low", "tpr_high")}
    names = {"auc": "AUC", "tpr_at_1_fpr": "TPR at 1 % FPR", "skipped_at_10_missed": "share skipped"}
    for column, name in names.items():
        cells = [_cell(line, column, intervals.get(column), "+") for line in mine]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _by_step(lines: Sequence[Line], column: str, interval: tuple[str, str] | None) -> str:
    steps = sorted({int(line["seen"]) for line in lines})
    cells = {(line["signal"], int(line["seen"])): line for line in lines}
    rows = ["| signal, steps seen: | " + " | ".join(map(str, steps)) + " |", "|---|" + "--:|" * len(steps)]
    for name, title in NAMES.items():
        found = [_cell(cells[name, step], column, interval) for step in steps]
        rows.append(f"| {title} | " + " | ".join(found) + " |")
    return "\n".join(rows)


def _cell(line: Line, column: str, interval: tuple[str, str] | None, sign: str = "") -> str:
    value = f"{float(line[column]):{sign}.3f}"
    if interval is None:
        return value
    low, high = (f"{float(line[name]):{sign}.2f}" for name in interval)
    return f"{value}<br>{low} to {high}"


def draw(lines: Sequence[Line], path: Path) -> None:
    """AUC (left) and TPR at 1 % FPR (right) over the steps seen, a row of panels per label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.5), layout="constrained")
    axes = figure.subplots(len(LABELS), 2, sharex=True)
    for row, (label, title) in enumerate(LABELS.items()):
        for axis, column in zip(axes[row], ("auc", "tpr_at_1_fpr"), strict=True):
            for number, (name, words) in enumerate(NAMES.items()):
                mine = [line for line in lines if line["label"] == label and line["signal"] == name]
                place = [int(line["seen"]) for line in mine]
                axis.plot(place, [float(line[column]) for line in mine], label=words, **_style(name, number))
            axis.set(title=f"{title}: {'AUC' if column == 'auc' else 'TPR at 1 % FPR'}", xscale="log")
            axis.set_xticks(SEEN, [str(step) for step in SEEN], minor=False)
            axis.minorticks_off()
            axis.set_ylim(0.35 if column == "auc" else -0.02, 1.02)
            axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("steps seen")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)


def _style(name: str, number: int) -> dict[str, Any]:
    bold = {REFERENCE: "black", "combined": "#d1495b", "gate": "#2a6f97"}
    if name in bold:
        return {"color": bold[name], "linewidth": 2.6, "marker": "o", "markersize": 4}
    return {"color": f"C{number % 10}", "linewidth": 1.2, "linestyle": ("-", "--")[number % 2], "marker": "."}


if __name__ == "__main__":
    main()
