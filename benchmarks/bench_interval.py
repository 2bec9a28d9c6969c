"""What `AMGConfig.guidance_interval` does to pictures, cost and the promise on photos-sd, CPU.

    python benchmarks/bench_interval.py --cache CACHE    # writes results/interval.csv and docs/interval.png
    python benchmarks/bench_interval.py --cache CACHE --ordinary 16 --memorised 8 --csv A.csv --sheet A.png

Each interval under `off` and under `main` with the bundled student and no calibration: 30 DDIM steps,
guidance scale 7.5, the same prompts and noise for all. CACHE holds what bench_engine.py makes once: the
index and the choice of ordinary prompts. Intervals of uncertainty resample prompts, since pictures of one
prompt are alike.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine.report import markdown
from evidence.scores import resamples
from protocol import RESULTS, ROOT, commit, processor
from torch import Tensor

from amg.evaluate import share_interval
from amg.evaluate.fid import features_of, fid_of_features

INTERVALS = ((0.0, 1.0), (0.0, 0.7), (0.0, 0.5), (0.1, 0.7), (0.3, 1.0))
WHOLE, PRESETS, KINDS = INTERVALS[0], ("off", "main"), ("ordinary", "memorised")
SEEDS = {"ordinary": 120_000, "memorised": 130_000}  # of the first image; no other benchmark's
DRAWS, FID_DRAWS, LEVEL, COPY = 4000, 400, 0.95, 0.5
SHOWN = {"ordinary": 5, "memorised": 3}  # columns of the sheet
EVALUATIONS, FID, ALIGNMENT, SUBJECT = "U-Net evaluations an image", "FID", "alignment", "subject %"
OVER, COPIES, BLOCKED = "over the promise %", "copies by photos-judge %", "blocked %"
COLUMNS = (
    *("date", "commit", "device", "torch", "diffusers", "threads", "steps", "guidance_scale"),
    *("preset", "from", "to", "prompts", "images", "distinct", "metric", "value", "low", "high"),
    *("difference", "difference_low", "difference_high"),
)
Interval = tuple[float, float]
Ends = tuple[float, float]
Base = tuple[np.ndarray, np.ndarray] | None
Line = dict[str, str]


@dataclass(frozen=True)
class Asked:
    """Prompts of one kind, their seeds, and for ordinary ones the subjects asked for, int64 [N]."""

    prompts: list[str]
    seeds: list[int]
    labels: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """Pictures [N, 3, H, W] in [0, 1] as delivered (a blocked one is blank), their verdicts, and for each the
    evaluations of the U-Net, float64 [N]."""

    images: Tensor
    verdicts: list[Any]
    evaluations: np.ndarray


@dataclass(frozen=True)
class Scores:
    """What one arm's pictures of one kind are worth, float64 [N] by metric; delivered: bool [N], that a share
    is of; features: float64 [N, D] where FID is asked for."""

    values: dict[str, np.ndarray]
    delivered: np.ndarray
    features: Tensor | None = None


@dataclass(frozen=True)
class Figure:
    """One number, its 95 % interval, and the paired difference to the whole interval with its own."""

    metric: str
    value: float
    ends: Ends | None = None
    difference: float | None = None
    difference_ends: Ends | None = None


def expected_evaluations(interval: Interval, steps: int) -> int:
    """Evaluations of one image that nothing sends back: one a step, and another where guidance acts."""
    last = steps - 1
    return steps + sum(interval[0] * last <= step <= interval[1] * last for step in range(steps))


def spread(values: np.ndarray) -> Ends:
    """The percentile interval of resampled statistics [R]."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def weighted_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of `values` [N] in every resample, [R]; counts [R, N]: how often each image is in it."""
    return counts @ values / counts.sum(1)


def mean_figure(
    metric: str, own: np.ndarray, base: np.ndarray | None, counts: np.ndarray, scale: float = 1.0
) -> Figure:
    """The mean of `own` [N], and where `base` is given that of `own - base`, image by image."""
    own = scale * own
    figure = Figure(metric, float(own.mean()), spread(weighted_means(own, counts)))
    if base is None:
        return figure
    apart = own - scale * base
    ends = spread(weighted_means(apart, counts))
    return Figure(metric, figure.value, figure.ends, float(apart.mean()), ends)


