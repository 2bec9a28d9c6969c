"""What an audit draws: prompts, guidances, seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from amg.config import PRESETS, AMGConfig

DEFAULT_GUIDANCES = ("off", "main", "strong")


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt file: `caption` (a class number for class-conditional models, "" for models
    that take no prompt), a `kind` to group it by in the report, and what else the public lists say."""

    caption: str
    kind: str = "prompt"
    index: int | str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Guidance:
    """One column: a name that is also its folder's, and its config, resolved for the index's metric."""

    name: str
    config: AMGConfig


@dataclass(frozen=True)
class Job:
    """One picture: `number` counts from 0 through all prompts, `prompt_number` says whose it is."""

    number: int
    prompt_number: int
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Plan:
    """Everything to draw, the same jobs for each guidance."""

    guidances: tuple[Guidance, ...]
    jobs: tuple[Job, ...]
    steps: int
    batch_size: int


def make_jobs(prompts: Sequence[Prompt], images: int, seed: int) -> tuple[Job, ...]:
    """`images` per prompt; picture number n has the seed `seed` + n under every guidance."""
    if images < 1:
        raise ValueError(f"`--images` must be >= 1, got {images}")
    each = [(position, prompt) for position, prompt in enumerate(prompts) for _ in range(images)]
    return tuple(Job(n, position, prompt, seed + n) for n, (position, prompt) in enumerate(each))


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """One prompt a line, or JSONL with `caption` and optionally `kind`, `index` and `url`.

    Raises ValueError naming the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"`--prompts` must be a file of prompts, got {path}, which is none")
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = tuple(_prompt(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip())
    if not prompts:
        raise ValueError(f"`--prompts` must hold at least one prompt, got an empty file {path}")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return Prompt(line.strip())
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`--prompts`: {where} is not JSON ({error})") from error
    if not isinstance(record.get("caption"), str) or not record["caption"].strip():
        raise ValueError(f"`--prompts`: {where} must have a `caption` that is text, got {record}")
    known = {name: record[name] for name in ("index", "url") if record.get(name) is not None}
    return Prompt(record["caption"], str(record.get("kind") or "prompt"), **known)


def make_guidances(
    names: Sequence[str], files: Sequence[Path], metric: str, guidance_scale: float
) -> tuple[Guidance, ...]:
    """Presets by name, then configs from files; off, main and strong where neither is given.

    `released` is drawn as it is ("flag"), as nothing runs again after it in the authors' code. Raises
    ValueError for an unknown preset, a name given twice or a file that is no config.
    """
    names = names or (() if files else DEFAULT_GUIDANCES)
    found = []
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"`--guidance` must be one of {', '.join(PRESETS)}, got {name!r}")
        own = {"on_memorized": "flag"} if name == "released" else {}
        config = AMGConfig.preset(name, guidance_scale=guidance_scale, **own)
        found.append(Guidance(name, config.for_metric(metric)))
    found += [_from_file(path, metric, guidance_scale) for path in files]
    taken = [guidance.name for guidance in found]
    twice = sorted({name for name in taken if taken.count(name) > 1})
    if twice:
        raise ValueError(f"`--guidance` and `--config` must have distinct names, got {twice[0]!r} twice")
    return tuple(found)


def _from_file(path: Path, metric: str, guidance_scale: float) -> Guidance:
    """A config named after its file; `preset_name` in it says which preset its open fields come from."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`--config` must be a JSON file, got {path} ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"`--config` must hold one object of AMGConfig's fields, got {given!r} in {path}")
    unknown = sorted(set(given) - {field.name for field in fields(AMGConfig)})
    if unknown:
        raise ValueError(f"`--config`: {path} has {unknown[0]!r}, which is no field of AMGConfig")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    preset = str(values.pop("preset_name", "main"))
    values.setdefault("guidance_scale", guidance_scale)
    if values.get("on_memorized") == "raise":
        raise ValueError(f"`--config`: `on_memorized` must not be 'raise' in an audit, got it in {path}")
    if path.stem == "report":
        raise ValueError(f"`--config` must not be named {path.name}: the report goes into that folder")
    return Guidance(path.stem, AMGConfig.preset(preset, **values).for_metric(metric))


def condition(pipe: Any, jobs: Sequence[Job]) -> dict[str, Any]:
    """What the sampler is asked: prompts of a text model, class numbers, or just a number of images."""
    from amg.pipelines.denoiser import is_latent
    from amg.pipelines.supported import network_of

    captions = [job.prompt.caption for job in jobs]
    if is_latent(pipe):
        return {"prompt": captions}
    if getattr(network_of(pipe).config, "num_class_embeds", None) is None or not any(captions):
        return {"batch_size": len(jobs)}
    if not all(caption.isdecimal() for caption in captions):
        raise ValueError(f"prompts of a class-conditional model must be class numbers, got {captions}")
    return {"class_labels": [int(caption) for caption in captions]}
