"""What `amg sample` keeps in its folder: the request, one line of verdict a picture, and the pictures.

A picture is never there without its line: the line is on the disk before the picture gets its name. A line
without its picture is dropped when the same request goes on, and the picture sampled again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import amg
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
from amg.index.store import write_atomically
from amg.replacing import clear, replacing
from amg.verdict import Verdict

VERDICTS, REQUEST, VERSION = "verdicts.jsonl", "request.json", 3
INFORMATION = ("amg",)  # kept to be read, not compared
PRESET = "preset_name"
OPTIONS = {  # of `amg sample`, by what they decide in a request
    "model": "MODEL",
    "class": "--class",
    "scheduler": "--scheduler",
    "steps": "--steps",
    "device": "--device",
    "index": "--index",
    "also": "--also",
    "images": "--images",
    "seed": "--seed",
    "prompts": "--prompts",
    f"config.{PRESET}": "--preset",
    "config.guidance_scale": "--guidance-scale",
    "config.on_memorized": "--on-memorized",
    "config.calibration": "--calibration",
    "config.student": "--student",
    "config.ordinary_prompts": "--ordinary",
    "config.rewind_prompt": "--rewind-prompt",
    "config.guard_false_alarm_rate": "--guard-false-alarm-rate",
}


class Delivered(NamedTuple):
    """What is known of a picture: its verdict, and what a safety checker said of it, None without one."""

    verdict: Verdict
    nsfw: bool | None = None


def request_of(sampler: Any, jobs: Sequence[Mapping[str, Any]], steps: int, device: str) -> dict[str, Any]:
    """Everything that decides what is delivered and what it is checked against, by content, not by path.

    The batch size is not among it: a picture never depends on its batch-mates. jobs: seed, prompt and class
    of every picture.
    """
    pipe = sampler.pipe
    return {
        "version": VERSION,
        "amg": amg.__version__,
        "model": model_fingerprint(pipe),
        "scheduler": scheduler_fingerprint(pipe.scheduler),
        "steps": steps,
        "device": device.partition(":")[0],
        "index": index_fingerprint(sampler.index),
        "also": [index_fingerprint(index) for index in sampler.also],
        "images": len(jobs),
        "seed": jobs[0]["seed"],
        "class": jobs[0]["class"],
        "prompts": short(json.dumps([job["prompt"] for job in jobs])),
        "config": config_fingerprint(sampler.config),
    }


def hold_to(folder: Path, request: Mapping[str, Any]) -> None:
    """Keep the request in its folder, which is made where there is none; ValueError naming what differs in a
    folder with pictures of another one, or what is there in a folder that is not ours: nothing in it is
    touched."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--out` must be a folder, got {folder}, which is none")
    kept = folder / REQUEST
    inside = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if inside and REQUEST not in inside:
        raise ValueError(
            f"`--out` must be empty or hold the same request, got {folder} with {min(inside)} and no "
            f"{REQUEST} to say what was asked for and checked"
        )
    made = any(re.fullmatch(rf"{VERDICTS}|-?\d+\.png", name) for name in inside)
    different = _differences(_read(kept, request), request) if inside else []
    if different and made:
        raise ValueError(
            f"`--out` must be empty or hold the same request, got {folder}, where {'; '.join(different)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(request, indent=1) + "\n")


def _read(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The request kept in a folder; ValueError where it is none of ours that says all that `asked` does."""
    try:
        kept = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`--out`: {path} is damaged ({error}); give another folder") from error
    if not isinstance(kept, dict) or kept.get("version") != VERSION or kept.keys() != asked.keys():
        raise ValueError(
            f"`--out` must be empty or hold the same request, got {path} of another version of amg, which "
            "does not say all that was checked: give another folder"
        )
    return kept


def _differences(kept: Mapping[str, Any], asked: Mapping[str, Any], of: str = "") -> list[str]:
    """What was asked for differently, each as "option was … and is now …"; of a preset's fields the preset
    alone."""
    if of and kept.get(PRESET) != asked.get(PRESET):
        kept, asked = {PRESET: kept.get(PRESET)}, {PRESET: asked.get(PRESET)}
    found = []
    for name in {**kept, **asked}:
        was, now = kept.get(name), asked.get(name)
        if was == now or name in INFORMATION:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{name}.")
        else:
            found.append(f"`{OPTIONS.get(of + name, of + name)}` was {was!r} and is now {now!r}")
    return found


def take_up(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> dict[int, Delivered]:
    """What is known, by seed, of the jobs that are done: those whose picture is the one their line names.

    Lines of others are dropped from the file and what is there of their pictures is removed: they are sampled
    again. The folder must be held to their request.
    """
    path, wanted = folder / VERDICTS, {job["seed"]: job for job in jobs}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    done: dict[int, tuple[bytes, Delivered]] = {}
    for line in lines:
        entry = _entry(folder, line, wanted)
        if entry is not None:
            done[entry[0]] = line, entry[1]
    kept = [line for line, _ in done.values()]
    if kept != lines:
        write_atomically(path, b"".join(kept).decode("utf-8"))
    clear(folder)
    for seed in wanted:
        (folder / (name_of(seed) + ".partial")).unlink(missing_ok=True)
        if seed not in done:
            (folder / name_of(seed)).unlink(missing_ok=True)
    return {seed: found for seed, (_, found) in done.items()}


def _entry(
    folder: Path, line: bytes, wanted: Mapping[int, Mapping[str, Any]]
) -> tuple[int, Delivered] | None:
    """Seed and what is known of a picture that is there; None where it or its line is not whole, or not that
    of the job of this seed."""
    try:
        record = unsealed(line) if line.endswith(b"\n") else {}
        job, name = wanted[record["seed"]], name_of(record["seed"])
        own = record["file"] == name and all(record[key] == value for key, value in job.items())
        if not own or file_fingerprint(folder / name) != record["sha256"]:
            return None
        if not isinstance(record["nsfw"], bool | None):
            return None
        return job["seed"], Delivered(Verdict.from_dict(record["verdict"]), record["nsfw"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def name_of(seed: int) -> str:
    """The file of a seed's picture."""
    return f"{seed:06d}.png"


def keep(
    folder: Path, job: Mapping[str, Any], image: Any, verdict: Verdict, nsfw: bool | None = None
) -> None:
    """Write a picture and its line of verdict: the line first, then the picture under its name. nsfw: what
    the safety checker said of it."""
    name = name_of(job["seed"])
    with replacing(folder / name) as partial:
        image.save(partial, format="PNG")
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        record = {"file": name, "sha256": file_fingerprint(partial), **job, "nsfw": nsfw}
        line = sealed({**record, "verdict": verdict.as_dict()})
        _append(folder / VERDICTS, line.encode("utf-8"))


def _append(path: Path, line: bytes) -> None:
    """Append a line and have it on the disk, or leave the file as it was."""
    with open(path, "ab", buffering=0) as file:
        whole = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(f"{path}: only a part of a line was written; is the disk full?")
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(whole)
            raise
