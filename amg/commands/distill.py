"""`amg distill`: a tiny decoder that similarity is measured on, trained on the model's own x0_hat."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from amg.commands.said import Defaults
from amg.replacing import replacing

SETTINGS = "settings.json"
RELEVANT = 0.3  # similarities of the teacher from which on a student's shortfall matters
SHOWN = 5  # which of the student's limits the table shows: 0.45
WORTH = 0.05  # share of the looks that must be skipped for a student to be worth its file
LEVELS = 6  # bands of noise level in which agreement is reported
LEARNING_RATE = 2e-3
BATCH = 64
PIXELS = 10.0  # weight of the mean absolute difference of pixels against that of embeddings
WEIGHT = 4.0  # an x0_hat of similarity 1 counts 1 + WEIGHT times one of similarity 0


class Pairs(NamedTuple):
    """What a generation showed: `image` [P] its number, `alpha_bar` [P], `x0_hat` float16 [P, C, h, w], its
    `picture` uint8 [P, 3, SCALE·h, SCALE·w] and the teacher's unit `embedding` of the whole one [P, D]."""

    image: Any
    alpha_bar: Any
    x0_hat: Any
    picture: Any
    embedding: Any


def add_parser(commands: Any) -> None:
    """Add `distill` to the subparsers of `amg`."""
    parser = commands.add_parser(
        "distill",
        help="train a tiny decoder, on which checks measure before the model's own",
        description="Write a student for `AMGConfig.student`. Generations of plain guidance are kept in "
        "OUT.pairs until it is trained: the same command goes on where it stopped.",
        formatter_class=Defaults,
    )
    parser.add_argument("model", metavar="MODEL", help="a latent diffusers folder, photos-sd or photos-flow")
    parser.add_argument("--index", type=Path, required=True, help="index of the training set")
    parser.add_argument(
        "--embedder", required=True, help="the teacher: photos, sscd:FILE, open_clip:MODEL:FILE"
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file")
    parser.add_argument("--prompts", type=Path, help="one a line, or JSONL (default: captions of the index)")
    parser.add_argument("--images", type=int, default=512, help="generations; a quarter is held out")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--scheduler", help="as in `amg sample` (default: the model's own)")
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="s0")
    parser.add_argument("--train-steps", type=int, default=3000, help="of the student, 64 x0_hat each")
    parser.add_argument(
        "--miss-rate", type=float, default=0.05, help="share of close images a cut may pass over"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images sampled together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.set_defaults(run=run, interrupted="the same command goes on where it stopped")


def run(arguments: argparse.Namespace) -> int:
    """Distill as the command line asks; returns the exit status."""
    from amg.commands.indexes import open_index
    from amg.commands.sample import open_model
    from amg.embed.student import save_student
    from amg.index.claim import claimed, remove
    from amg.pipelines.denoiser import is_latent, is_packed

    _check(arguments)
    pipe = open_model(arguments.model, arguments.scheduler, arguments.device)
    index = open_index(arguments.index, arguments.embedder, arguments.device)
    if not is_latent(pipe) or is_packed(pipe) or index.metric != "cosine":
        raise ValueError(
            "`MODEL` must denoise latents, not packed ones, and `--index` be a cosine one, got "
            f"{arguments.model} and {arguments.index} ({index.metric})"
        )
    texts, folder = _prompts(index, arguments), _folder(arguments)
    with claimed(folder, lambda: _of_earlier_version(folder)):
        pairs = collect(pipe, index, texts, arguments)
        student = train(pairs, pipe, index, arguments)
        names = ("images", "steps", "scheduler", "guidance_scale", "train_steps", "miss_rate", "seed")
        report = {name: getattr(arguments, name) for name in names}
        save_student(student, arguments.out, {"distilled": report})
        remove(folder)
    print(f"{table(student.agreement)}\n{saving(student.agreement, arguments.miss_rate)}")
    print(arguments.out)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    least = {"images": 8, "steps": 2, "train_steps": 1, "batch_size": 1}
    for name, value in least.items():
        if getattr(arguments, name) < value:
            option = name.replace("_", "-")
            raise ValueError(f"`--{option}` must be >= {value}, got {getattr(arguments, name)}")
    if not 0 < arguments.miss_rate < 1:
        raise ValueError(f"`--miss-rate` must lie in (0, 1), got {arguments.miss_rate}")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"`--out` must be a file in a folder that exists, got {arguments.out}")


def _folder(arguments: argparse.Namespace) -> Path:
    return Path(f"{arguments.out}.pairs")


def collect(pipe: Any, index: Any, texts: Sequence[str], arguments: argparse.Namespace) -> Pairs:
    """x0_hat and the teacher's embedding at every step of plain generations, kept batch by batch."""
    import torch
    from safetensors.torch import load_file

    from amg.commands.progress import bar

    folder = _folder(arguments)
    _settle(folder, {**_settings(pipe, index, arguments), "prompts": texts})
    with bar(len(texts), "generations") as shown:
        for start in range(0, len(texts), arguments.batch_size):
            path = folder / f"{start:06d}.safetensors"
            batch = texts[start : start + arguments.batch_size]
            if not path.exists():
                _generate(pipe, index, batch, arguments.seed + start, start, arguments, path)
            shown.update(len(batch))
    kept = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return Pairs(*(torch.cat([one[name] for one in kept]) for name in Pairs._fields))


def _settings(pipe: Any, index: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for generations to be those of one run; by content, not by path."""
    from amg.commands.fingerprint import index_fingerprint, model_fingerprint, scheduler_fingerprint

    names = ("images", "steps", "guidance_scale", "seed", "batch_size", "device")
    return {
        "model": model_fingerprint(pipe),
        "index": index_fingerprint(index),
        "scheduler": scheduler_fingerprint(pipe.scheduler),
        **{name: str(getattr(arguments, name)) for name in names},
    }


def _settle(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings in the folder, or refuse to go on in one that others made."""
    from amg.index.store import write_atomically

    record = folder / SETTINGS
    if not record.exists():
        write_atomically(record, json.dumps(settings))
    try:
        made = json.loads(record.read_bytes())
        other = [name for name, value in settings.items() if made.get(name) != value]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`--out`: {record} is damaged ({error}): remove that folder to start anew"
        ) from error
    if other:
        option = "MODEL" if other[0] == "model" else f"--{other[0].replace('_', '-')}"
        raise ValueError(
            f"`{option}` must be that of the run kept in {folder}: remove that folder to start anew"
        )


def _of_earlier_version(folder: Path) -> bool:
    """Whether a folder without a marker is what a killed run left before there were markers."""
    try:
        return {"model", "embedder", "prompts"} <= json.loads((folder / SETTINGS).read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _prompts(index: Any, arguments: argparse.Namespace) -> list[str]:
    """`--images` prompts: those of the file in turn, or captions of the index drawn by their counts."""
    import torch

    from amg.guidance.prompts import read_prompts

    if arguments.prompts is not None:
        given = read_prompts(arguments.prompts, "--prompts")
        return [given[number % len(given)] for number in range(arguments.images)]
    captions = [index.captions[row] for row in range(index.count)]
    if all(caption is None for caption in captions):
        raise ValueError("`--prompts` must be given: the index has no captions")
    told = torch.tensor([caption is not None for caption in captions])
    weights = told * index.counts.float()
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = torch.multinomial(weights, arguments.images, replacement=True, generator=generator)
    return [captions[row] for row in rows.tolist()]


class _Recorder:
    """Stands in for the similarity of a sampler and keeps what it was asked and what the teacher said."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.kept: list[tuple[Any, Any, Any]] = []

    def measure(self, x0_hat: Any) -> Any:
        import torch

        images = self.inner.decode(x0_hat).clamp(0, 1).float()
        unit = torch.nn.functional.normalize(self.inner.index.embedder(images).float())
        self.kept.append((x0_hat.half().cpu(), small(images, x0_hat).cpu(), unit.half().cpu()))
        similarity, row, _ = self.inner.index.nearest(unit)
        from amg.similarity import Measured

        return Measured(similarity, row, {})


def _generate(
    pipe: Any, index: Any, prompts: Sequence[str], seed: int, first: int, arguments: Any, path: Path
) -> None:
    """One batch of plain generations, measured at every step, into one file; renamed when complete."""
    import torch
    from safetensors.torch import save_file

    from amg.commands.calibrate import EVERY_STEP, UNGUIDED
    from amg.config import AMGConfig
    from amg.engine.drive import pristine
    from amg.engine.level import levels as levels_of
    from amg.engine.sampler import Sampler
    from amg.guidance.schedule import LEAST_ALPHA_BAR

    config = AMGConfig.preset("main").for_metric(index.metric)
    sampler = Sampler(pipe, index, replace(config, **UNGUIDED, **EVERY_STEP))
    recorder = _Recorder(sampler.source.similarity)
    sampler.source.similarity = recorder  # type: ignore[assignment]
    sampler(
        list(prompts),
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        output_type="latent",
        progress=False,
    )
    scheduler = pristine(pipe.scheduler)
    scheduler.set_timesteps(arguments.steps)
    levels = [max(level.alpha_bar, LEAST_ALPHA_BAR) for level in levels_of(scheduler)]
    parts = {
        "image": torch.arange(first, first + len(prompts)).repeat(len(levels)),
        "alpha_bar": torch.tensor(levels, dtype=torch.float32).repeat_interleave(len(prompts)),
    }
    for name, kept in zip(("x0_hat", "picture", "embedding"), zip(*recorder.kept, strict=True), strict=True):
        parts[name] = torch.cat(kept).contiguous()
    with replacing(path) as partial:
        save_file(parts, partial)


def small(images: Any, x0_hat: Any) -> Any:
    """The pictures [B, 3, H, W] in [0, 1] as the student is to draw them, uint8."""
    import torch

    from amg.embed.student import SCALE

    size = (SCALE * x0_hat.shape[-2], SCALE * x0_hat.shape[-1])
    resized = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return (resized.clamp(0, 1) * 255).round().to(torch.uint8)


def held_out(image: Any) -> Any:
    """Every fourth generation, as a mask over pairs."""
    return image % 4 == 3


def train(pairs: Pairs, pipe: Any, index: Any, arguments: argparse.Namespace) -> Any:
    """A student fitted to three quarters of the generations, with its agreement on the others."""
    import torch

    from amg.commands.progress import counted
    from amg.embed.student import Student
    from amg.pipelines.identity import origin_of

    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    student = Student(origin_of(pipe, index)).to(device)
    rows = (~held_out(pairs.image)).nonzero().flatten()
    similarity = index.search(pairs.embedding.float().to(device)).similarity.cpu()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    for step in counted(range(arguments.train_steps), "student", "step", arguments.train_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / arguments.train_steps))
        chosen = rows[torch.randint(len(rows), (BATCH,))]
        with torch.enable_grad():
            found = student(pairs.x0_hat[chosen].to(device))
            pixels = (found - pairs.picture[chosen].to(device) / 255).abs().mean()
            embedding = index.embedder(found.clamp(0, 1))
            cosine = torch.cosine_similarity(embedding, pairs.embedding[chosen].float().to(device))
            weight = 1 + WEIGHT * similarity[chosen].clamp_min(0).to(device)
            loss = PIXELS * pixels + (weight * (1 - cosine)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    student.eval().requires_grad_(False)
    student.agreement = agreement_of(student, pairs, index, arguments.miss_rate)
    return student


def agreement_of(student: Any, pairs: Pairs, index: Any, miss_rate: float) -> tuple[Any, ...]:
    """`Agreement` in bands of noise level, on the held-out generations."""
    import torch

    kept = held_out(pairs.image)
    image, alpha_bar, x0_hat, _, embedding = (part[kept] for part in pairs)
    device = next(student.parameters()).device
    with torch.no_grad():
        found = torch.cat(
            [
                index.embedder(student(x0_hat[at : at + 512].to(device)).clamp(0, 1)).float()
                for at in range(0, len(image), 512)
            ]
        ).cpu()
    teacher = embedding.float()
    cosine = torch.cosine_similarity(found, teacher)
    ours, theirs = (index.search(torch.nn.functional.normalize(part).to(device)) for part in (found, teacher))
    measured = (image, cosine, ours.similarity.cpu(), theirs.similarity.cpu(), (ours.row == theirs.row).cpu())
    levels = alpha_bar.unique()
    edges = [float(part[0]) for part in levels.tensor_split(min(LEVELS, len(levels)))]
    bounds = zip([0.0, *edges[1:]], [*edges[1:], 1.0 + 1e-6], strict=True)
    return tuple(
        _band(above, below, (alpha_bar >= above) & (alpha_bar < below), measured, miss_rate)
        for above, below in bounds
    )


def _band(above: float, below: float, inside: Any, measured: Sequence[Any], miss_rate: float) -> Any:
    """One band's `Agreement`."""
    import torch

    from amg.embed.student import LIMITS, Agreement

    image, cosine, ours, theirs, same = (part[inside] for part in measured)
    correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()
    relevant = theirs > RELEVANT
    share = same[relevant].float().mean().item() if bool(relevant.any()) else math.nan
    cuts = [_cut(image, ours, theirs > limit, miss_rate) for limit in LIMITS]
    skipped = [
        (ours[theirs <= limit] < cut).double().mean().item() for limit, cut in zip(LIMITS, cuts, strict=True)
    ]
    numbers = (int(inside.sum()), cosine.mean().item(), correlation, share)
    return Agreement(above, below, *numbers, tuple(cuts), tuple(skipped))


def _cut(image: Any, ours: Any, close: Any, miss_rate: float) -> float:
    """Conformal over generations: of each, our least similarity where the teacher's is `close`; -inf where
    too few generations have one."""
    import torch

    from amg.guidance.calibration import images_needed, miss_bound

    least = torch.full((int(image.max()) + 1,), math.inf, dtype=torch.float32)
    least = least.scatter_reduce(0, image[close], ours[close], "amin")
    least = least[least < math.inf]
    return -math.inf if len(least) < images_needed(miss_rate) else miss_bound(least, miss_rate)


def table(agreement: Sequence[Any]) -> str:
    """Agreement by noise level, as aligned text; skipped: of those at most 0.45 close."""
    head = (
        f"{'alpha_bar':<16}{'x0_hat':>8}{'cosine':>9}{'correlation':>13}{'same row %':>12}{'skipped %':>11}"
    )
    return "\n".join(
        [
            head,
            *(
                f"{f'{one.above:.3f} - {min(one.below, 1):.3f}':<16}{one.count:>8}{one.cosine:>9.3f}"
                f"{one.correlation:>13.3f}{100 * one.same_row:>12.1f}{100 * one.skipped[SHOWN]:>11.1f}"
                for one in agreement
            ),
        ]
    )


def saving(agreement: Sequence[Any], miss_rate: float) -> str:
    """What the student spares, or that it spares nothing, and why."""
    from amg.guidance.calibration import images_needed

    known = [one for one in agreement if math.isfinite(one.skipped[SHOWN])]
    best = max((one.skipped[SHOWN] for one in known), default=0.0)
    if best >= WORTH:
        return f"it spares up to {100 * best:.0f} % of the teacher's looks at what is at most 0.45 close"
    if all(one.cuts[SHOWN] == -math.inf for one in agreement):
        why = (
            f"fewer than {images_needed(miss_rate)} of the held-out generations came closer than 0.45 to a "
            "training image, from which no cut can be stated: give `--prompts` that bring copies, more "
            "`--images`, or a larger `--miss-rate`"
        )
    else:
        most = max((one.correlation for one in known), default=math.nan)
        why = (
            f"its similarities are too unlike the teacher's (correlation at most {most:.2f}): give more "
            "`--train-steps` or `--images`, or leave it out"
        )
    return f"it saves nothing: at most {100 * best:.1f} % of the teacher's looks would be spared; {why}"
