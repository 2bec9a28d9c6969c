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
from typing import Any

import amg
from amg.fingerprint import (
    config_fingerprint,
    file_fingerprint,
    index_fingerprint,
    model_fingerprint,
    scheduler_fingerprint,
    short,
)
from amg.index.store import write_atomically
from amg.verdict import Verdict

VERDICTS, REQUEST, VERSION = "verdicts.jsonl", "request.json", 2
INFORMATION = ("amg",)  # kept to be read, not compared


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
    folder with pictures of another one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--out` must be a folder, got {folder}, which is none")
    kept = folder / REQUEST
    made = [path.name for path in folder.glob("*") if re.fullmatch(rf"{VERDICTS}|-?\d+\.png", path.name)]
    if not kept.exists() and made:
        raise ValueError(
            f"`--out` must be empty or hold the same request, got {folder} with {min(made)} and no {REQUEST} "
            "to say what was asked for and checked"
        )
    different = _differences(_read(kept), request) if kept.exists() else []
    if different and made:
        raise ValueError(
            f"`--out` must be empty or hold the same request, got {folder}, where {'; '.join(different)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(request, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"`--out`: {path} is damaged ({error}); give another folder") from error
    if not isinstance(kept, dict) or kept.get("version") != VERSION:
        raise ValueError(
            f"`--out` must be empty or hold the same request, got {path} of another version of amg, which "
            "does not say all that was checked: give another folder"
        )
    return kept


def _differences(kept: Mapping[str, Any], asked: Mapping[str, Any], of: str = "") -> list[str]:
    """What was asked for differently, each as "name was … and is now …"."""
    found = []
    for name in {**kept, **asked}:
        was, now = kept.get(name), asked.get(name)
        if was == now or name in INFORMATION:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{name}.")
        else:
            found.append(f"`{of}{name}` was {was!r} and is now {now!r}")
    return found


def take_up(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> dict[int, Verdict]:
    """Verdicts by seed of the jobs that are done: those whose picture is the one their line names.

    Lines of others are dropped from the file and what is there of their pictures is removed: they are sampled
    again.
    """
    path, wanted = folder / VERDICTS, {job["seed"] for job in jobs}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    done: dict[int, tuple[bytes, Verdict]] = {}
    for line in lines:
        entry = _entry(folder, line)
        if entry is not None and entry[0] in wanted:
            done[entry[0]] = line, entry[1]
    kept = [line for line, _ in done.values()]
    if kept != lines:
        write_atomically(path, b"".join(kept).decode("utf-8"))
    for seed in wanted:
        (folder / (name_of(seed) + ".partial")).unlink(missing_ok=True)
        if seed not in done:
            (folder / name_of(seed)).unlink(missing_ok=True)
    return {seed: verdict for seed, (_, verdict) in done.items()}


def _entry(folder: Path, line: bytes) -> tuple[int, Verdict] | None:
    """Seed and verdict of a line whose picture is there; None where either is not whole."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {}
        if file_fingerprint(folder / name_of(record["seed"])) != record["sha256"]:
            return None
        return record["seed"], Verdict.from_dict(record["verdict"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def name_of(seed: int) -> str:
    """The file of a seed's picture."""
    return f"{seed:06d}.png"


def keep(folder: Path, job: Mapping[str, Any], image: Any, verdict: Verdict) -> None:
    """Write a picture and its line of verdict: the line first, then the picture under its name."""
    name = name_of(job["seed"])
    partial = folder / (name + ".partial")
    try:
        image.save(partial, format="PNG")
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        record = {"file": name, "sha256": file_fingerprint(partial), **job, "verdict": verdict.as_dict()}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        _append(folder / VERDICTS, line.encode("utf-8", "backslashreplace"))  # half a surrogate as its escape
        os.replace(partial, folder / name)
    finally:
        partial.unlink(missing_ok=True)


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
