"""Whether a calibration was made for this run: its key, out of a pipeline, its index and how it is run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from amg.config import AMGConfig
from amg.gate import Gate, Key
from amg.index.store import MANIFEST


def gate_of(config: AMGConfig) -> Gate | None:
    """The gate of the config's calibration file, if it names one."""
    return None if config.calibration is None else Gate.load(config.calibration)


def key_for(pipe: Any, index: Any, scheduler: Any, guidance_scale: float, config: AMGConfig) -> Key:
    """The `Key` of a run: `scheduler` has its timesteps set, `config` is resolved for the index's metric.

    The model is the last part of its name or path (a folder may move) with the hash of its denoiser's
    config: two fine-tunes of one architecture are told apart by their names alone.
    """
    name = Path(str(pipe.config.get("_name_or_path") or "")).name
    public = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    text = json.dumps({"class": type(pipe.unet).__name__, **public}, sort_keys=True, default=str)
    assert config.threshold is not None
    manifest = (Path(index.path) / MANIFEST).read_bytes()
    return Key(
        name,
        hashlib.sha256(text.encode()).hexdigest(),
        type(scheduler).__name__,
        len(scheduler.timesteps),
        float(guidance_scale),
        hashlib.sha256(manifest).hexdigest(),
        float(config.threshold),
    )
