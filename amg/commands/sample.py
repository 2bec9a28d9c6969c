"""`amg sample`: prompts in, PNGs and a verdicts JSONL out; stops and resumes image by image."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from amg.config import AMGConfig
from amg.guidance.prompts import read_prompts
from amg.verdict import plain

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
OPTIONS = {"pndm": {"skip_prk_steps": True}}  # as Stable Diffusion's: `Sampler` has no Runge-Kutta steps


def run(arguments: argparse.Namespace) -> int:
    """Sample what the command line asks for; returns the exit status."""
    from amg.commands.indexes import open_also, open_index
    from amg.commands.sampled import hold_to, request_of, take_up
    from amg.engine.sampler import Sampler
    from amg.replacing import held

    jobs = list(_jobs(arguments))
    pipe = open_model(arguments.model, arguments.scheduler, arguments.device)
    _require_condition(pipe, arguments)
    index = open_index(arguments.index, arguments.embedder, arguments.device)
    also = open_also(arguments)
    scale = default_scale(pipe) if arguments.guidance_scale is None else arguments.guidance_scale
    names = ("calibration", "student", "rewind_prompt", "guard_false_alarm_rate")
    overrides: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if arguments.ordinary is not None:
        overrides["ordinary_prompts"] = read_prompts(arguments.ordinary, "--ordinary")
    if arguments.on_memorized:
        overrides["on_memorized"] = arguments.on_memorized
    sampler = Sampler(
        pipe, index, AMGConfig.preset(arguments.preset, guidance_scale=scale, **overrides), also
    )
    rehearse(sampler, _condition(jobs[:1]), arguments.steps)
    with held(arguments.out):
        hold_to(arguments.out, request_of(sampler, jobs, arguments.steps, arguments.device))
        done = take_up(arguments.out, jobs)
        delivered = [*done.values(), *_draw(sampler, jobs, set(done), arguments)]
    print(f"{arguments.out}: {_summary(delivered)}")
    return 0


def _draw(
    sampler: Any, jobs: Sequence[Mapping[str, Any]], done: set[int], arguments: argparse.Namespace
) -> Iterator[Any]:
    """Draw and keep what is not done; what is known of each picture, as it is there."""
    import torch

    from amg.commands.progress import bar
    from amg.commands.sampled import Delivered, keep

    waiting = [job for job in jobs if job["seed"] not in done]
    with bar(len(jobs), "sample", len(done)) as shown:
        for start in range(0, len(waiting), arguments.batch_size):
            batch = waiting[start : start + arguments.batch_size]
            generators = [torch.Generator().manual_seed(job["seed"]) for job in batch]
            out = sampler(
                **_condition(batch), generator=generators, num_inference_steps=arguments.steps, progress=False
            )
            flags: Sequence[bool | None] = out.nsfw_content_detected or [None] * len(batch)
            for job, image, verdict, nsfw in zip(batch, out.images, out.amg, flags, strict=True):
                keep(arguments.out, job, image, verdict, nsfw)
                yield Delivered(verdict, nsfw)
                if verdict.blocked:
                    print(f"seed {job['seed']}: blocked, {plain(str(verdict.reason))}", file=sys.stderr)
                shown.update()


def _require_condition(pipe: Any, arguments: argparse.Namespace) -> None:
    """ValueError naming the option that this model needs, or cannot take."""
    from amg.pipelines.denoiser import is_latent
    from amg.pipelines.supported import network_of

    text, option = is_latent(pipe), "--prompt" if arguments.prompt is not None else "--prompts"
    prompted = arguments.prompt is not None or arguments.prompts is not None
    if text and not prompted:
        raise ValueError("`--prompt` or `--prompts` must be given for a text-to-image model, got neither")
    if prompted and not text:
        raise ValueError(f"`{option}` must be left out for {arguments.model}, which takes no text")
    classes = getattr(network_of(pipe).config, "num_class_embeds", None)
    if arguments.label is not None and not classes:
        raise ValueError(f"`--class` must be left out for {arguments.model}, which has no classes")
    if arguments.label is not None and not 0 <= arguments.label < classes:
        raise ValueError(f"`--class` must be in [0, {classes}), got {arguments.label}")


def rehearse(sampler: Any, condition: Mapping[str, Any], steps: int) -> None:
    """Find a request of this sampler to be in order, as a call would, without drawing anything: what a
    calibration, a scheduler or a prompt is refused for shows before the first picture, not after it."""
    from amg.engine.prepare import prepare
    from amg.engine.sampler import Request

    request = Request(**condition, num_inference_steps=steps, output_type="pt")
    prepare(sampler.source, request, sampler.source.generator(0), math.inf)


def _summary(delivered: Sequence[Any]) -> str:
    """The line of `amg.promise.summary`, and how many pictures the safety checker flagged, if any."""
    from amg.promise import summary

    flagged = sum(known.nsfw is True for known in delivered)
    line = summary([known.verdict for known in delivered])
    return f"{line}, {flagged} flagged by the safety checker" if flagged else line


def open_model(model: str, scheduler: str | None, device: str) -> Any:
    """A bundled model by name, or a pipeline from a local diffusers folder, with the scheduler asked for."""
    from amg.pipelines.families import family_of
    from amg.pipelines.supported import require_sampled

    pipe = open_pipeline(model, device, sampled=True)
    require_sampled(pipe)
    if scheduler is not None:
        if scheduler not in SCHEDULERS:
            raise ValueError(f"`--scheduler` must be one of {tuple(SCHEDULERS)}, got {scheduler!r}")
        family = family_of(pipe)
        if family is not None and family.flow:
            raise ValueError(
                f"`--scheduler` must be left out for {type(pipe).__name__}, whose flow matching has its own, "
                f"got {scheduler!r}"
            )
        pipe.scheduler = scheduler_named(scheduler, pipe.scheduler.config)
    return pipe


def scheduler_named(name: str, config: Any) -> Any:
    """One of `SCHEDULERS`, of another's config."""
    from amg.extras import needed

    kind = getattr(needed("diffusers", "a scheduler"), SCHEDULERS[name])
    return kind.from_config(config, **OPTIONS.get(name, {}))


