"""`amg calibrate --choose-interval`: the cheapest guidance interval whose pictures are no worse."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.commands.progress import bar
from amg.evaluate.paired import Difference, fid_difference, mean_difference, resampled
from amg.extras import needed, require
from amg.replacing import replacing

Interval = tuple[float, float]
WHOLE: Interval = (0.0, 1.0)
GRID: tuple[Interval, ...] = (WHOLE, (0.0, 0.8), (0.0, 0.7), (0.0, 0.6), (0.0, 0.5))
DRAWS, FID_DRAWS = 4000, 200  # resamples
SHOWN = 6  # pictures of a row of the sheet, of as many prompts


@dataclass(frozen=True)
class Arm:
    """What one interval's pictures [N] are: evaluations and text alignment [N], the share of copies, features
    [N, D] where FID is asked for, and the first pictures of some prompts, uint8 [n, 3, H, W]."""

    evaluations: float
    alignment: Tensor
    copies: float
    features: Tensor | None
    shown: Tensor


@dataclass(frozen=True)
class Choice:
    """One interval beside the whole one: what it costs, what it loses, and whether that is within bounds."""

    interval: Interval
    evaluations: float
    alignment: float
    copies: float
    loss: Difference
    fid: Difference | None
    kept: bool


def add_arguments(parser: Any) -> None:
    """Add the options to `amg calibrate`'s parser."""
    group = parser.add_argument_group("the choice of a guidance interval")
    group.add_argument(
        "--choose-interval",
        action="store_true",
        help="draw the ordinary prompts under several guidance intervals, take the one with the fewest "
        "network evaluations whose pictures are no worse, and calibrate for it",
    )
    group.add_argument(
        "--interval",
        action="append",
        metavar="FROM:TO",
        help="an interval to try beside 0:1; repeat for several (default: 0:0.8, 0:0.7, 0:0.6 and 0:0.5)",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="share of the text alignment that may be lost: the 95 %% interval of the loss must lie below it",
    )
    group.add_argument("--clip", type=Path, metavar="FOLDER", help="judge: a local transformers CLIP model")
    group.add_argument("--open-clip", metavar="MODEL:FILE", help="judge: an open_clip model")
    group.add_argument("--fid-network", metavar="NAME", help="features for FID, as in `amg audit`")
    group.add_argument(
        "--images-of-index", type=Path, metavar="PATH", help="the training images, which FID compares with"
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    if not arguments.choose_interval:
        for name in ("interval", "clip", "open_clip", "fid_network", "images_of_index"):
            if getattr(arguments, name):
                raise ValueError(f"`--{name.replace('_', '-')}` must come with --choose-interval")
        return
    if tuple(arguments.guidance_interval) != WHOLE:
        raise ValueError("`--guidance-interval` must not be given where --choose-interval chooses it")
    if not 0 < arguments.tolerance < 1:
        raise ValueError(f"`--tolerance` must lie in (0, 1), got {arguments.tolerance}")
    grid_of(arguments.interval)


def grid_of(given: Sequence[str] | None) -> tuple[Interval, ...]:
    """The intervals to try, the whole one first."""
    if not given:
        return GRID
    found = [WHOLE]
    for text in given:
        try:
            low, high = (float(part) for part in text.split(":"))
        except ValueError as error:
            raise ValueError(f"`--interval` must be FROM:TO, got {text!r}") from error
        if not 0 <= low < high <= 1:
            raise ValueError(f"`--interval` must be two fractions FROM < TO of [0, 1], got {text!r}")
        found.append((low, high))
    return tuple(dict.fromkeys(found))


def choose(
    pipe: Any, index: Any, jobs: Sequence[Mapping[str, Any]], scale: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The record of a calibration file: every interval tried, the one chosen, by whom it was judged; writes
    the sheet of pictures beside `--out`. ValueError where nobody can judge."""
    ordinary = [job for job in jobs if job["ordinary"]]
    if scale == 1:
        raise ValueError("`--choose-interval` must be left out: without guidance there is no interval")
    judge, network, references = _judges(pipe, index, arguments)
    arms = {}
    for interval in grid_of(arguments.interval):
        arms[interval] = _arm(pipe, index, ordinary, scale, interval, judge, network, arguments)
    prompts = [job["prompt"] for job in ordinary]
    choices = compared(arms, prompts, references, arguments.tolerance)
    chosen = cheapest(choices)
    sheet([arm.shown for arm in arms.values()], sheet_path(arguments.out))
    return {
        "chosen": chosen.interval,
        "tolerance": arguments.tolerance,
        "judge": judge.name,
        "network": network[0] if network and references is not None else None,
        "images": len(ordinary),
        "prompts": len(set(prompts)),
        "choices": [asdict(choice) for choice in choices],
    }


def compared(
    arms: Mapping[Interval, Arm], prompts: Sequence[str], references: Tensor | None, tolerance: float
) -> list[Choice]:
    """Every interval beside the whole one, image by image; pictures whose prompt the judge does not know are
    left out. ValueError where it knows none."""
    whole = arms[WHOLE]
    known = [at for at, score in enumerate(whole.alignment.tolist()) if score == score]
    if not known:
        raise ValueError("`--ordinary` must hold prompts that the judge knows, got none of them")
    counts = resampled([prompts[at] for at in known], DRAWS, seed=0)
    bound, found = tolerance * abs(float(whole.alignment[known].mean())), []
    for interval, arm in arms.items():
        loss = mean_difference(whole.alignment[known], arm.alignment[known], counts)
        fid = None
        if references is not None and arm.features is not None and whole.features is not None:
            rows = resampled(prompts, FID_DRAWS, seed=0)
            fid = fid_difference(arm.features, whole.features, references, rows)
        kept = interval == WHOLE or (loss.high <= bound and (fid is None or fid.low <= 0))
        mean = float(arm.alignment[known].mean())
        found.append(Choice(interval, arm.evaluations, mean, arm.copies, loss, fid, kept))
    return found


def cheapest(choices: Sequence[Choice]) -> Choice:
    """Of those within bounds the one with the fewest evaluations; the whole interval always is."""
    return min((choice for choice in choices if choice.kept), key=lambda choice: choice.evaluations)


def summary(record: Mapping[str, Any]) -> str:
    """The table that the command prints."""
    judged = f"{record['images']} images of {record['prompts']} prompts, alignment by {record['judge']}"
    if record["network"] is not None:
        judged += f", FID by {record['network']}"
    lines = [f"guidance interval, {judged}:"]
    lines.append(
        f"{'interval':<12}{'evaluations':>12}{'alignment':>11}{'lost':>26}{'FID':>24}{'copies %':>10}"
    )
    for choice in record["choices"]:
        loss, fid = (_shown(choice[name], digits) for name, digits in (("loss", 3), ("fid", 1)))
        low, high = choice["interval"]
        mark = " <- chosen" if choice["interval"] == record["chosen"] else "" if choice["kept"] else " worse?"
        lines.append(
            f"{f'{low:g}:{high:g}':<12}{choice['evaluations']:>12.1f}{choice['alignment']:>11.3f}{loss:>26}"
            f"{fid:>24}{100 * choice['copies']:>10.1f}{mark}"
        )
    if record["chosen"] == WHOLE:
        lines.append(
            f"none is cheaper and surely within {100 * record['tolerance']:g} % of the alignment: give more "
            "images, a larger --tolerance, or leave the interval whole"
        )
    return "\n".join(lines)


def _shown(difference: Mapping[str, float] | None, digits: int) -> str:
    if difference is None:
        return "-"
    value, low, high = (f"{difference[name]:+.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def sheet_path(out: Path) -> Path:
    """Where the sheet of pictures goes."""
    return out.with_suffix(".interval.png")


def sheet(rows: Sequence[Tensor], path: Path, gap: int = 2) -> None:
    """Pictures uint8 [n, 3, H, W], a row an interval, as a PNG."""
    Image = needed("PIL.Image", "the sheet of pictures", "report")
    high, wide = (size + gap for size in rows[0].shape[-2:])
    page = Image.new("RGB", (wide * len(rows[0]) - gap, high * len(rows) - gap), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            page.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left * wide, top * high))
    with replacing(path) as partial:
        page.save(partial, format="png")


def _judges(pipe: Any, index: Any, arguments: argparse.Namespace) -> tuple[Any, Any, Tensor | None]:
    """(alignment, (name, features) or None, the training images' features or None)."""
    from amg.commands.audit import bundled
    from amg.commands.audit.run import alignment_of, network_of, references_of
    from amg.evaluate.fid import features_of

    name = bundled.bundled_name(arguments.model, pipe)
    judge = alignment_of(arguments, name)
    if judge is None:
        raise ValueError(
            "`--choose-interval` must have a judge of text alignment: give --clip or --open-clip"
        )
    network = network_of(arguments.fid_network or ("photos-judge" if name else None), arguments.device)
    references = references_of(arguments, name, [index])
    if network is None or references is None:
        return judge, network, None
    require(["torchmetrics"], "FID")
    pictures = (picture for _, picture in references.read() if picture.numel())
    features = (features_of(picture[None].float() / 255, network[1]) for picture in pictures)
    return judge, network, torch.cat([*features])


@torch.no_grad()
def _arm(
    pipe: Any,
    index: Any,
    jobs: Sequence[Mapping[str, Any]],
    scale: float,
    interval: Interval,
    judge: Any,
    network: Any,
    arguments: argparse.Namespace,
) -> Arm:
    """Draw the prompts as plain diffusers would within one interval, and show them to the judges."""
    from amg.commands.calibrate import condition
    from amg.config import AMGConfig
    from amg.engine.sampler import Sampler

    config = AMGConfig.preset("off", guidance_scale=scale, guidance_interval=interval, on_memorized="flag")
    verdicts, scores, features, shown = list[Any](), list[Tensor](), list[Tensor](), dict[str, Tensor]()
    size = arguments.batch_size
    with (
        Sampler(pipe, index, config, max_batch=size) as sampler,
        bar(len(jobs), f"interval {interval[0]:g}:{interval[1]:g}") as progress,
    ):
        for start in range(0, len(jobs), size):
            batch = list(jobs[start : start + size])
            out = sampler(
                **condition(pipe, batch),
                generator=[torch.Generator().manual_seed(job["seed"]) for job in batch],
                num_inference_steps=arguments.steps,
                output_type="pt",
                progress=False,
            )
            images = out.images.float().to(arguments.device)
            verdicts += out.amg
            scores.append(judge(images, [job["prompt"] for job in batch]).cpu())
            if network is not None:
                features.append(network[1](images).double().cpu())
            for job, image in zip(batch, images, strict=True):
                if len(shown) < SHOWN:
                    shown.setdefault(job["prompt"], (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
            progress.update(len(batch))
    return Arm(
        sum(verdict.evaluations for verdict in verdicts) / len(verdicts),
        torch.cat(scores).double(),
        sum(verdict.memorized for verdict in verdicts) / len(verdicts),
        torch.cat(features) if features else None,
        torch.stack([*shown.values()]),
    )
