"""What every row is measured on: photos-sd with its index, calibration and student; networks made free."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sampling.contestants import generators
from sampling.models import Model, calibrated, copied
from torch import Tensor

import amg
from amg import zoo
from amg.commands.demo import GUIDANCE_SCALES, caption_jobs, open_index, open_pipeline
from amg.zoo.judge import load_judge
from amg.zoo.photos import training_set

NAME, STEPS, BATCH = "photos-sd", 30, 16
ASKED = 1280  # captions of which a quarter are ordinary, as the latency harness asks
FREE_ROWS = 64  # of the prepared tensors; two for each image


@dataclass(frozen=True)
class Bench:
    """The model, how many of everything, and `rounds` where the caller asked for a number of them."""

    model: Model
    steps: int = STEPS
    quick: bool = False
    rounds: int | None = None
    prompts: int = 256

    def rounds_of(self, usual: int, quick: int) -> int:
        """How many rounds a row makes: as asked, or the row's own number."""
        return self.rounds or (quick if self.quick else usual)

    def options(self) -> dict[str, Any]:
        """The files that switch on every saving, for `AMGConfig.preset`."""
        return {"calibration": self.model.calibration, "student": self.model.student}

    def sampler(self, preset: str, **overrides: Any) -> amg.Sampler:
        """A sampler of the model with a preset."""
        config = amg.AMGConfig.preset(preset, **overrides)
        return amg.Sampler(self.model.pipe, self.model.index, config, max_batch=BATCH, max_pending=1024)

    def plain(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """The pipeline's own pictures, [B, 3, H, W] in [0, 1]."""
        return self.call(self.model.pipe, prompts, seeds, steps).images

    def ours(
        self, sampler: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None
    ) -> Any:
        """A sampler's output for the same call."""
        return self.call(sampler, prompts, seeds, steps, progress=False)

    def call(
        self, draw: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int | None, **more: Any
    ) -> Any:
        """One call of a pipeline or a sampler, a generator for each image."""
        return draw(
            list(prompts),
            num_inference_steps=steps or self.steps,
            guidance_scale=self.model.guidance_scale,
            generator=generators(seeds, "cpu"),
            output_type="pt",
            **more,
        )


def opened(cache: Path, steps: int, files: bool) -> Model:
    """photos-sd with its index and prompts, and with `files` its calibration and student; what is made on
    first use stays in `cache`. Ordinary prompts are those whose plain picture keeps the promise."""
    cache.mkdir(parents=True, exist_ok=True)
    pipe, index, scale = open_pipeline(NAME), open_index(NAME, cache / f"{NAME}.amg"), GUIDANCE_SCALES[NAME]
    pipe.set_progress_bar_config(disable=True)
    asked = caption_jobs(ASKED, 0, training_set(64))
    found = list(zip(asked.prompts, asked.seeds, asked.kinds, strict=True))
    memorised, ordinary = (
        [(text, seed) for text, seed, kind in found if kind == wanted] for wanted in ("specific", "ordinary")
    )
    path = cache / f"{NAME}-copied-{steps}.json"
    if not path.exists():
        path.write_text(json.dumps(copied(pipe, index, ordinary, steps, scale)))
    kept = [job for job, bad in zip(ordinary, json.loads(path.read_text()), strict=True) if not bad]
    calibration = calibrated(cache, steps, scale) if files else None
    jobs = {"memorised": memorised, "ordinary": kept}
    student = zoo.student_path(NAME) if files else None
    return Model(NAME, pipe, index, scale, jobs, judged_copies, calibration, student)


def judged_copies(images: Tensor) -> float:
    """The share of the pictures [B, 3, H, W] that photos-judge, which never guides, calls copies."""
    if not len(images):
        return 0.0
    return (load_judge().copy_probability(images.float()) > 0.5).float().mean().item()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` meanwhile, as an attribute of the instance."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if had else delattr(owner, name)


def far_from(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Of random vectors the `FREE_ROWS` that are farthest, by cosine, from their nearest of `rows` [N, D]."""
    drawn = torch.randn(32 * FREE_ROWS, rows.shape[1], generator=generator)
    nearest = (torch.nn.functional.normalize(drawn) @ torch.nn.functional.normalize(rows).T).amax(1)
    return drawn[nearest.argsort()[:FREE_ROWS]]


@contextlib.contextmanager
def free_networks(model: Model) -> Iterator[Counter[str]]:
    """U-Net, decoder and embedder return prepared tensors at once; their calls are counted.

    The prepared noise prediction is small noise, the prepared picture uniform noise and its embedding a
    vector far from every row of the index: nothing is sent back, and a call makes its steps alone.
    """
    pipe, embedder, calls = model.pipe, model.index.embedder, Counter[str]()
    generator = torch.Generator().manual_seed(0)
    size, config = pipe.unet.config.sample_size, pipe.unet.config
    eps = 0.1 * torch.randn(FREE_ROWS, config.in_channels, size, size, generator=generator)
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    pictures = 2 * torch.rand(FREE_ROWS, 3, scale * size, scale * size, generator=generator) - 1
    vectors = far_from(model.index.rows.float(), generator)

    def prepared(name: str, tensor: Tensor, wrap: Callable[[Tensor], Any] | None) -> Callable[..., Any]:
        def free(rows: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
            calls[name] += 1
            made = tensor[: len(rows)]
            return made if wrap is None else wrap(made) if return_dict else (made,)

        return free

    from diffusers.models.autoencoders.vae import DecoderOutput
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    with (
        replaced(
            pipe.unet, "forward", prepared("unet", eps, lambda made: UNet2DConditionOutput(sample=made))
        ),
        replaced(pipe.vae, "decode", prepared("decoder", pictures, lambda made: DecoderOutput(sample=made))),
        replaced(embedder, "forward", prepared("embedder", vectors, None)),
    ):
        yield calls


@contextlib.contextmanager
def counted_rows(pipe: Any) -> Iterator[list[int]]:
    """The rows of every call of the U-Net meanwhile."""
    rows: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    try:
        yield rows
    finally:
        handle.remove()
