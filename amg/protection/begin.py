"""What a watched call is guided by, made at its first step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import Refused
from amg.engine.level import Level, levels
from amg.guidance.flight import Flight
from amg.guidance.predict import Denoiser
from amg.pipelines.denoiser import asked, captions_of
from amg.protection.guide import Guide
from amg.protection.halves import Unknown
from amg.protection.shown import decoder, tried
from amg.protection.tries import Try
from amg.similarity import judges_for, similarity_for

if TYPE_CHECKING:
    from amg.protection.watch import Watch

TRIED = "its latents decode"


def first_of(scheduler: Any, timestep: Any) -> int:
    """The step that a loop starts with, out of the scheduler's timesteps: not 0 where it starts late."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    known, t = torch.as_tensor(scheduler.timesteps).double(), float(torch.as_tensor(timestep).flatten()[0])
    found = (known == t).nonzero().flatten().tolist()
    if not found:
        raise Unknown(f"it begins at {t:g}, which is none of its scheduler's timesteps")
    return int(found[0])


def levels_of(scheduler: Any, output: Tensor, sample: Tensor) -> tuple[Level, ...]:
    """The level of every step; `Unknown` where the scheduler tells none, or steps with another's output."""
    if output.shape != sample.shape:
        shapes = f"{list(output.shape)} for {list(sample.shape)}"
        raise Unknown(f"its scheduler is given outputs of another shape than its samples, {shapes}")
    try:
        return levels(scheduler)
    except Refused as refused:
        raise Unknown(str(refused)) from refused


def flights_of(one: Try, sample: Tensor, despecified: int) -> list[Flight]:
    """A flight for each sample [B, ...] of a call; later tries are despecified up to a step."""
    flights = [Flight.from_noise(row.float(), one.texts.get(at)) for at, row in enumerate(sample)]
    for place, flight in enumerate(flights):
        flight.retries = one.attempt
        flight.caption = one.captions.get(place)
        flight.evaluations = one.spent.get(place, 0)
        flight.despecified_until = despecified if one.attempt else 0
    return flights


def acting(config: AMGConfig, rewinds: bool, may_leave: bool) -> AMGConfig:
    """The config of a call: samples are only sent back where they can be."""
    if not rewinds and not may_leave:
        config = replace(config, max_rewinds=0)
    if not rewinds and config.gradient == "full":
        config = replace(config, gradient="frozen")
    return config


def guide_of(watch: Watch, kind: str, sample: Tensor) -> Guide:
    """Guidance of a call whose network, if it is known, predicts `kind`. Raises `Unknown` where its latents
    [B, ...] decode to nothing; that is tried once for a pipeline."""
    watched, family, arguments = watch.watched, watch.family, watch.one.arguments
    decode = decoder(watch.pipe, arguments)
    if TRIED not in watched.said:
        tried(decode, sample)
        watched.said.add(TRIED)
    captions = None if family is None else captions_of(watch.pipe, arguments)
    network = nobody if family is None else asked(family, watch.forward)
    denoiser = Denoiser(network, decode, kind, False, captions)
    similarity = similarity_for(watched.index, denoiser)
    judges = judges_for(watched.also, denoiser)
    parts = (watched.index, similarity, denoiser, watch.scale, watch.rescale, judges, None, None)
    return Guide(watch.config, *parts, watched.ordinary)


def nobody(*_: Any, **__: Any) -> Tensor:
    """The network of a pipeline of no known family."""
    raise RuntimeError("the network of an unknown pipeline cannot be asked")
