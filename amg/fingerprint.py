"""What a run depends on, by content: two runs of equal fingerprints draw and check the same, wherever their
files lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.index.store import MANIFEST, read_manifest

FILES = ("calibration", "student")  # fields of a config that name one
SAMPLED = 64
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def short(text: str | bytes) -> str:
    """The first 16 digits of a sha256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_fingerprint(index: Any) -> str:
    """An open index by its metric or embedder, its rows and the sha256 of its manifest, which holds those of
    all its files: a rebuilt one is another wherever a byte differs.

    ValueError where what lies at its path is no longer what was opened.
    """
    if read_manifest(Path(index.path)) != index.manifest:
        raise ValueError(f"{index.path} must not change while it is open: it was built again, open it anew")
    name = index.metric if index.manifest.embedder is None else index.manifest.embedder.name
    return f"{name}, {index.count} rows, {file_fingerprint(Path(index.path) / MANIFEST)[:16]}"


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
    """A tensor by its first values and the sum of all their bits as integers: no float is added, so it is the
    same on every device; a value that changes changes it."""
    flat = values.detach().contiguous().flatten()
    bits = flat.view(BITS[flat.element_size()])
    return f"{bits[:SAMPLED].tolist()} {int(bits.sum(dtype=torch.int64))}"


def _public(config: Any) -> str:
    """A config as text, without what says where it came from or which version wrote it."""
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        return ""
    kept = {key: value for key, value in fields.items() if not key.startswith("_")}
    kept.pop("transformers_version", None)
    return json.dumps(kept, sort_keys=True, default=str)
