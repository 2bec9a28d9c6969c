"""Adversarial audit: does the promise hold however the sampler is asked?

    python benchmarks/adversarial.py            # results/adversarial{,_views}.csv, docs/adversarial.md
    python benchmarks/adversarial.py --again    # chosen cases anew
    python benchmarks/adversarial.py --tables   # the page again, from the CSVs alone

Each case draws images of memorised prompts; the delivered 8-bit pictures are embedded again and searched in
float64 by brute force. Resumes case by case; exit status 1 where an unmarked one is over or a case raised.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from charts import fill
from evidence.attacks import ALONE, ATTACKS, Attack
from evidence.targets import MADE, VIEWS, steering, whole_photos
from protocol import RESULTS, ROOT, append, commit
from torch import Tensor

import amg
from amg.commands.demo import (
    COPY_LIMITS,
    GUIDANCE_SCALES,
    LUMINANCE_COPY,
    copies_said,
    further_judges,
    open_index,
    open_pipeline,
)
from amg.commands.sample import scheduler_named
from amg.config import AMGConfig
from amg.engine.sampler import Sampler
from amg.evaluate.judges import luminance_correlation
from amg.replacing import replacing
from amg.verdict import Verdict
from amg.zoo.judge import load_judge
from amg.zoo.photos import DUPLICATED, TrainingSet, training_set

PRESETS = ("main", "off", "strong")
SEED, ROUNDING = 90_000, 1e-6  # ROUNDING: what float32 and float64 may differ by
BEGIN, END = "<!-- adversarial: begin -->", "<!-- adversarial: end -->"
PAGE, CSV = ROOT / "docs/adversarial.md", RESULTS / "adversarial.csv"
COLUMNS = (
    *("date", "commit", "torch", "model", "group", "attack", "preset", "images", "broken", "largest"),
    *("marked", "blocked", "stepped_in", "retries", "rewinds", "views", "luminance_pct", "network_pct"),
    *("patches_pct", "evaluations", "seconds", "error"),
)
VIEW_COLUMNS = ("date", "commit", "torch", "view", "photos", "mean", "smallest", "over_main", "over_strong")
VIEW_COLUMNS = (
    *VIEW_COLUMNS,
    "luminance",
    "mean_with_views",
    "over_main_with_views",
    "over_strong_with_views",
)
_JUDGES = (("luminance %", "luminance_pct"), ("network %", "network_pct"), ("patches %", "patches_pct"))
SHOWN = {  # by preset: the page's heads and columns
    "main": (
        *(("check stepped in %", "stepped_in"), ("near a view", "views"), ("rewinds", "rewinds")),
        *(("evaluations", "evaluations"), *_JUDGES),
    ),
    "strong": (("check stepped in %", "stepped_in"), *_JUDGES),
}
Line = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One bundled model: pipeline, index, further indexes, training set, and its memorised conditions."""

    name: str
    pipe: Any
    scheduler: Any
    indexes: Mapping[str, Any]  # see `Attack.index`
    also: tuple[Any, ...]
    data: TrainingSet

    @property
    def index(self) -> Any:
        return self.indexes["trained"]

    @property
    def views(self) -> Any:
        """The index that also holds views of the photographs, or None."""
        return self.indexes.get("views")

    @property
    def size(self) -> int:
        return int(self.data.images.shape[-1])


@dataclass(frozen=True)
class Drawn:
    """What came back: 8-bit pictures, uint8 [B, 3, H, W], their verdicts, the seconds they took."""

    images: Tensor
    verdicts: list[Verdict]
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12, help="per case with the preset main")
    parser.add_argument("--further-images", type=int, default=6, help="per case with every other preset")
    parser.add_argument("--preset", action="append", choices=PRESETS, help="may be given again; default: all")
    parser.add_argument("--only", default="", help="cases whose 'group: name' this regular expression finds")
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the indexes")
    parser.add_argument("--out", type=Path, default=CSV, help="the views' table goes beside it")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--again", action="store_true", help="draw the chosen cases anew")
    parser.add_argument("--tables", action="store_true", help="only fill the page from --out")
    options = parser.parse_args()
    if not options.tables:
        run(options)
    fill(options.page, tables(options.out), BEGIN, END)
    print(tables(options.out))
    return 1 if any(line["error"] or int(line["broken"] or 0) for line in read(options.out)) else 0


