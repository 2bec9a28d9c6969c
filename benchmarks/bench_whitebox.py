"""A white-box attacker: a training photograph changed as little as lets it pass metric and guard, photos-sd.

    python benchmarks/bench_whitebox.py --work WORK    # results/whitebox.csv and docs/whitebox.png

The attacker has the embedder's weights, the index and the guard's formula, and differentiates them: Adam on
the picture itself, or on the latents that the pipeline's decoder makes one of (what a callback can put in),
from each of the memorised photographs. It lowers what it attacks below the threshold of the preset `main`
less a margin, at the least squared change. What comes out, as 8-bit pictures, goes through `amg.check` as a
delivered picture does, and before judges that it never saw. WORK keeps the index.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence.targets import whole_photos
from protocol import RESULTS, ROOT, append, commit
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

import amg
from amg.commands.demo import COPY_LIMITS, copies_said, open_index, open_pipeline
from amg.index.guard import LUMINANCE, SKETCH_SIDE
from amg.zoo.judge import load_judge
from amg.zoo.photos import training_set

STEPS, RATE, MARGIN = 100, 0.01, 0.02
WEIGHT = 30.0  # of what is over the threshold, against the mean squared change
GROWTH = 1.03  # of the weight, a step, until it passes
ATTACKED = {"nothing": (), "the metric": ("metric",), "metric and guard": ("metric", "guard")}
COLUMNS = (
    *("date", "commit", "torch", "changed", "attacked", "photographs", "passed by the metric"),
    *("passed by the guard", "unmarked", "copies by photos-judge", "copies by photos-judge-2"),
    *("copies by luminance", "PSNR dB"),
)


@dataclass(frozen=True)
class Target:
    """What is to be passed: a picture's largest similarity to any row, [B], and its threshold."""

    similarity: Callable[[Tensor], Tensor]
    threshold: float


def targets_of(index: Any, config: amg.AMGConfig) -> dict[str, Target]:
    """The metric and the guard of an index, differentiable."""
    rows, sketches = index.rows.float(), index.guard.sketches.float()

    def metric(images: Tensor) -> Tensor:
        return (normalize(index.embedder(images), dim=1) @ normalize(rows, dim=1).T).amax(1)

    def guard(images: Tensor) -> Tensor:
        views = torch.stack([directions(images), directions(images.flip(-1))])
        return (views @ sketches.T).amax((0, 2))

    assert config.threshold is not None and config.guard_threshold is not None
    return {"metric": Target(metric, config.threshold), "guard": Target(guard, config.guard_threshold)}


def directions(images: Tensor) -> Tensor:
    """The guard's sketch of pictures [B, 3, H, W] in [0, 1], [B, 2048] of unit length, differentiable."""
    grey = sum(images[:, at : at + 1] * weight for at, weight in enumerate(LUMINANCE))
    grey = interpolate(grey, (SKETCH_SIDE, SKETCH_SIDE), mode="bilinear", antialias=True)
    across = pad(grey[..., 1:] - grey[..., :-1], (0, 1))
    down = pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    return normalize(torch.cat([across, down], 1).flatten(1), dim=1)


def attack(
    start: Tensor, shown: Callable[[Tensor], Tensor], photos: Tensor, targets: list[Target], steps: int
) -> Tensor:
    """Pictures [B, 3, H, W] of changed `start`: of each the nearest to its photograph that passed every
    target as 8 bits, the last one where none did."""
    changed = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([changed], RATE)
    best, smallest = shown(start).detach(), torch.full((len(photos),), torch.inf)
    weight = torch.full((len(photos),), WEIGHT)
    for _ in range(steps):
        images = shown(changed)
        over = sum((target.similarity(images) - target.threshold + MARGIN).clamp(min=0) for target in targets)
        away = (images - photos).square().mean((1, 2, 3))
        with torch.no_grad():
            rounded = eight_bits(images)
            passed = torch.stack([one.similarity(rounded) <= one.threshold for one in targets]).all(0)
            better = passed & (away < smallest)
            unsolved = torch.isinf(smallest) & ~passed
            best = torch.where((better | unsolved)[:, None, None, None], rounded, best)
            smallest = torch.where(better, away, smallest)
            weight = torch.where(passed, weight, weight * GROWTH)
        optimizer.zero_grad()
        (weight * over + 100 * away).sum().backward()
        optimizer.step()
    return best


