"""The halves of classifier-free guidance in another's loop: recorded at its network, cut by rows, proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.guidance.flight import Flight
from amg.guidance.lower import later
from amg.guidance.predict import Conditions, Denoiser, joined, plain
from amg.guidance.terms import classifier_free, rescale
from amg.pipelines.denoiser import CHANNELS, split_call, without_variance
from amg.pipelines.families import Family

PROVED = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the output's deviation; halves of 16 bits: COARSE
COARSE = 0.1


class Unknown(Exception):
    """What prevents a level of protection, in one line."""


class Call(NamedTuple):
    """One call of the network: its arguments by name, and its output."""

    arguments: Mapping[str, Any]
    output: Tensor


class Halves(NamedTuple):
    """Raw outputs [B, ...], `uncond` None where there is no such half, and what they were conditioned on."""

    uncond: Tensor | None
    cond: Tensor
    conditions: Conditions


def halves_of(family: Family, pipe: Any, calls: Sequence[Call], sample: Tensor) -> Halves:
    """The halves in the calls of the network that came before a step of `sample` [B, ...]. Raises
    `Unknown` where they are not those of the family."""
    batch, rows = len(sample), [len(call.output) for call in calls]
    fits = ([batch], [batch] * 2) if family.separate else ([batch], [2 * batch])
    if rows not in fits:
        raise Unknown(f"its network gave {rows} rows before a step of {batch} samples")
    guided = not family.separate and rows == [2 * batch]
    parts = [given(family, pipe, call.arguments, batch, guided) for call in calls]
    outputs = [without_variance(call.output, sample) for call in calls]
    if len(calls) == 2:
        conditions = Conditions(parts[0].cond, parts[1].cond, parts[0].shared)
        return Halves(outputs[1], outputs[0], conditions)
    uncond, cond = outputs[0].chunk(2) if guided else (None, outputs[0])
    return Halves(uncond, cond, parts[0])


def given(family: Family, pipe: Any, arguments: Mapping[str, Any], batch: int, guided: bool) -> Conditions:
    """The conditions in the network's arguments, without x_t and t; an inpainting network's further channels
    among them."""
    kept = {name: value for name, value in arguments.items() if name not in (family.sample, "timestep")}
    model_input, channels = arguments[family.sample], pipe.vae.config.latent_channels
    if model_input.ndim == 4 and model_input.shape[1] > channels:
        kept[CHANNELS] = model_input[:, channels:]
    return split_call(kept, batch, guided, family.shared)


def require_proved(halves: Halves, output: Tensor, scale: float, rescaled: float) -> None:
    """`Unknown` where the pipeline's own guided `output` [B, ...] is not what its halves give."""
    cond = expected = halves.cond.float()
    if halves.uncond is not None:
        expected = classifier_free(halves.uncond.float(), cond, scale)
        if rescaled > 0:
            expected = rescale(expected, cond, rescaled)
    error = (expected - output.float()).abs().amax() / output.float().std().clamp_min(1e-12)
    if not bool(error <= PROVED.get(halves.cond.dtype, COARSE)):
        raise Unknown("its guided output is not that of the two halves of its network")


def told(
    family: Family, pipe: Any, denoiser: Denoiser, arguments: dict[str, Any], flights: Sequence[Flight]
) -> dict[str, Any]:
    """The arguments of a conditional call of the network with what later tries go to in place of prompts, a
    flight for each row."""
    batch = len(flights)
    guided = not family.separate and len(arguments[family.sample]) == 2 * batch
    own = given(family, pipe, arguments, batch, guided)
    said = later(denoiser, own, flights)
    changed = {name: value for name, value in said.cond.items() if value is not own.cond[name]}
    if said.uncond is not None:
        changed = {name: joined([said.uncond[name], value]) for name, value in changed.items()}
    return {**arguments, **plain(changed)}