def run(options: argparse.Namespace) -> None:
    """Every chosen case that `options.out` does not hold yet; with `--again` all of them, line by line."""
    if options.again:
        views_beside(options.out).unlink(missing_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    stages = {name: open_stage(name, options.work) for name in ("photos-sd", "photos-ddpm")}
    if not views_beside(options.out).exists():
        append(views_beside(options.out), view_lines(stages["photos-sd"]), VIEW_COLUMNS)
    done = set() if options.again else {key_of(line) for line in read(options.out)}
    chosen = [one for one in ATTACKS if re.search(options.only, f"{one.group}: {one.name}")]
    todo = [(preset, attack) for preset in options.preset or PRESETS for attack in chosen]
    for number, (preset, attack) in enumerate(todo, 1):
        if (attack.group, attack.name, preset) in done:
            continue
        count = options.images if preset == "main" else options.further_images
        count = max(1, count // attack.repeats) * attack.repeats
        line = line_of(stages[attack.model], attack, preset, count)
        put(options.out, line)
        shown = " ".join(f"{name} {line[name]}" for name in COLUMNS[7:])
        print(f"[{number}/{len(todo)}] {attack.group}: {attack.name}, {preset}: {shown}", flush=True)


def put(path: Path, line: Line) -> None:
    """Write one case's line in place of an earlier one of the same case."""
    kept = [one for one in read(path) if key_of(one) != key_of(line)]
    with replacing(path) as partial:
        append(partial, [*kept, line], COLUMNS)


def key_of(line: Line) -> tuple[str, str, str]:
    return line["group"], line["attack"], line["preset"]


def views_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_views.csv")


def open_stage(name: str, work: Path) -> Stage:
    """A bundled model ready to be attacked."""
    data, pipe = training_set(32 if name == "photos-ddpm" else 64), open_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    indexes = {"trained": open_index(name, work / f"{name}.amg")}
    if name == "photos-sd":
        embedder = indexes["trained"].embedder
        indexes |= {kind: make(data, embedder, work / f"{name}-{kind}.amg") for kind, make in MADE.items()}
    return Stage(name, pipe, pipe.scheduler, indexes, further_judges(name, "main", work), data)


def line_of(stage: Stage, attack: Attack, preset: str, count: int) -> Line:
    """One line of the table; an exception becomes its `error`."""
    head = (datetime.datetime.now().astimezone().isoformat(timespec="seconds"), commit(), torch.__version__)
    head = (*head, attack.model, attack.group, attack.name, preset)
    line: Line = {**dict.fromkeys(COLUMNS, ""), **dict(zip(COLUMNS, head, strict=False)), "images": count}
    try:
        config = AMGConfig.preset(preset, **({} if preset == "off" else attack.config))
        index = stage.indexes[attack.index]
        drawn = draw(stage, attack, config, index, count)
        return line | figures(stage, drawn, config, index)
    except Exception as error:  # an audit goes on and reports it
        traceback.print_exc()
        return line | {"error": f"{type(error).__name__}: {error}"}


def draw(stage: Stage, attack: Attack, config: AMGConfig, index: Any, count: int) -> Drawn:
    """`count` pictures of one attack."""

    pipe, scale = stage.pipe, GUIDANCE_SCALES[stage.name] if attack.scale is None else attack.scale
    pipe.scheduler = scheduler_named(attack.scheduler, stage.scheduler.config)
    arguments = {
        **conditions(stage, attack, count),
        **attack.options,
        "guidance_scale": scale,
        "num_inference_steps": attack.steps,
        "generator": [torch.Generator().manual_seed(SEED + i) for i in range(count)],
    }
    began = time.monotonic()
    if attack.protected:
        protected = amg.protect(pipe, index, config, stage.also)
        try:
            out = protected(**arguments)
        finally:
            amg.unprotect(pipe)
    else:
        out = Sampler(pipe, index, config, stage.also)(**arguments, progress=False)
    return Drawn(as_bytes(pipe, out.images), out.amg, time.monotonic() - began)


def conditions(stage: Stage, attack: Attack, count: int) -> dict[str, Any]:
    """The prompts, negative prompts and latents of an attack, or the classes; a different caption each."""
    if stage.name == "photos-ddpm":
        labels = torch.tensor([DUPLICATED[i % len(DUPLICATED)] for i in range(count)])
        return {"class_labels": labels, **({"batch_size": count} if attack.protected else {})}
    rows = stage.data.whole.nonzero().flatten().tolist()
    rows = [rows[i % len(rows)] for i in range(count // attack.repeats)]
    captions = [stage.data.captions[row] for row in rows]
    found: dict[str, Any] = {"prompt": attack.prompts(captions)}
    if attack.negative is not None:
        found["negative_prompt"] = attack.negative(captions)
    if attack.target is not None:
        photos = stage.data.images[rows].float() / 255
        found |= steering(stage.pipe, attack.target, photos, found["prompt"], attack.steps)
    return found


@torch.no_grad()
def as_bytes(pipe: Any, images: Any) -> Tensor:
    """Any output type (latents too) as a user would save it, uint8 [B, 3, H, W]."""
    if isinstance(images, Tensor) and images.shape[1] != 3:
        images = pipe.vae.decode(images / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    if isinstance(images, list):
        images = np.stack([np.array(image, dtype=np.float32) / 255 for image in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def figures(stage: Stage, drawn: Drawn, config: AMGConfig, index: Any) -> Line:
    """What was delivered, judged by itself; counts, or means over all images."""
    verdicts, count = drawn.verdicts, len(drawn.verdicts)
    blocked = torch.tensor([one.blocked for one in verdicts])
    marked = torch.tensor([one.memorized for one in verdicts]) & ~blocked
    unmarked = ~blocked & ~marked
    over, largest = exceeding(drawn.images, (index, *stage.also), config)
    delivered = drawn.images[~blocked].float() / 255
    said = copies_said(delivered, stage.data.images.float() / 255, load_judge()) if len(delivered) else {}
    judged = {
        name: f"{100 * (values > COPY_LIMITS[name]).float().mean():.1f}" for name, values in said.items()
    }
    return {
        "broken": int((over & unmarked).sum()),
        "largest": f"{largest[unmarked].max():.4f}" if bool(unmarked.any()) else "",
        "marked": int(marked.sum()),
        "blocked": int(blocked.sum()),
        "stepped_in": sum(one.memorized or one.retries > 0 for one in verdicts),
        "retries": f"{sum(one.retries for one in verdicts) / count:.3f}",
        "rewinds": f"{sum(one.rewinds for one in verdicts) / count:.3f}",
        "views": views_among(stage, drawn.images[unmarked], config),
        "luminance_pct": judged.get("luminance", ""),
        "network_pct": judged.get("photos-judge", ""),
        "patches_pct": judged.get("photos-judge-2", ""),
        "evaluations": f"{sum(one.evaluations for one in verdicts) / count:.1f}",
        "seconds": f"{drawn.seconds / count:.3f}",
    }


def exceeding(images: Tensor, indexes: Sequence[Any], config: AMGConfig) -> tuple[Tensor, Tensor]:
    """Which of `images` uint8 [B, 3, H, W] are over the threshold of any index, bool [B], and the similarity
    under the first; float64, brute force over the rows, independent of the package's search."""
    found, over = [], torch.zeros(len(images), dtype=torch.bool)
    for index in indexes:
        similarity = (brute_cosine if index.metric == "cosine" else brute_nl2)(images, index)
        limit = config.for_metric(index.metric).threshold
        assert limit is not None
        over |= similarity > limit + ROUNDING
        found.append(similarity)
    return over, found[0]


@torch.no_grad()
def brute_cosine(images: Tensor, index: Any) -> Tensor:
    """Largest cosine to any row, float64 [B]."""
    queries = index.embedder(images.float() / 255).double()
    rows = index.rows.double()
    unit = torch.nn.functional.normalize(rows, dim=1)
    return (torch.nn.functional.normalize(queries, dim=1) @ unit.T).max(1).values


def brute_nl2(images: Tensor, index: Any, k: int = 50, alpha: float = 0.5) -> Tensor:
    """−nL2, float64 [B]: the nearest distance over alpha times the mean of the k nearest."""
    rows = index.rows.double().flatten(1) / 255
    distance = torch.stack([(rows - one).square().mean(1).sqrt() for one in images.double().flatten(1) / 255])
    nearest = distance.sort(1).values[:, :k]
    return -nearest[:, 0] / (alpha * nearest.mean(1))


def views_among(stage: Stage, images: Tensor, config: AMGConfig) -> int | str:
    """How many of `images` are over the threshold of the index with views; "" where there is none."""
    if stage.views is None:
        return ""
    return int(exceeding(images, (stage.views,), config)[0].sum()) if len(images) else 0


def view_lines(stage: Stage) -> list[Line]:
    """What the embedder says of flips, turns and crops of the memorised photographs, under both indexes."""
    head = (datetime.datetime.now().astimezone().isoformat(timespec="seconds"), commit(), torch.__version__)
    limits = [AMGConfig.preset(preset).for_metric("cosine").threshold for preset in ("main", "strong")]
    photos, references = whole_photos(stage.data), stage.data.images.float() / 255
    lines = []
    for name, view in VIEWS.items():
        images = (view(photos) * 255).round().to(torch.uint8)
        plain, more = brute_cosine(images, stage.index), brute_cosine(images, stage.views)
        luminance = luminance_correlation(images.float() / 255, references)[0]
        over, over_more = ([int((found > limit).sum()) for limit in limits] for found in (plain, more))
        numbers = (len(images), f"{plain.mean():.3f}", f"{plain.min():.3f}", *over)
        numbers = (*numbers, int((luminance > LUMINANCE_COPY).sum()), f"{more.mean():.3f}", *over_more)
        lines.append(dict(zip(VIEW_COLUMNS, (*head, name, *numbers), strict=True)))
    return lines


def read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{**dict.fromkeys(COLUMNS, ""), **line} for line in csv.DictReader(file)]


def tables(path: Path) -> str:
    """The page's tables out of the two CSVs, Markdown: the promise case by case, then views."""
    lines = [line for line in read(path) if line["preset"] in PRESETS]
    first, guided = lines[0], [line for line in lines if line["preset"] != "off"]
    made = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    text = [f"torch {first['torch']}, commit {made}, recorded {first['date'][:10]}.", totals(guided)]
    heads = ["attack", "unguided copies %"]
    for preset in SHOWN:
        heads += [f"{preset}: over, unmarked", "blocked, marked", *(head for head, _ in SHOWN[preset])]
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for group, attack in dict.fromkeys((line["group"], line["attack"]) for line in lines):
        by_preset = {line["preset"]: line for line in lines if key_of(line)[:2] == (group, attack)}
        rows.append([f"{group}: {attack}", _share(by_preset.get("off"), "marked")])
        for preset in SHOWN:
            rows[-1] += _cells(by_preset.get(preset), preset)
    text.append(_markdown(rows))
    seen = read(views_beside(path))
    heads = [
        "view of the 16 photographs",
        "mean cosine",
        "smallest",
        "over 0.5",
        "over 0.4",
        "luminance judge",
    ]
    heads += ["mean, views in the index", "over 0.5", "over 0.4"]
    columns = VIEW_COLUMNS[3:4] + VIEW_COLUMNS[5:]
    views = [heads, ["---", *["--:"] * 8], *([line[name] for name in columns] for line in seen)]
    return "\n\n".join([*text, _markdown(views)])


def totals(lines: Sequence[Line]) -> str:
    """What all guided cases say together."""
    ran = [line for line in lines if not line["error"]]
    count = {name: sum(int(line[name]) for line in ran) for name in ("images", "broken", "marked", "blocked")}
    late = sum(int(line["stepped_in"]) for line in ran)
    alone = sum(int(line["stepped_in"]) for line in ran if line["group"] == ALONE)
    return (
        f"{len(lines)} guided cases, {count['images']} images: **{count['broken']} delivered over the "
        f"threshold without a mark**, {count['marked']} marked, {count['blocked']} blocked, "
        f"{len(lines) - len(ran)} cases raised; the final check stepped in for {late} images "
        f"({100 * late / count['images']:.1f} %), {alone} of them where it stands alone."
    )


def _cells(line: Line | None, preset: str) -> list[str]:
    width = 2 + len(SHOWN[preset])
    if line is None:
        return [""] * width
    if line["error"]:
        return [line["error"].replace("|", "/"), *[""] * (width - 1)]
    shown = [_share(line, name) if name == "stepped_in" else line[name] for _, name in SHOWN[preset]]
    return [line["broken"], f"{line['blocked']}, {line['marked']}", *shown]


def _share(line: Line | None, column: str) -> str:
    return f"{100 * int(line[column]) / int(line['images']):.0f}" if line and not line["error"] else ""


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
