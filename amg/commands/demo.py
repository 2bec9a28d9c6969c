"""`amg demo`: the bundled models, the same seeds unguided and guided, a table and a report."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amg
from amg import zoo
from amg.commands import info
from amg.commands.audit.environment import environment
from amg.commands.progress import bar
from amg.config import AMGConfig
from amg.engine.sampler import Sampler
from amg.evaluate.alignment import alignment, class_accuracy
from amg.evaluate.fid import fid
from amg.evaluate.judges import luminance_correlation
from amg.evaluate.shares import memorized_share, top1, top5
from amg.extras import needed, require
from amg.index.store import write_atomically
from amg.promise import summary
from amg.replacing import held, replacing
from amg.report import Report, Sample, Section, Table, table_text, write
from amg.verdict import Verdict
from amg.zoo.judge import PhotosJudge, load_judge
from amg.zoo.judge_2 import load_judge_2
from amg.zoo.photos import DUPLICATED, PHOTOS, TrainingSet, training_set

# The released code's constants for pixels make x0_hat diverge here, so that column is left out.
COLUMNS = {
    "photos-ddpm": ("off", "main", "strong"),
    "photos-sd": ("off", "released", "main", "strong"),
}
GUIDANCE_SCALES = {"photos-ddpm": 2.5, "photos-sd": 7.5}  # chosen on other seeds than the demo's
LUMINANCE_COPY = 0.9
JUDGE_COPY = 0.5
COPY_LIMITS = {"luminance": LUMINANCE_COPY, "photos-judge": JUDGE_COPY, "photos-judge-2": JUDGE_COPY}
PACKAGES = (
    *("diffusers", "transformers", "tqdm", "pyarrow", "PIL", "jinja2", "torchmetrics", "skimage"),
    *("sklearn", "matplotlib", "pywt"),
)
CHECKED_ROWS = 64  # of an index that is there already
COLUMN_NAMES = (
    "guidance",
    "memorised %",
    "of duplicated %",
    "before the final check %",
    "Top5%",
    "Top1",
    "luminance judge %",
    "network judge %",
    "patch judge %",
    "FID",
    "subject %",
    "alignment",
    "evaluations/image",
    "s/image",
)


@dataclass(frozen=True)
class Jobs:
    """What one model is asked to draw: per image its kind, prompt text, condition, intended subject (or -1)
    and seed."""

    kinds: list[str]
    prompts: list[str]
    labels: Tensor
    conditions: list[tuple[dict[str, Any], slice]]
    seeds: list[int]


@dataclass(frozen=True)
class Column:
    """One preset's pictures of one model, float32 [N, 3, H, W] in [0, 1], their verdicts and the seconds they
    took."""

    images: Tensor
    verdicts: list[Verdict]
    seconds: float


@torch.no_grad()
def run(out: Path, images: int = 64, seed: int = 0, steps: int = 30, figures: Path | None = None) -> int:
    """Run the demo into the folder `out`; prints the tables and returns the exit status.

    figures: a CSV that the tables' rows are written to, replacing what it held, after each model.
    """
    if images < 4 or steps < 2:
        raise ValueError(f"`--images` must be >= 4 and `--steps` >= 2, got {images} and {steps}")
    require(PACKAGES, "the demo", "demo")  # before the first of several minutes
    with held(out):
        return _run(out, images, seed, steps, figures)


def _run(out: Path, images: int, seed: int, steps: int, figures: Path | None) -> int:
    judge = load_judge()
    sections = []
    for name in GUIDANCE_SCALES:
        section = _section(name, out, images, seed, steps, judge)
        sections.append(section)
        assert section.table is not None
        print(f"\n{section.title}\n{table_text(section.table)}\n", flush=True)
        if figures is not None:
            _write_figures(figures, sections, {"images": images, "steps": steps, "first seed": seed})
    report = Report(
        title="Anti-memorization guidance on models that memorise",
        sections=sections,
        configuration={
            "images per model": images,
            "first seed": seed,
            "steps": steps,
            **{name: ", ".join(columns) for name, columns in COLUMNS.items()},
        },
        versions={name: str(value) for name, value in info.info().items() if not isinstance(value, Mapping)},
        command=f"amg demo --out {out} --images {images} --seed {seed} --steps {steps}",
        created=time.strftime("%Y-%m-%d %H:%M"),
    )
    page = write(report, out / "report" / "index.html")
    for section in sections:
        _sheet(section, out / f"{section.model}.png")
    print(f"report: {page}, sheets: {', '.join(str(out / (section.model + '.png')) for section in sections)}")
    return 0


def _write_figures(path: Path, sections: Sequence[Section], options: Mapping[str, int]) -> None:
    where, text = environment(), io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *COLUMN_NAMES, *options, *where])
    for section in sections:
        assert section.table is not None
        for row in section.table.rows:
            values = [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row]
            writer.writerow([section.model, *values, *options.values(), *where.values()])
    write_atomically(path, text.getvalue())


def _section(name: str, out: Path, count: int, seed: int, steps: int, judge: PhotosJudge) -> Section:
    data = training_set(32 if name == "photos-ddpm" else 64)
    index, pipe = open_index(name, out / f"{name}.amg"), open_pipeline(name)
    jobs = (class_jobs if name == "photos-ddpm" else caption_jobs)(count, seed, data)
    columns = {
        preset: draw(
            pipe,
            index,
            config_for(preset),
            jobs,
            steps,
            f"{name} {preset}",
            further_judges(name, preset, out),
        )
        for preset in COLUMNS[name]
    }
    references = data.images.float() / 255
    said = {preset: copies_said(column.images, references, judge) for preset, column in columns.items()}
    rows = [
        measure(preset, columns[preset], jobs, judge, references, said[preset]) for preset in COLUMNS[name]
    ]
    return _describe(name, index, jobs, data, columns, said, Table(COLUMN_NAMES, rows, _notes(name, data)))


def copies_said(images: Tensor, references: Tensor, judge: PhotosJudge) -> dict[str, Tensor]:
    """How much of a copy each picture [B, 3, H, W] is to the judges that guidance never saw, [B] by the names
    of `COPY_LIMITS`, above which it is one."""
    return {
        "luminance": luminance_correlation(images, references)[0],
        "photos-judge": judge.copy_probability(images),
        "photos-judge-2": load_judge_2().copy_probability(images),
    }


def config_for(preset: str) -> AMGConfig:
    """A column's config; the authors' method is shown as it is, so nothing is run again after it."""
    return AMGConfig.preset(preset, **({"on_memorized": "flag"} if preset == "released" else {}))


def open_pipeline(name: str) -> Any:
    """A bundled pipeline with a DDIM scheduler."""
    pipe = zoo.load(name)
    pipe.scheduler = needed("diffusers", "the demo", "demo").DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def open_index(name: str, path: Path, metric: str | None = None) -> Any:
    """The index of a bundled model's training set, built on first use; ValueError where another is there."""
    from amg.embed.photos import load_photos

    if not path.exists():
        return zoo.build_index(name, path, metric)
    embedder = load_photos() if (metric or name) in ("cosine", "photos-sd") else None
    index = amg.Index.open(path, embedder)
    if index.metric != ("nl2" if embedder is None else "cosine") or not _holds_training_set(index, name):
        raise ValueError(f"{path} must be the index of {name}'s training set, got another: remove it")
    if index.guard is None:
        raise ValueError(f"{path} must have a guard, got one of an earlier version: remove it")
    return index


