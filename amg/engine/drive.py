"""A scheduler, driven one call at a time: fresh copies, starts in the middle, and noise of our own choosing.

Schedulers are objects with `timesteps`, `set_timesteps` and `step`; this module does not import diffusers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Refused(ValueError):
    """A scheduler that cannot be used; the message names it and the reason in one line."""

    def __init__(self, scheduler: Any, reason: str):
        super().__init__(
            "`scheduler` must be one whose steps are linear, between noise levels it tells, got "
            f"{name_of(scheduler)}: {reason}"
        )


def name_of(scheduler: Any) -> str:
    """The name of a scheduler's class."""
    return type(scheduler).__name__


def option(scheduler: Any, name: str, default: Any = None) -> Any:
    """An entry of the scheduler's config; `default` where it has none, or no config."""
    config = getattr(scheduler, "config", None)
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def pristine(scheduler: Any) -> Any:
    """A copy of a scheduler whose timesteps are set and which has not stepped yet, free of any instance-level
    wrapper."""
    clone = copy.copy(scheduler)
    clone.__dict__ = {
        name: value for name, value in vars(scheduler).items() if name not in ("step", "scale_model_input")
    }
    if "_step_index" in clone.__dict__:
        clone._step_index = (
            None  # a scheduler whose input was already scaled knows its place; a fresh one must not
        )
    return copy.deepcopy(clone)


def started(scheduler: Any, start: int) -> Any:
    """A pristine copy that makes step `start` first. Timesteps repeat, so it is told the step's number
    wherever it can be; a scheduler that cannot has no place to lose."""
    clone = pristine(scheduler)
    if hasattr(clone, "set_begin_index"):
        clone.set_begin_index(start)
    return clone


def timed(scheduler: Any, arguments: Mapping[str, Any]) -> Any:
    """A pristine copy on the CPU with its timesteps set by those `arguments` of `set_timesteps` that are not
    None; without any, as they are set already."""
    given = {name: value for name, value in arguments.items() if value is not None}
    known = inspect.signature(type(scheduler).set_timesteps).parameters
    anything = any(one.kind is one.VAR_KEYWORD for one in known.values())
    if not anything and (strange := sorted(given.keys() - known.keys())):
        raise ValueError(
            f"`{strange[0]}` must be None with {name_of(scheduler)}, whose `set_timesteps` does not take it, "
            f"got {given[strange[0]]!r:.100}"
        )
    clone = pristine(scheduler)
    for name, value in vars(clone).items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            setattr(clone, name, value.cpu())
    if given:
        clone.set_timesteps(**given)
    elif getattr(clone, "num_inference_steps", 0) is None and not getattr(clone, "custom_timesteps", False):
        raise ValueError(
            "`num_inference_steps`, `timesteps` or `sigmas` must be given where the scheduler's are not set, "
            f"got none for {name_of(scheduler)}"
        )
    return clone


def accepted(scheduler: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` of `step`; ValueError naming one that the scheduler's does not take."""
    known = inspect.signature(type(scheduler).step).parameters
    for name in arguments:
        if name not in known:
            raise ValueError(f"`step_arguments` must be of {name_of(scheduler)}.step, got {name!r}")
    return dict(arguments)


class Drawn(TorchFunctionMode):
    """Replaces what `torch.randn` and `torch.randn_like` draw, on this thread alone: each gives `noise`.
    `dtypes` are those that were asked for, one a draw."""

    def __init__(self, noise: Tensor):
        super().__init__()
        self.noise, self.dtypes = noise, list[torch.dtype]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **kwargs)
        like = args[0].dtype if func is torch.randn_like else torch.get_default_dtype()
        self.dtypes.append(kwargs.get("dtype") or like)
        return self.noise.to(self.dtypes[-1])


class Made(NamedTuple):
    """What one step gave: the next sample, the scheduler's own x0_hat where it tells, the dtypes drawn."""

    sample: Tensor
    x0_hat: Tensor | None
    draws: tuple[torch.dtype, ...]


def make_step(
    scheduler: Any, step: int, sample: Tensor, output: Tensor, noise: Tensor, arguments: Mapping[str, Any]
) -> Made:
    """The scheduler's own step, all its noise being `noise`."""
    with Drawn(noise) as drawn:
        result = scheduler.step(output, scheduler.timesteps[step], sample, **arguments)
    after = result[0] if isinstance(result, tuple) else result.prev_sample
    return Made(after, getattr(result, "pred_original_sample", None), tuple(drawn.dtypes))


def input_scale(scheduler: Any, step: int) -> float:
    """What the network's input is of the sample at this step; to be asked for before each step, as the
    schedulers want it."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64, device="cpu")
    return float(scheduler.scale_model_input(one, scheduler.timesteps[step]))


def quietly(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function` outside whatever autograd, inference and autocast modes its caller runs under: what it makes
    is kept and used under others."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


def in_double(run: Callable[[torch.dtype], Result]) -> Result:
    """`run` in float64; in float32 where the scheduler cannot (UniPC solves in float32)."""
    try:
        return run(torch.float64)
    except RuntimeError:
        return run(torch.float32)
