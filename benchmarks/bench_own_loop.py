"""The loop of docs/own-loop.md beside `Sampler` and a loop that never starts again, on the captions that
photos-sd memorised.

python benchmarks/bench_own_loop.py                # benchmarks/results/own_loop.csv
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_guard import (
    BATCH,
    MODEL,
    SEED,
    STEPS,
    copies,
    memorised,
    open_index,
    open_pipeline,
    subjects,
    write,
)
from protocol import RESULTS, ROOT
from torch import Tensor

import amg
from amg.commands.demo import GUIDANCE_SCALES
from amg.zoo.photos import training_set

PAGE = ROOT / "docs" / "own-loop.md"
LOOPS = ("Sampler", "own loop, starts again", "own loop, goes on")


def main() -> int:
    parser = argparse.ArgumentParser(description="What an own loop's pictures are worth.")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the index")
    parser.add_argument("--csv", type=Path, default=RESULTS / "own_loop.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    data, index = training_set(64), open_index(MODEL, options.work / f"{MODEL}.amg")
    pipe, prompts, rows = open_pipeline(MODEL), memorised(data, options.images), []
    for loop in LOOPS:
        images, verdicts = [], []
        for start in range(0, len(prompts), BATCH):
            seeds = range(SEED + start, SEED + min(start + BATCH, len(prompts)))
            drawn = DRAW[loop](pipe, index, prompts[start : start + BATCH], seeds)
            images.append(drawn[0])
            verdicts += drawn[1]
        rows.append(row_of(loop, torch.cat(images), verdicts, prompts, data))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    write(options.csv, rows)
    return 0


def by_sampler(pipe: Any, index: Any, prompts: list[str], seeds: range) -> tuple[Tensor, list[amg.Verdict]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with amg.Sampler(pipe, index, config()) as sampler:
        out = sampler(
            prompts, generator=generators, num_inference_steps=STEPS, output_type="pt", progress=False
        )
    return out.images, out.amg


def by_page(pipe: Any, index: Any, prompts: list[str], seeds: range) -> tuple[Tensor, list[amg.Verdict]]:
    """The page's own code."""
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- code: sd -->\n```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, Any] = {"index": index, "config": config(), "steps": STEPS, "prompts": prompts}
    space |= {"unet": pipe.unet, "vae": pipe.vae, "noise": noise(pipe, seeds)}
    space["encode"] = lambda texts: pipe.encode_prompt(list(texts), "cpu", 1, False)[0]
    exec(compile(code, str(PAGE), "exec"), space)
    return space["images"], space["verdicts"]


@torch.no_grad()
def going_on(pipe: Any, index: Any, prompts: list[str], seeds: range) -> tuple[Tensor, list[amg.Verdict]]:
    """A loop over the scheduler's timesteps, as people have it; everything is delivered."""

    def decode(x0: Tensor) -> Tensor:
        picture: Tensor = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return picture / 2 + 0.5

    scheduler = amg.AMGScheduler(pipe.scheduler, index, config(), decode=decode)
    scheduler.set_timesteps(STEPS)
    sample = noise(pipe, seeds) * scheduler.init_noise_sigma
    states = pipe.encode_prompt([*[""] * len(prompts), *prompts], "cpu", 1, False)[0]
    for t in scheduler.timesteps:
        output = pipe.unet(torch.cat([sample, sample]), t, states).sample
        sample = scheduler.step(output.chunk(2), t, sample).prev_sample
    images = decode(sample).clamp(0, 1)
    return images, scheduler.verdicts(images)


def config() -> amg.AMGConfig:
    return amg.AMGConfig.preset("main", guidance_scale=GUIDANCE_SCALES[MODEL])


def noise(pipe: Any, seeds: range) -> Tensor:
    shape = (1, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


DRAW = dict(zip(LOOPS, (by_sampler, by_page, going_on), strict=True))


def row_of(
    loop: str, images: Tensor, verdicts: list[amg.Verdict], prompts: list[str], data: Any
) -> dict[str, Any]:
    everything = torch.ones(len(images), dtype=torch.bool)
    judged = copies(images, everything, data)
    return {
        "loop": loop,
        "images": len(images),
        "called memorised by the metric": sum(one.similarity > one.threshold for one in verdicts),
        "by the guard": sum(bool(one.guard and one.guard.memorized) for one in verdicts),
        "withheld": int((images.flatten(1).amax(1) == 0).sum()),
        **{name.replace("copies by", "copies in it by"): count for name, count in judged.items()},
        "subject right": subjects(images, prompts, everything),
        "evaluations": f"{sum(one.evaluations for one in verdicts) / len(verdicts):.1f}",
    }


if __name__ == "__main__":
    sys.exit(main())