def _holds_training_set(index: Any, name: str) -> bool:
    """Whether an index is of a bundled model's training images: as many, their ids, and a spread of its
    rows."""
    data = training_set(32 if name == "photos-ddpm" else 64)
    place = {identity: row for row, identity in enumerate(data.ids)}
    sources = [place.get(identity, -1) for identity in index.ids]
    if min(sources) < 0 or index.manifest.images != int(data.counts.sum()):
        return False
    rows = range(0, index.count, max(index.count // CHECKED_ROWS, 1))
    made = index.embed(data.images[[sources[row] for row in rows]].float() / 255)
    kept = index.rows[list(rows)].float() / (255 if index.metric == "nl2" else 1)
    return made.shape == kept.shape and torch.allclose(made, kept, atol=2e-3)


def further_judges(name: str, preset: str, out: Path) -> tuple[Any, ...]:
    """Further indexes that our columns of the pixel model are held to: a copy-detection one."""
    if name == "photos-sd" or preset not in ("main", "strong"):
        return ()
    return (open_index(name, out / f"{name}-embeddings.amg", "cosine"),)


def class_jobs(count: int, seed: int, data: TrainingSet) -> Jobs:
    """Three quarters of the pictures of duplicated classes, one quarter unconditional."""
    guided = count - count // 4
    labels = torch.tensor([DUPLICATED[i % len(DUPLICATED)] for i in range(guided)])
    kinds = ["class"] * guided + ["unconditional"] * (count - guided)
    prompts = [f"class {label}: {PHOTOS[label].key}" for label in labels.tolist()] + ["unconditional"] * (
        count - guided
    )
    conditions: list[tuple[dict[str, Any], slice]] = [
        ({"class_labels": labels, "guidance_scale": GUIDANCE_SCALES["photos-ddpm"]}, slice(0, guided)),
        ({"batch_size": count - guided}, slice(guided, count)),
    ]
    labels = torch.cat([labels, torch.full((count - guided,), -1)])
    return Jobs(kinds, prompts, labels, conditions, list(range(seed, seed + count)))


def caption_jobs(count: int, seed: int, data: TrainingSet) -> Jobs:
    """Three quarters of the pictures from the specific captions, one quarter from ordinary ones no crop
    has."""
    known, specific = set(data.captions), [row for row in range(len(data.ids)) if data.counts[row] > 1]
    ordinary = [
        (f"a photo of {photo.subjects[0]}, {place}", label)
        for place in ("top left", "middle right", "bottom centre")
        for label, photo in enumerate(PHOTOS)
        if f"a photo of {photo.subjects[0]}, {place}" not in known
    ]
    guided = count - count // 4
    rows = [specific[i % len(specific)] for i in range(guided)]
    others = [ordinary[i % len(ordinary)] for i in range(count - guided)]
    prompts = [data.captions[row] for row in rows] + [caption for caption, _ in others]
    labels = torch.tensor([int(data.labels[row]) for row in rows] + [label for _, label in others])
    kinds = ["specific"] * guided + ["ordinary"] * (count - guided)
    condition = {"prompt": prompts, "guidance_scale": GUIDANCE_SCALES["photos-sd"]}
    return Jobs(kinds, prompts, labels, [(condition, slice(0, count))], list(range(seed, seed + count)))


def draw(
    pipe: Any, index: Any, config: AMGConfig, jobs: Jobs, steps: int, title: str, also: tuple[Any, ...] = ()
) -> Column:
    """Draw all jobs with one config; shows progress and prints one line."""
    sampler = Sampler(pipe, index, config, also)
    images, verdicts, began = [], [], time.monotonic()
    with bar(len(jobs.seeds), title) as shown:
        for condition, where in jobs.conditions:
            generators = [torch.Generator().manual_seed(seed) for seed in jobs.seeds[where]]
            out = sampler(
                **condition, generator=generators, num_inference_steps=steps, output_type="pt", progress=False
            )
            images.append(out.images)
            verdicts += out.amg
            shown.update(len(out.amg))
    seconds = time.monotonic() - began
    print(f"{title}: {summary(verdicts)}", flush=True)
    return Column(torch.cat(images), verdicts, seconds)


def measure(
    title: str,
    column: Column,
    jobs: Jobs,
    judge: PhotosJudge,
    references: Tensor,
    said: Mapping[str, Tensor],
) -> list[str | float]:
    """One row of the table, in the order of `COLUMN_NAMES`; said: `copies_said` of the column's pictures."""
    similarity = torch.tensor([verdict.similarity for verdict in column.verdicts], dtype=torch.float32)
    delivered = torch.tensor([verdict.memorized and not verdict.blocked for verdict in column.verdicts])
    late = torch.tensor([bool(verdict.retries) or verdict.memorized for verdict in column.verdicts])
    sign = -1 if column.verdicts[0].metric == "nl2" else 1
    named = jobs.labels >= 0
    duplicated = torch.tensor([kind in ("class", "specific") for kind in jobs.kinds])
    logits = judge(column.images[named])[0]
    return [
        title,
        100 * delivered.float().mean().item(),
        100 * delivered[duplicated].float().mean().item(),
        100 * late.float().mean().item(),
        sign * top5(similarity),
        sign * top1(similarity),
        *(100 * memorized_share(said[name], (limit,))[0] for name, limit in COPY_LIMITS.items()),
        fid(column.images, references, judge.features),
        100 * class_accuracy(logits, jobs.labels[named]),
        alignment(logits.softmax(1), jobs.labels[named]),
        sum(verdict.evaluations for verdict in column.verdicts) / len(column.verdicts),
        column.seconds / len(column.verdicts),
    ]


def _notes(name: str, data: TrainingSet) -> list[str]:
    pixels, cosine = "nL2 < 1.4 (strong: 1.6)", "cosine of photos-embedder > 0.5 (strong: 0.4)"
    metric = pixels if name == "photos-ddpm" else cosine
    return [
        f"memorised: {metric} to any of {len(data.ids)} distinct training images, or by the guard "
        "(structure, cosine > 0.8); blocked images are not delivered",
        "of duplicated: the same share among the duplicated classes or the specific captions alone",
        "before the final check: still memorised after guidance and rewinds, so run again or blocked",
        "main and strong are held to a second index at the final check: photos-embedder, cosine 0.5 and 0.4"
        if name == "photos-ddpm"
        else "photos-embedder measures and guides",
        "luminance judge: correlation of standardised luminance > 0.9 with a training image; network judge: "
        "photos-judge calls the picture a copy; patch judge: photos-judge-2 does; guidance saw none of them",
        f"FID: photos-judge features, against the {len(data.ids)} distinct training images",
        "subject and alignment: photos-judge, how often and how surely it names the intended subject",
    ]


def _sheet(section: Section, path: Path, size: int = 64, most: int = 16) -> None:
    """The first pictures: a row per column, and under the unguided ones their nearest training images."""
    Image = needed("PIL.Image", "the demo", "demo")
    samples = section.samples[:most]
    rows = [[sample.images["off"] for sample in samples], [sample.nearest["off"] for sample in samples]]
    rows += [[sample.images[preset] for sample in samples] for preset in section.columns if preset != "off"]
    sheet = Image.new("RGB", (len(samples) * (size + 2), len(rows) * (size + 2)), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(tile, (left * (size + 2), top * (size + 2)))
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")


def _picture(image: Tensor) -> Any:
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _describe(
    name: str,
    index: Any,
    jobs: Jobs,
    data: TrainingSet,
    columns: Mapping[str, Column],
    said: Mapping[str, Mapping[str, Tensor]],
    table: Table,
) -> Section:
    place = {identity: row for row, identity in enumerate(data.ids)}
    samples = [
        Sample(
            kind=jobs.kinds[i],
            prompt=jobs.prompts[i],
            seed=jobs.seeds[i],
            images={preset: _picture(column.images[i]) for preset, column in columns.items()},
            verdicts={preset: column.verdicts[i] for preset, column in columns.items()},
            nearest={
                preset: data.images[place[column.verdicts[i].neighbour.id]].permute(1, 2, 0).numpy()
                for preset, column in columns.items()
            },
            judges={
                judge: {preset: said[preset][judge][i].item() for preset in columns} for judge in COPY_LIMITS
            },
        )
        for i in range(len(jobs.seeds))
    ]
    titles = {
        "photos-ddpm": (
            "photos-ddpm: a class-conditional DDPM that memorises",
            f"DDIM, pixels, 32×32, guidance scale {GUIDANCE_SCALES[name]}",
        ),
        "photos-sd": (
            "photos-sd: a Stable Diffusion that memorises",
            f"DDIM, latents, 64×64, guidance scale {GUIDANCE_SCALES[name]}",
        ),
    }
    thresholds = {preset: column.verdicts[0].threshold for preset, column in columns.items()}
    return Section(
        title=titles[name][0],
        model=name,
        description=titles[name][1],
        metric=index.metric,
        thresholds=thresholds,
        columns=COLUMNS[name],
        samples=samples,
        table=table,
        judges=COPY_LIMITS,
    )
