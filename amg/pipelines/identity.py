"""Whether a calibration or a student was made for this run: its key, out of a pipeline, its index and how it
is run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from amg.config import PRESETS, AMGConfig
from amg.embed.student import Origin, load_student
from amg.guidance.gate import Gate, Key
from amg.pipelines.denoiser import is_latent, is_packed, weights_of
from amg.pipelines.supported import network_of
from amg.similarity.student import Screen

ASKED_OF_AN_INDEX = ("metric", "embed", "nearest", "closest", "with_searcher", "guard", "seal", "captioned")


def asked(config: AMGConfig | None) -> AMGConfig:
    """The config given, with the guard's threshold of its calibration where it asks for that, or the preset
    `main`; TypeError for anything else, ValueError where the calibration cannot say."""
    if config is not None and not isinstance(config, AMGConfig):
        named = isinstance(config, str) and config in PRESETS
        hint = f": give `AMGConfig.preset({config!r})`" if named else ""
        raise TypeError(f"`config` must be an AMGConfig or None, got {config!r:.100}{hint}")
    return AMGConfig.preset("main") if config is None else _guarded(config)


def _guarded(config: AMGConfig) -> AMGConfig:
    rate = config.guard_false_alarm_rate
    if rate is None:
        return config
    gate = gate_of(config)
    if gate is None or gate.guard is None:
        raise ValueError(
            "`guard_false_alarm_rate` must be None without a `calibration` of an index with a guard, "
            f"got {rate:g} and {config.calibration}"
        )
    return replace(config, guard_threshold=gate.guard.threshold(rate))


def require_calibrated_for(index: Any, config: AMGConfig) -> None:
    """ValueError unless the config's calibration was made for this index, whatever the model."""
    gate = gate_of(config)
    if gate is not None and gate.key is not None and gate.key.index_sha256 != index.manifest_sha256:
        raise ValueError(f"`calibration` must be for this index ({index.path}), got {config.calibration}")


def require_indexes(index: Any, also: Sequence[Any]) -> tuple[Any, ...]:
    """`also` as a tuple, after making sure that every index can be asked about a finished image.

    TypeError for what is no index, ValueError for one of embeddings without its embedder, IndexCorrupt for
    one whose files are not what its manifest says.
    """
    if not isinstance(also, (tuple, list)):
        raise TypeError(f"`also` must be a list of indexes, got {also!r:.100}")
    for name, one in [("index", index), *((f"also[{n}]", one) for n, one in enumerate(also))]:
        if not all(hasattr(one, needed) for needed in ASKED_OF_AN_INDEX):
            path = isinstance(one, (str, os.PathLike))
            hint = ": open it by `amg.Index.open(path, embedder)`" if path else ""
            raise TypeError(f"`{name}` must be an amg.Index, got {one!r:.100}{hint}")
        if one.metric == "cosine" and one.embedder is None:
            raise ValueError(
                f"`{name}` must have its embedder attached (`Index.open(path, embedder)`), got none for "
                f"{one!r:.200}"
            )
        one.seal.check()
    return tuple(also)


def state_of(pipe: Any) -> tuple[Any, ...]:
    """What a pipeline's pictures are made with, apart from its scheduler: components by identity, and the
    adapters that are loaded into the network, with their weights."""
    unet = network_of(pipe)
    adapters = tuple(sorted(getattr(unet, "peft_config", None) or ()))
    active = getattr(unet, "active_adapters", None)
    names = tuple(active()) if adapters and callable(active) else ()
    kind = getattr(pipe.scheduler.config, "prediction_type", "epsilon")
    encoders = (f"{part}{at}" for part in ("text_encoder", "tokenizer") for at in ("", "_2", "_3"))
    names_of = ("vae", *encoders)
    parts = (unet, *(getattr(pipe, name, None) for name in names_of))
    return (
        *map(id, parts),
        *weights_of(unet),
        *weights_of(getattr(pipe, "vae", unet)),
        kind,
        adapters,
        names,
    )


def gate_of(config: AMGConfig) -> Gate | None:
    """The gate of the config's calibration file, if it names one."""
    return None if config.calibration is None else Gate.load(config.calibration)


def screen_of(config: AMGConfig, pipe: Any, index: Any) -> Screen | None:
    """The student of the config's file over its teacher's index, if it names one; ValueError for another."""
    if config.student is None:
        return None
    if index.metric != "cosine" or not is_latent(pipe) or is_packed(pipe):
        raise ValueError(
            "`student` must be None without latents that are not packed, and a cosine index, got "
            f"{config.student}"
        )
    screen = Screen(load_student(config.student, pipe.device), index)
    screen.require(origin_of(pipe, index))
    return screen


def refit(screen: Screen | None, pipe: Any) -> None:
    """Hold a student to the pipeline as it is now: ValueError where it does not fit any more; moved to its
    device."""
    if screen is not None:
        screen.require(origin_of(pipe, screen.index))
        screen.student.to(pipe.device)


def origin_of(pipe: Any, index: Any) -> Origin:
    """What a student over this pipeline and index is distilled from."""
    described = {key: value for key, value in pipe.vae.config.items() if not key.startswith("_")}
    text = json.dumps(described, sort_keys=True, default=str)
    channels, teacher = network_of(pipe).config.in_channels, index.embedder
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Origin(teacher.name, teacher.sha, teacher.dimension, channels, digest)


def key_for(pipe: Any, index: Any, scheduler: Any, guidance_scale: float, config: AMGConfig) -> Key:
    """The `Key` of a run: `scheduler` has its timesteps set, `config` is resolved for the index's metric.

    The model is the last part of its name or path (a folder may move) with the hash of its denoiser's
    config: two fine-tunes of one architecture are told apart by their names alone.
    """
    name = Path(str(pipe.config.get("_name_or_path") or "")).name
    network = network_of(pipe)
    public = {key: value for key, value in network.config.items() if not key.startswith("_")}
    text = json.dumps({"class": type(network).__name__, **public}, sort_keys=True, default=str)
    assert config.threshold is not None
    return Key(
        name,
        hashlib.sha256(text.encode()).hexdigest(),
        type(scheduler).__name__,
        len(scheduler.timesteps),
        float(guidance_scale),
        index.manifest_sha256,
        float(config.threshold),
        config.guidance_interval,
    )