def open_pipeline(model: str, device: str, sampled: bool = False) -> Any:
    """A bundled model by name, or any pipeline from a local diffusers folder; sampled: one of a class that
    `Sampler` takes, else TypeError, before any weights are read."""
    from amg import zoo
    from amg.extras import needed
    from amg.pipelines.supported import read_model_index, require_class

    diffusers = needed("diffusers", "a model")
    if model in zoo.MODELS:
        return zoo.load(model, device)
    if not (Path(model) / "model_index.json").is_file():
        raise ValueError(
            f"`MODEL` must be one of {zoo.MODELS} or a folder with model_index.json, got {model!r}"
        )
    held = read_model_index(Path(model))
    if sampled:
        require_class([str(held.get("_class_name"))], "MODEL")
    if "text_encoder" in held:
        needed("transformers", "a text-to-image model")
    return diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True).to(device)


def default_scale(pipe: Any) -> float:
    """The guidance scale where none is asked for: 7.5, and 2 for pixel models."""
    return 7.5 if getattr(pipe, "vae", None) is not None else 2.0


def _jobs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if arguments.images < 1 or arguments.batch_size < 1:
        raise ValueError(
            f"`--images` and `--batch-size` must be >= 1, got {arguments.images}, {arguments.batch_size}"
        )
    if arguments.steps < 1:
        raise ValueError(f"`--steps` must be >= 1, got {arguments.steps}")
    prompts: list[str | None] = [arguments.prompt]
    if arguments.prompts is not None:
        prompts = [*read_prompts(arguments.prompts)]
    seed = arguments.seed
    for prompt in prompts:
        for _ in range(arguments.images):
            yield {"seed": seed, "prompt": prompt, "class": arguments.label}
            seed += 1


def _condition(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if batch[0]["prompt"] is not None:
        return {"prompt": [job["prompt"] for job in batch]}
    if batch[0]["class"] is not None:
        return {"class_labels": [job["class"] for job in batch]}
    return {"batch_size": len(batch)}