def share_figure(
    metric: str, hits: np.ndarray, among: np.ndarray, prompts: Sequence[str], base: Base = None
) -> Figure | None:
    """The share in per cent of `hits` [N] among the images `among`; None where there are none. Where no image
    or every one is hit the bound is the exact binomial over prompts. The difference to `base`, the other
    arm's hits and images, is of the images that are among both."""
    if not among.any():
        return None
    own, texts = hits[among].astype(float), np.array(prompts)[among].tolist()
    if 0 < own.mean() < 1:
        ends = spread(100 * weighted_means(own, drawn_by_prompt(texts)))
    else:
        every = torch.full((len(set(texts)),), own[0], dtype=torch.float64)
        low, high = share_interval(every, seed=0, level=LEVEL)
        ends = 100 * low, 100 * high
    figure = Figure(metric, 100 * float(own.mean()), ends)
    if base is None or not (both := among & base[1]).any():
        return figure
    apart = 100 * (hits.astype(float) - base[0])[both]
    means = weighted_means(apart, drawn_by_prompt(np.array(prompts)[both].tolist()))
    return Figure(metric, figure.value, ends, float(apart.mean()), spread(means))


def drawn_by_prompt(prompts: Sequence[str], draws: int = DRAWS) -> np.ndarray:
    """int [draws, N]: prompts drawn with replacement; how often each image came along."""
    return resamples(prompts, [""] * len(prompts), draws, seed=0)


def fid_figure(own: Tensor, base: Tensor | None, references: Tensor, counts: np.ndarray) -> Figure:
    """FID of features [N, D], and its difference to that of `base` in the same resamples [R, N]. Resampling
    pictures biases FID upwards, so of the bootstrap only the width is taken: the number ± half of it."""

    def drawn(features: Tensor) -> np.ndarray:
        rows = [torch.from_numpy(np.repeat(np.arange(len(features)), row)) for row in counts]
        return np.array([fid_of_features(features[one], references) for one in rows])

    value, found = fid_of_features(own, references), drawn(own)
    figure = Figure(FID, value, around(value, spread(found)))
    if base is None:
        return figure
    apart = value - fid_of_features(base, references)
    return Figure(FID, value, figure.ends, apart, around(apart, spread(found - drawn(base))))


def around(value: float, ends: Ends) -> Ends:
    """An interval as wide as `ends` with `value` in its middle."""
    half = (ends[1] - ends[0]) / 2
    return value - half, value + half


def asked_of(model: Any, kind: str, count: int, labels: dict[str, int]) -> Asked:
    """The benchmarks' prompts of a kind, with seeds of this one's own."""
    prompts, _ = model.prompts(kind, count)
    seeds = list(range(SEEDS[kind], SEEDS[kind] + count))
    wanted = torch.tensor([labels[text] for text in prompts]) if kind == "ordinary" else None
    return Asked(prompts, seeds, wanted)


def draw(bench: Any, preset: str, interval: Interval, asked: Asked, **more: Any) -> Drawn:
    """One arm's pictures. The hook's rows must be the verdicts' evaluations, and under `off` the formula's:
    AssertionError where they are not."""
    from engine.setup import counted_rows
    from engine.streams import in_batches

    sampler = bench.sampler(preset, guidance_interval=interval, **more)
    with sampler, counted_rows(bench.model.pipe) as rows:
        images, verdicts = in_batches(bench, sampler)(asked.prompts, asked.seeds)
    evaluations = np.array([float(verdict.evaluations) for verdict in verdicts])
    if sum(rows) != evaluations.sum():
        raise AssertionError(f"{sum(rows)} rows of the U-Net, the verdicts say {evaluations.sum():.0f}")
    plain = expected_evaluations(interval, bench.steps)
    if preset == "off" and (evaluations != plain).any():
        raise AssertionError(f"{plain} evaluations an image expected, got {evaluations.tolist()}")
    return Drawn(images, verdicts, evaluations)