def eight_bits(images: Tensor) -> Tensor:
    """Pictures as they are saved, in [0, 1]."""
    return (images.clamp(0, 1) * 255).round() / 255


def figures(images: Tensor, photos: Tensor, index: Any, targets: dict[str, Target]) -> dict[str, Any]:
    """What check and judges say of the pictures, counts."""
    verdicts = amg.check(images, index, amg.AMGConfig.preset("main"))
    said = copies_said(images, photos, load_judge())
    noise = (images - photos).square().mean((1, 2, 3)).clamp(min=1e-10)
    counts = {name: int((said[name] > limit).sum()) for name, limit in COPY_LIMITS.items()}
    return {
        "photographs": len(photos),
        **{
            f"passed by the {name}": int((one.similarity(images) <= one.threshold).sum())
            for name, one in targets.items()
        },
        "unmarked": sum(not verdict.memorized for verdict in verdicts),
        "copies by photos-judge": counts["photos-judge"],
        "copies by photos-judge-2": counts["photos-judge-2"],
        "copies by luminance": counts["luminance"],
        "PSNR dB": f"{float(-10 * noise.log10().mean()):.1f}",
    }


def sheet(rows: list[Tensor], path: Path, gap: int = 2) -> None:
    """Pictures [n, 3, H, W] in [0, 1], a row each, as a PNG."""
    from PIL import Image

    high, wide = (size + gap for size in rows[0].shape[-2:])
    page = Image.new("RGB", (wide * len(rows[0]) - gap, high * len(rows) - gap), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate((row * 255).round().to(torch.uint8).permute(0, 2, 3, 1)):
            page.paste(Image.fromarray(image.numpy()), (left * wide, top * high))
    page.quantize(256).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the index")
    parser.add_argument("--steps", type=int, default=STEPS, help="of Adam")
    parser.add_argument("--csv", type=Path, default=RESULTS / "whitebox.csv")
    parser.add_argument("--sheet", type=Path, default=ROOT / "docs" / "whitebox.png")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    index, pipe = open_index("photos-sd", options.work / "photos-sd.amg"), open_pipeline("photos-sd")
    targets = targets_of(index, amg.AMGConfig.preset("main").for_metric(index.metric))
    photos, scale = whole_photos(training_set(64)), pipe.vae.config.scaling_factor
    pipe.vae.requires_grad_(False)

    def decoded(latents: Tensor) -> Tensor:
        images: Tensor = (pipe.vae.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)
        return images

    latents = pipe.vae.encode(photos * 2 - 1).latent_dist.mean * scale
    ways = {"picture": (photos, lambda images: images.clamp(0, 1)), "latents": (latents, decoded)}
    rows, lines = [photos], []
    for changed, (start, shown) in ways.items():
        for name, attacked in ATTACKED.items():
            chosen = [targets[one] for one in attacked]
            images = (
                attack(start, shown, photos, chosen, options.steps)
                if chosen
                else eight_bits(shown(start).detach())
            )
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            head = {"date": now, "commit": commit(), "torch": torch.__version__}
            lines.append(
                {**head, "changed": changed, "attacked": name, **figures(images, photos, index, targets)}
            )
            print({name: lines[-1][name] for name in COLUMNS[3:]}, flush=True)
            if chosen:
                rows.append(images)
    options.csv.unlink(missing_ok=True)
    append(options.csv, lines, COLUMNS)
    sheet(rows, options.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
