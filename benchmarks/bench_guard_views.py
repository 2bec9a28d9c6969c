"""Which views of a picture the guard should be asked about: what each finds of photos-sd's copies and what it
wrongly calls one.

python benchmarks/bench_guard_views.py             # benchmarks/results/guard_views.csv
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_guard import BATCH, MODEL, SEED, STEPS, memorised, open_index, open_pipeline, ordinary, write
from PIL import Image
from protocol import RESULTS
from torch import Tensor
from torch.nn import functional

import amg
from amg.commands.demo import GUIDANCE_SCALES
from amg.index.guard import sketch
from amg.zoo.photos import training_set

THRESHOLD = 0.8
Change = Callable[[Tensor], Tensor]


def cropped(side: float, x: float, y: float) -> Change:
    """The part of a picture of `side` times its size, at a place in [0, 1]², at the full size again."""

    def change(images: Tensor) -> Tensor:
        size = images.shape[-1]
        kept = round(size * side)
        left, top = round((size - kept) * x), round((size - kept) * y)
        part = images[..., top : top + kept, left : left + kept]
        return functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True)

    return change


def compressed(images: Tensor, quality: int = 30) -> Tensor:
    found = []
    for image in images:
        buffer = io.BytesIO()
        array = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=quality)
        found.append(torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1) / 255)
    return torch.stack(found)


def blurred(images: Tensor) -> Tensor:
    return functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def same(images: Tensor) -> Tensor:
    return images


def mirrored(images: Tensor) -> Tensor:
    return images.flip(-1)


COPIES: dict[str, Change] = {
    "copies": same,
    "mirrored": mirrored,
    "95 % of the side": cropped(0.95, 0.2, 0.8),
    "90 %, centre": cropped(0.9, 0.5, 0.5),
    "80 %, corner": cropped(0.8, 0.0, 0.0),
    "blurred": blurred,
    "JPEG 30": compressed,
}
CORNERS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
VIEWS: dict[str, list[Change]] = {
    "as it is": [same],
    "and mirrored": [same, mirrored],
    "and five crops": [same, *(cropped(0.9, x, y) for x, y in CORNERS)],
}


def main() -> int:
    parser = argparse.ArgumentParser(description="What each view of the guard finds.")
    parser.add_argument(
        "--images", type=int, default=64, help="copies; three times as many ordinary pictures"
    )
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the index")
    parser.add_argument("--csv", type=Path, default=RESULTS / "guard_views.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    data, index = training_set(64), open_index(MODEL, options.work / f"{MODEL}.amg")
    config = amg.AMGConfig.preset("off", guidance_scale=GUIDANCE_SCALES[MODEL])
    sampler = amg.Sampler(open_pipeline(MODEL), index, config)
    copies = drawn(sampler, memorised(data, options.images))
    others = drawn(sampler, ordinary(data, 3 * options.images))
    training = sketch(data.images.float() / 255).float()
    zoomed = [training]
    for side in (0.9, 0.8):
        zoomed.append(sketch(cropped(side, 0.5, 0.5)(data.images.float() / 255)).float())
    rows = []
    for held, sketches in (("whole", training), ("whole, and 90 and 80 % of its middle", torch.cat(zoomed))):
        for view, changes in VIEWS.items():
            rows.append(measured(held, view, changes, sketches, copies, others))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    write(options.csv, rows)
    return 0


def drawn(sampler: amg.Sampler, prompts: list[str]) -> Tensor:
    images = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(SEED + start + at) for at in range(len(some))]
        out = sampler(some, generator=seeds, num_inference_steps=STEPS, output_type="pt", progress=False)
        images.append(out.images)
    return torch.cat(images)


def measured(
    held: str, view: str, changes: list[Change], sketches: Tensor, copies: Tensor, others: Tensor
) -> dict[str, str]:
    """Of each kind of copy the share found, of ordinary pictures the share called one, in percent."""

    def similarity(images: Tensor) -> Tensor:
        views = torch.stack([sketch(change(images)).float() @ sketches.T for change in changes])
        return views.amax((0, 2))

    row = {"sketches of each training image": held, "views of a picture": view}
    for name, change in COPIES.items():
        row[name] = f"{100 * (similarity(change(copies)) > THRESHOLD).float().mean().item():.1f}"
    found = similarity(others)
    row["ordinary"] = f"{100 * (found > THRESHOLD).float().mean().item():.1f}"
    return row | {"ordinary, 99th percentile": f"{found.quantile(0.99).item():.3f}"}


if __name__ == "__main__":
    sys.exit(main())