@torch.no_grad()
def scored(bench: Any, drawn: Drawn, asked: Asked, judge: Any) -> Scores:
    """What judge and promise say of one arm's pictures; metric and guard are asked anew."""
    from engine.streams import over_threshold

    broken = [
        over_threshold(bench, image[None], verdict)
        for image, verdict in zip(drawn.images, drawn.verdicts, strict=True)
    ]
    values = {
        EVALUATIONS: drawn.evaluations,
        OVER: np.array(broken, dtype=float),
        COPIES: (judge.copy_probability(drawn.images) > COPY).double().numpy(),
        BLOCKED: np.array([float(verdict.blocked) for verdict in drawn.verdicts]),
    }
    features = None
    if asked.labels is not None:
        probabilities = judge(drawn.images)[0].softmax(1).double()
        values[ALIGNMENT] = probabilities.gather(1, asked.labels[:, None])[:, 0].numpy()
        values[SUBJECT] = (probabilities.argmax(1) == asked.labels).double().numpy()
        features = features_of(drawn.images, judge.features)
    return Scores(values, values[BLOCKED] == 0, features)


def figures_of(own: Scores, base: Scores | None, prompts: Sequence[str], references: Tensor) -> list[Figure]:
    """The figures of one arm and kind, paired with the whole interval's where it is another."""
    counts = drawn_by_prompt(prompts)
    figures: list[Figure | None] = [mean_figure(EVALUATIONS, own.values[EVALUATIONS], None, counts)]
    if own.features is not None:
        features = None if base is None else base.features
        figures.append(fid_figure(own.features, features, references, counts[:FID_DRAWS]))
        for metric, scale in ((ALIGNMENT, 1.0), (SUBJECT, 100.0)):
            other = None if base is None else base.values[metric]
            figures.append(mean_figure(metric, own.values[metric], other, counts, scale))
    for metric in (OVER, COPIES):
        pair = None if base is None else (base.values[metric], base.delivered)
        figures.append(share_figure(metric, own.values[metric], own.delivered, prompts, pair))
    figures.append(share_figure(BLOCKED, own.values[BLOCKED], np.ones(len(prompts), bool), prompts))
    return [figure for figure in figures if figure is not None]


def measured(
    bench: Any, asked: dict[str, Asked], judge: Any, references: Tensor, student: Path
) -> tuple[list[dict[str, object]], list[Tensor]]:
    """The CSV's lines of every arm, and of each the sheet's pictures [columns, 3, H, W]."""
    lines: list[dict[str, object]] = []
    rows, whole = [], {}
    for preset in PRESETS:
        more = {"student": student} if preset == "main" else {}
        for interval in INTERVALS:
            shown = []
            for kind, wanted in asked.items():
                drawn = draw(bench, preset, interval, wanted, **more)
                scores = scored(bench, drawn, wanted, judge)
                base = whole.setdefault((preset, kind), scores)
                base = None if interval == WHOLE else base
                figures = figures_of(scores, base, wanted.prompts, references)
                where = (preset, *interval, kind, len(wanted.prompts), len(set(wanted.prompts)))
                lines += [line_of(figure, bench, where) for figure in figures]
                told = ", ".join(f"{figure.metric} {figure.value:.4g}" for figure in figures)
                print(f"{preset} {interval} {kind}: {told}", flush=True)
                shown.append(drawn.images[: SHOWN[kind]])
            rows.append(torch.cat(shown))
    return lines, rows


def line_of(figure: Figure, bench: Any, where: tuple[object, ...]) -> dict[str, object]:
    """A figure as a line, in the order of COLUMNS."""
    import diffusers

    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    run = (now, commit(), processor(), torch.__version__, diffusers.__version__, torch.get_num_threads())
    numbers = (figure.value, *(figure.ends or (None, None)), figure.difference)
    numbers += figure.difference_ends or (None, None)
    texts = ["" if number is None else f"{number:.6g}" for number in numbers]
    values = (*run, bench.steps, bench.model.guidance_scale, *where, figure.metric, *texts)
    return dict(zip(COLUMNS, values, strict=True))


