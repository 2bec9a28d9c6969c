"""What a run depends on, by content: two runs of equal fingerprints draw and check the same, wherever their
files lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig

FILES = ("calibration", "student")  # fields of a config that name one
BITS = {1: torch.uint8, 2: torch.int16}  # what values of so many bytes are read as; larger ones as int32
ROW, ROWS = 1 << 16, 1 << 6  # values in one sum, and sums taken together
SEAL = re.compile(rb'(\{.*), "digest": "([0-9a-f]{64})"\}', re.DOTALL)


def short(text: str | bytes) -> str:
    """The first 16 digits of a sha256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(record: Mapping[str, Any]) -> str:
    """A record as JSON in one line, the last field of which, `digest`, is the sha256 of all before it.

    Against accidents and edits by others than the writer, not against a forger, who makes the digest anew.
    Half a surrogate is written as its escape.
    """
    body = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return f'{body[:-1].decode()}, "digest": "{hashlib.sha256(body).hexdigest()}"}}\n'


def unsealed(line: bytes) -> dict[str, Any]:
    """The record that `sealed` wrote; ValueError where a byte of it is another."""
    found = SEAL.fullmatch(line.rstrip(b"\r\n"))
    if found is None or hashlib.sha256(found[1] + b"}").hexdigest() != found[2].decode():
        raise ValueError("it must end with the sha256 of its content as `digest`: it was changed or damaged")
    try:
        return json.loads(found[1] + b"}")
    except RecursionError as error:
        raise ValueError("it must not be nested so deeply") from error


def index_fingerprint(index: Any) -> str:
    """An open index by its metric or embedder, its rows and the sha256 of its manifest, which holds those of
    all its files: a rebuilt one is another wherever a byte differs.

    ValueError where what lies at its path is no longer what was opened.
    """
    name = index.metric if index.manifest.embedder is None else index.manifest.embedder.name
    return f"{name}, {index.count} rows, {index.manifest_sha256[:16]}"


def config_fingerprint(config: AMGConfig) -> dict[str, Any]:
    """Every field of a config as JSON would keep it; files by their sha256."""
    fields = dataclasses.asdict(config)
    for name in FILES:
        if fields[name] is not None:
            fields[name] = f"sha256 {file_fingerprint(fields[name])}"
    return json.loads(json.dumps(fields))


def scheduler_fingerprint(scheduler: Any) -> str:
    """A diffusers scheduler by its class and config."""
    return f"{type(scheduler).__name__} {short(_public(scheduler.config))}"


def model_fingerprint(pipe: Any) -> str:
    """A pipeline by its class and, of every component but the scheduler, class, config, weights and
    vocabulary."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for name, part in sorted(pipe.components.items()):
        if name == "scheduler":
            continue
        digest.update(f"{name} {type(part).__name__} {_public(getattr(part, 'config', None))}".encode())
        if isinstance(part, torch.nn.Module):
            for key, values in sorted(part.state_dict().items()):
                digest.update(f"{key} {values.dtype} {list(values.shape)} {_values(values)}".encode())
        elif hasattr(part, "get_vocab"):
            digest.update(json.dumps(part.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _values(values: Tensor) -> str:
    """A tensor by weighted sums of its bits as integers, of which every value has its place's own weight: no
    float is added, so it is the same on every device; a value that changes, or changes places, changes it."""
    flat = values.detach().contiguous().flatten()
    bits = flat.view(BITS.get(flat.element_size(), torch.int32))
    weights = _weights(bits.device)
    return short(" ".join(str(total) for part in bits.split(ROW * ROWS) for total in _sums(part, weights)))


def _sums(bits: Tensor, weights: Tensor) -> Iterator[int]:
    """The weighted sum modulo 2^64 of every `ROW` values, the last of what is left."""
    whole = len(bits) // ROW * ROW
    yield from (bits[:whole].view(-1, ROW) * weights).sum(1).tolist()
    yield int((bits[whole:] * weights[: len(bits) - whole]).sum())


def _weights(device: torch.device) -> Tensor:
    """`ROW` different numbers, int64, in no order that a permutation of weights could follow."""
    place = torch.arange(1, ROW + 1, device=device)
    mixed = place * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return mixed ^ (mixed >> 32)


def _public(config: Any) -> str:
    """A config as text, without what says where it came from or which version wrote it."""
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        return ""
    kept = {key: value for key, value in fields.items() if not key.startswith("_")}
    kept.pop("transformers_version", None)
    return json.dumps(kept, sort_keys=True, default=str)
