"""What an audit keeps: settings, and per picture a PNG and a JSON; each written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.commands.audit.plan import Guidance, Job, Prompt
from amg.commands.fingerprint import (
    config_fingerprint,
    file_fingerprint,
    index_fingerprint,
    model_fingerprint,
    scheduler_fingerprint,
    sealed,
    short,
    unsealed,
)
from amg.extras import needed
from amg.index.store import write_atomically
from amg.replacing import clear, replacing
from amg.verdict import Verdict

SETTINGS, CONFIG = "settings.json", "config.json"
WRITTEN = ("table.json", "table.csv", "images.parquet", "report")  # beside the guidances' folders
COSTS: dict[str, tuple[type, ...]] = {
    "seconds": (float, int),
    "batch": (int,),
    "peak_mib": (float, int, type(None)),
}


@dataclass(frozen=True)
class Record:
    """One picture as it was drawn: its file, verdict, and what it cost. `peak_mib` is that of its batch;
    `nsfw` what a safety checker said of it, None without one."""

    number: int
    prompt_number: int
    seed: int
    prompt: Prompt
    path: Path
    verdict: Verdict
    seconds: float
    batch: int
    peak_mib: float | None
    nsfw: bool | None = None


def settings_of(
    pipe: Any, model: str, index: Any, also: Sequence[Any], prompts: Sequence[Prompt], options: Mapping
) -> dict[str, Any]:
    """What must be equal for pictures to be those of one audit, by the name of its option.

    The batch size is not among it: a picture never depends on its batch-mates. `options`: images, seed,
    steps, guidance_scale and device of the command line.
    """
    listed = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    return {
        "MODEL": f"{Path(model).name}, {model_fingerprint(pipe)}",
        "--index": index_fingerprint(index),
        "--also": [index_fingerprint(other) for other in also],
        "--prompts": f"{len(prompts)} prompts, {short(listed)}",
        "--scheduler": scheduler_fingerprint(pipe.scheduler),
        "--images": options["images"],
        "--seed": options["seed"],
        "--steps": options["steps"],
        "--guidance-scale": options["guidance_scale"],
        "--device": torch.device(options["device"]).type,
    }


def hold_to(path: Path, wanted: Mapping[str, Any], what: str) -> None:
    """Write what a folder's pictures are drawn with, or refuse to go on with anything else, by its name."""
    wanted = json.loads(json.dumps(wanted, default=str))
    if path.is_file():
        kept = _read(path)
        different = [name for name in {**kept, **wanted} if kept.get(name) != wanted.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{what}`{name}` must be {kept.get(name)!r}, as in {path}, got {wanted.get(name)!r}: "
                "go on with the same, or give another `--out`"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(wanted, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`--out`: {path} is damaged ({error}): give another `--out`") from error
    if not isinstance(kept, dict):
        raise ValueError(f"`--out`: {path} must hold one object, got {kept!r}: give another `--out`")
    return kept


def hold_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Hold an audit's folder to its settings; one without them that has guidances, or anything that would be
    written over, is refused."""
    if not (out / SETTINGS).is_file():
        names = [*WRITTEN, *(f"{name}.tmp" for name in (SETTINGS, *WRITTEN))]
        there = [out / name for name in names if (out / name).exists()]
        _require_unmade(
            out / SETTINGS, [*there, *(path for path in out.glob(f"*/{CONFIG}") if _is_config(path))]
        )
    hold_to(out / SETTINGS, settings, "")


def _is_config(path: Path) -> bool:
    return b'"preset_name"' in path.read_bytes()


def _require_unmade(path: Path, made: Sequence[Path]) -> None:
    if made:
        raise ValueError(
            f"`--out` must be empty or say in {path} what its pictures were drawn with, got {min(made)} alone"
        )


def _pictures(folder: Path) -> list[Path]:
    """The pictures and records of a guidance's folder, whole or not, and half a config."""
    ours = rf"\d{{6,}}\.(png|json)(\.tmp)?|{CONFIG}\.tmp"
    return [path for path in folder.glob("*") if re.fullmatch(ours, path.name)]


def hold_guidance(out: Path, guidance: Guidance) -> Path:
    """The folder of a guidance, held to its config."""
    folder = out / guidance.name
    if not (folder / CONFIG).is_file():
        _require_unmade(folder / CONFIG, _pictures(folder))
    hold_to(folder / CONFIG, config_fingerprint(guidance.config), f"guidance {guidance.name!r}: ")
    for left in _pictures(folder):
        if left.suffix == ".tmp":  # of earlier versions
            left.unlink()
    clear(folder)
    return folder


def keep(folder: Path, job: Job, image: Tensor, record: Mapping[str, Any]) -> None:
    """Write a picture (float [3, H, W] in [0, 1], already of 8 bits) and its JSON: the JSON is on the disk
    before the picture gets its name, so that none is ever there without its verdict."""
    Image = needed("PIL.Image", "a picture", "diffusers")
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    path = folder / f"{job.number:06d}.png"
    with replacing(path) as partial:
        Image.fromarray(array).save(partial, format="PNG")
        body = {**asdict(job), "picture": path.name, "sha256": file_fingerprint(partial), **record}
        path.unlink(missing_ok=True)  # one that was damaged, or left without its JSON
        write_atomically(path.with_suffix(".json"), sealed(body))


def complete(folder: Path, job: Job) -> bool:
    """Whether a job's picture and JSON are there, whole, and belong to it and together."""
    try:
        _record(folder, job)
    except (OSError, ValueError):
        return False
    return True


def read_records(folder: Path, jobs: Sequence[Job]) -> list[Record]:
    """The records of all jobs, in their order. ValueError naming one that is not whole."""
    return [_record(folder, job) for job in jobs]


def _record(folder: Path, job: Job) -> Record:
    """A job's record. OSError, or ValueError naming the file, where it or its picture is missing, changed or
    another job's."""
    picture = folder / f"{job.number:06d}.png"
    path = picture.with_suffix(".json")
    try:
        body = unsealed(path.read_bytes())
        own = {**json.loads(json.dumps(asdict(job))), "picture": picture.name}
        own["sha256"] = file_fingerprint(picture)
        for name, value in own.items():
            if json.dumps(body.get(name)) != json.dumps(value):
                raise ValueError(f"`{name}` must be {value!r}, got {body.get(name)!r}")
        for name, kinds in COSTS.items():
            if type(body.get(name, "")) not in kinds:
                raise ValueError(f"`{name}` must be a number, got {body.get(name)!r}")
        if not isinstance(body.get("nsfw"), bool | None):
            raise ValueError(f"`nsfw` must be true, false or null, got {body['nsfw']!r}")
        verdict = Verdict.from_dict(body.get("verdict", {}))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): the same command draws it again") from error
    cost = (body["seconds"], body["batch"], body["peak_mib"], body.get("nsfw"))
    return Record(job.number, job.prompt_number, job.seed, job.prompt, picture, verdict, *cost)


def read_picture(path: Path) -> Tensor:
    """A PNG as uint8 [3, H, W]."""
    from amg.index.decode import decode_image

    return decode_image(path.read_bytes()).pixels