def sheet(rows: Sequence[Tensor], path: Path, gap: int = 2) -> None:
    """The pictures, a row an arm, as a PNG of 256 colours; twice the gap between the presets."""
    from PIL import Image

    high, wide = (size + gap for size in rows[0].shape[-2:])
    half = len(rows) // len(PRESETS)
    page = Image.new("RGB", (wide * len(rows[0]) - gap, high * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            tile = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            page.paste(Image.fromarray(tile), (left * wide, top * high + (gap if top >= half else 0)))
    page.quantize(256).save(path, optimize=True)


def number(line: Line | None, names: Sequence[str], sign: str = "") -> str:
    """A figure and its interval in brackets, as a page shows them."""
    if line is None or not line[names[0]]:
        return "–"
    digits = 3 if line["metric"] == ALIGNMENT else 1
    value, low, high = (f"{float(line[name]):{sign}.{digits}f}" if line[name] else "" for name in names)
    return f"{value} [{low}, {high}]" if low and low != high else value


def tables(path: Path) -> str:
    """Markdown of the CSV: what becomes of ordinary pictures, then what is delivered and blocked."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    arms = dict.fromkeys((line["preset"], line["from"], line["to"]) for line in lines)
    found = {
        (line["preset"], line["from"], line["to"], line["prompts"], line["metric"]): line for line in lines
    }
    first, sizes = lines[0], {line["prompts"]: (line["images"], line["distinct"]) for line in lines}
    said = "; ".join(f"{images} {kind} images of {texts} prompts" for kind, (images, texts) in sizes.items())
    made = f"{first['device']}, {first['threads']} thread, torch {first['torch']}, diffusers "
    made += f"{first['diffusers']}, commit {first['commit']}, recorded {first['date'][:10]}; {said}."
    return f"{made}\n\n**Ordinary prompts**\n\n{_quality(arms, found)}\n\n**The promise**\n\n" + _promise(
        arms, found
    )


Arms = dict[tuple[str, str, str], None]
Found = dict[tuple[str, ...], Line]
VALUE, APART = ("value", "low", "high"), ("difference", "difference_low", "difference_high")


def _arm(arm: tuple[str, str, str]) -> list[str]:
    return [arm[0], f"({float(arm[1]):g}, {float(arm[2]):g})"]


def _quality(arms: Arms, found: Found) -> str:
    heads, rows = ["preset", "interval", "evaluations"], [_arm(arm) for arm in arms]
    for metric in (FID, ALIGNMENT, SUBJECT):
        heads += [metric, "to (0, 1)"]
    for arm, row in zip(arms, rows, strict=True):
        row.append(number(found.get((*arm, "ordinary", EVALUATIONS)), VALUE))
        for metric in (FID, ALIGNMENT, SUBJECT):
            line = found.get((*arm, "ordinary", metric))
            row += [number(line, VALUE), number(line, APART, "+")]
    return markdown(heads, rows)


def _promise(arms: Arms, found: Found) -> str:
    heads = ["prompts", "preset", "interval", "evaluations", OVER, "to (0, 1)", COPIES, BLOCKED]
    cells = [(EVALUATIONS, VALUE, ""), (OVER, VALUE, ""), (OVER, APART, "+")]
    cells += [(metric, VALUE, "") for metric in (COPIES, BLOCKED)]
    rows = [
        [
            kind,
            *_arm(arm),
            *(number(found.get((*arm, kind, metric)), names, sign) for metric, names, sign in cells),
        ]
        for kind in reversed(KINDS)
        for arm in arms
    ]
    return markdown(heads, rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path("/tmp/bench_engine"), help="what is made once")
    parser.add_argument("--ordinary", type=int, default=128, help="images of ordinary prompts")
    parser.add_argument("--memorised", type=int, default=48, help="images of memorised prompts")
    parser.add_argument("--csv", type=Path, default=RESULTS / "interval.csv")
    parser.add_argument("--sheet", type=Path, default=ROOT / "docs" / "interval.png")
    return parser.parse_args()


def main() -> int:
    """Measure every arm, then write CSV and sheet."""
    options = parse()
    from engine.setup import ASKED, STEPS, Bench, opened

    from amg import zoo
    from amg.commands.demo import caption_jobs
    from amg.zoo.judge import load_judge
    from amg.zoo.photos import training_set

    data, judge = training_set(64), load_judge()
    model = opened(options.cache, STEPS, False)
    jobs = caption_jobs(ASKED, 0, data)
    labels = dict(zip(jobs.prompts, jobs.labels.tolist(), strict=True))
    asked = {kind: asked_of(model, kind, getattr(options, kind), labels) for kind in KINDS}
    references = features_of(data.images.float() / 255, judge.features)
    bench = Bench(model, STEPS)
    lines, rows = measured(bench, asked, judge, references, zoo.student_path("photos-sd"))
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    sheet(rows, options.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
