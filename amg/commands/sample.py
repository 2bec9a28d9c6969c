"""`amg sample`: prompts in, PNGs and a verdicts JSONL out; stops and resumes image by image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amg.config import AMGConfig
from amg.guidance.prompts import read_prompts

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def run(arguments: argparse.Namespace) -> int:
    """Sample what the command line asks for; returns the exit status."""
    import torch
    from tqdm import tqdm

    from amg.commands.sampled import Delivered, hold_to, keep, request_of, take_up
    from amg.engine.sampler import Sampler

    jobs = list(_jobs(arguments))
    pipe = open_model(arguments.model, arguments.scheduler, arguments.device)
    index = open_index(arguments.index, arguments.embedder, arguments.device)
    also = open_also(arguments.also, arguments.embedder, arguments.device)
    scale = default_scale(pipe) if arguments.guidance_scale is None else arguments.guidance_scale
    overrides: dict[str, Any] = {"calibration": arguments.calibration, "student": arguments.student}
    if arguments.ordinary is not None:
        overrides["ordinary_prompts"] = read_prompts(arguments.ordinary, "--ordinary")
    if arguments.on_memorized:
        overrides["on_memorized"] = arguments.on_memorized
    sampler = Sampler(
        pipe, index, AMGConfig.preset(arguments.preset, guidance_scale=scale, **overrides), also
    )
    hold_to(arguments.out, request_of(sampler, jobs, arguments.steps, arguments.device))
    done = take_up(arguments.out, jobs)
    delivered = list(done.values())
    waiting = [job for job in jobs if job["seed"] not in done]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), disable=not waiting, unit="image")
    for start in range(0, len(waiting), arguments.batch_size):
        batch = waiting[start : start + arguments.batch_size]
        generators = [torch.Generator().manual_seed(job["seed"]) for job in batch]
        out = sampler(
            **_condition(batch), generator=generators, num_inference_steps=arguments.steps, progress=False
        )
        flags: Sequence[bool | None] = out.nsfw_content_detected or [None] * len(batch)
        for job, image, verdict, nsfw in zip(batch, out.images, out.amg, flags, strict=True):
            keep(arguments.out, job, image, verdict, nsfw)
            delivered.append(Delivered(verdict, nsfw))
            if verdict.blocked:
                print(f"seed {job['seed']}: blocked, {_shown(verdict.reason)}", file=sys.stderr)
        bar.update(len(batch))
    bar.close()
    print(f"{arguments.out}: {_summary(delivered)}")
    return 0


def _shown(reason: str | None) -> str:
    """A text for the terminal, on which what an index holds must not act: unprintable characters escaped."""
    escaped = (one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(reason))
    return "".join(escaped)


def _summary(delivered: Sequence[Any]) -> str:
    """The line of `amg.promise.summary`, and how many pictures the safety checker flagged, if any."""
    from amg.promise import summary

    flagged = sum(known.nsfw is True for known in delivered)
    line = summary([known.verdict for known in delivered])
    return f"{line}, {flagged} flagged by the safety checker" if flagged else line


def open_model(model: str, scheduler: str | None, device: str) -> Any:
    """A bundled model by name, or a pipeline from a local diffusers folder, with the scheduler asked for."""
    import diffusers

    from amg import zoo
    from amg.pipelines.supported import is_sd3, require_folder, require_sampled

    if model in zoo.MODELS:
        pipe = zoo.load(model, device)
    elif (Path(model) / "model_index.json").is_file():
        require_folder(Path(model))
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True).to(device)
    else:
        raise ValueError(
            f"`MODEL` must be one of {zoo.MODELS} or a folder with model_index.json, got {model!r}"
        )
    require_sampled(pipe)
    if scheduler is not None:
        if scheduler not in SCHEDULERS:
            raise ValueError(f"`--scheduler` must be one of {tuple(SCHEDULERS)}, got {scheduler!r}")
        if is_sd3(pipe):
            raise ValueError(
                f"`--scheduler` must be left out for {type(pipe).__name__}, whose flow matching has its own, "
                f"got {scheduler!r}"
            )
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    return pipe


def default_scale(pipe: Any) -> float:
    """The guidance scale where none is asked for: 7.5, and 2 for pixel models."""
    return 7.5 if getattr(pipe, "vae", None) is not None else 2.0


def open_index(path: Path, embedder: str | None, device: str) -> Any:
    """An index with the embedder named on the command line attached."""
    from amg import embed
    from amg.index import Index

    chosen = None if embedder in (None, "pixels") else embed.load(str(embedder))
    return Index.open(path, chosen, device=device)


def open_also(paths: Sequence[Path], embedder: str | None, device: str) -> list[Any]:
    """The indexes of `--also`: of pixels, or made by the first one's embedder. ValueError for one of another
    embedder."""
    from amg.index import Index

    opened = []
    for path in paths:
        index = Index.open(path, device=device)
        if index.metric == "cosine" and index.manifest.embedder is not None:
            if embedder in (None, "pixels"):
                raise ValueError(
                    "`--also` must be an index of pixels, or made by what `--embedder` names, got "
                    f"{path}, made by {index.manifest.embedder.name!r}, without `--embedder`"
                )
            index = open_index(path, embedder, device)
        opened.append(index)
    return opened


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


def _condition(batch: list[dict[str, Any]]) -> dict[str, Any]:
    if batch[0]["prompt"] is not None:
        return {"prompt": [job["prompt"] for job in batch]}
    if batch[0]["class"] is not None:
        return {"class_labels": [job["class"] for job in batch]}
    return {"batch_size": len(batch)}
