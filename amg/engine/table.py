"""A scheduler is a table: one row of coefficients a step, read off the scheduler itself.

x' = d·u + h·state, state' = A·state + B·u with u = (x, output, clipped x0_hat, noise). Steps are counted,
never looked up by their timestep, which may repeat. A trajectory that starts later has a table of its own:
the scheduler's, started there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amg.engine.drive import Refused, accepted, in_double, make_step, name_of, quietly, started, timed
from amg.engine.impulses import Responses, responses
from amg.engine.level import level_at, require_plain
from amg.engine.realise import Machine, realise
from amg.engine.restart import deviation, latest

__all__ = ["Refused", "Setting", "StepTable", "Tables", "setting", "tabulate"]

MOST_STATES = 3
REPLAY_TOLERANCE = 1e-5
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-5}
OFF_LINE = 0.5  # a scheduler whose steps do not fit its timesteps strays by less, one of other levels by more


@dataclass(frozen=True, eq=False)
class StepTable:
    """N steps of a scheduler from step `start` on; tensors are float64 on the CPU but for `t`.

    t [N]: the network's timesteps, in the scheduler's dtype. input_scale [N]: the network's input is
    input_scale·x. alpha, sigma [N]: x = alpha·x0 + sigma·eps, as the scheduler keeps x. a, b [N]: x0_hat =
    a·x + b·output. kind: what the network predicts, "epsilon", "v_prediction", "sample" or "flow". draws [N]:
    how many tensors of noise each step draws, 0 or 1 (a drawn one may have the coefficient 0, and its
    generator moves on all the same); noise_dtype: float32 where it is drawn so whatever the output is, None:
    in the output's own dtype. clip: x0_hat is clipped to ± clip before it enters u, None: never. d [N, 4],
    h [N, S], A [N, S, S], B [N, S, 4]: see the module; the state is 0 at `start`, S <= 3.
    """

    scheduler: str
    start: int
    kind: str
    t: Tensor
    input_scale: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    draws: tuple[int, ...]
    noise_dtype: torch.dtype | None
    clip: float | None
    d: Tensor
    h: Tensor
    A: Tensor
    B: Tensor

    def __len__(self) -> int:
        return len(self.t)

    @property
    def states(self) -> int:
        return self.h.shape[1]

    def blank(self, sample: Tensor) -> Tensor:
        """The state at the start, [S, *sample.shape]."""
        return sample.new_zeros(self.states, *sample.shape)

    def x0_hat(self, step: int, sample: Tensor, output: Tensor) -> Tensor:
        """x0_hat of the table's row `step`, unclipped."""
        return float(self.a[step]) * sample + float(self.b[step]) * output

    def advance(
        self, step: int, sample: Tensor, output: Tensor, noise: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The reference: x' and the next state [S, ...] from the table's row `step`; tensors of any shape.
        `noise` is looked at only where the row draws."""
        clipped = torch.zeros_like(sample)
        if self.clip is not None:
            clipped = self.x0_hat(step, sample, output).clamp(-self.clip, self.clip)
        drawn = noise if self.draws[step] and noise is not None else torch.zeros_like(sample)
        inputs = torch.stack([sample, output, clipped, drawn.to(sample.dtype)])
        row = [part[step].to(sample.device, sample.dtype) for part in (self.d, self.h, self.A, self.B)]
        d, h, a, b = row
        after = torch.tensordot(d, inputs, 1) + torch.tensordot(h, state, 1)
        return after, torch.tensordot(a, state, 1) + torch.tensordot(b, inputs, 1)


@quietly
def tabulate(
    scheduler: Any,
    start: int = 0,
    *,
    num_inference_steps: int | None = None,
    timesteps: Any = None,
    sigmas: Any = None,
    step_arguments: Mapping[str, Any] | None = None,
    **set_timesteps_arguments: Any,
) -> StepTable:
    """The table of a scheduler that starts at step `start`.

    scheduler: a diffusers scheduler, or one like it; it is not changed. The next three and
    `set_timesteps_arguments` are its `set_timesteps`'s; without any, its timesteps as they are.
    step_arguments: of its `step`, eta say. Errors: `Refused` for what is no linear machine of at most 3
    states (checked by a replay against the scheduler itself), ValueError naming the argument.
    """
    given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
    ready = timed(scheduler, {**given, **set_timesteps_arguments})
    return _tabulated(ready, start, accepted(scheduler, step_arguments or {}))


@dataclass(frozen=True)
class Setting:
    """A scheduler with its timesteps set and arguments of its `step`: equal where all it holds is."""

    digest: str
    scheduler: Any = field(compare=False)
    step_arguments: dict[str, Any] = field(compare=False)


class Tables:
    """Tables that were made before are not made again: a cache of the `most` last used, kept by its owner.

    Called as `tabulate` is. Two schedulers of one class share a table where all they hold is equal.
    """

    def __init__(self, most: int = 256):
        self.table = functools.lru_cache(most)(_table_of)
        self.latest = functools.lru_cache(most)(_latest_of)

    @quietly
    def __call__(
        self,
        scheduler: Any,
        start: int = 0,
        *,
        step_arguments: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> StepTable:
        return self.table(setting(scheduler, arguments, step_arguments), start)


@quietly
def setting(
    scheduler: Any, arguments: Mapping[str, Any], step_arguments: Mapping[str, Any] | None = None
) -> Setting:
    """A scheduler with its timesteps set by `arguments`, as in `tabulate`; it is not changed."""
    ready, step = timed(scheduler, arguments), accepted(scheduler, step_arguments or {})
    held = hashlib.sha256(f"{type(ready).__module__}.{type(ready).__qualname__}".encode())
    for name, value in sorted({**vars(ready), "step arguments": step}.items()):
        held.update(f"{name}=".encode())
        for part in _content(value):
            held.update(part)
    return Setting(held.hexdigest(), ready, step)


@quietly
def _table_of(setting: Setting, start: int) -> StepTable:
    return _tabulated(setting.scheduler, start, setting.step_arguments)


def _latest_of(setting: Setting, wanted: int) -> int:
    return latest(setting.scheduler, wanted, setting.step_arguments)


def _content(value: Any) -> Iterator[bytes]:
    """All of a value: tensors and arrays in full, which `repr` leaves out."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield f"{name}:".encode()
            yield from _content(one)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} of {len(value)}:".encode()
        for one in value:
            yield from _content(one)
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)} ".encode()
        flat = value.detach().contiguous()
        yield ctypes.string_at(flat.data_ptr(), flat.nbytes)
    elif hasattr(value, "tobytes"):
        yield f"{value.dtype} {list(value.shape)} ".encode()
        yield value.tobytes()
    else:
        yield f"{value!r};".encode()


def _tabulated(scheduler: Any, start: int, arguments: Mapping[str, Any]) -> StepTable:
    count = len(scheduler.timesteps)
    if not 0 <= start < count:
        raise ValueError(f"`start` must be a step, 0 to {count - 1}, got {start}")
    require_plain(scheduler)
    run = functools.partial(_measured, scheduler, start, arguments)
    table, dtype = in_double(run)
    _require_replay(scheduler, table, arguments, dtype)
    return table


def _measured(
    scheduler: Any, start: int, arguments: Mapping[str, Any], dtype: torch.dtype
) -> tuple[StepTable, torch.dtype]:
    found = responses(scheduler, start, arguments, dtype)
    if not bool(found.table.isfinite().all()):
        raise Refused(scheduler, "its steps give values that are not finite")
    if max(len(draws) for draws in found.draws) > 1:
        raise Refused(scheduler, "it draws noise more than once in a step")
    if not found.own_x0_hat and (off := deviation(scheduler, arguments, dtype)) > OFF_LINE:
        raise Refused(scheduler, f"an exact network leaves alpha·x0 + sigma·eps by {off:.2g} of its size")
    machine = _machine(found, TOLERANCE[dtype])
    if machine.states > MOST_STATES:
        raise Refused(scheduler, f"its steps need {machine.states} states, more than {MOST_STATES}")
    return _written(scheduler, start, found, machine), dtype


def _machine(found: Responses, tolerance: float) -> Machine:
    """Realised in units of what the inputs and results are large as, so that one tolerance fits all steps."""
    sizes = found.table.new_tensor([*(level.size for level in found.levels), 1.0])
    given, ones = torch.ones_like(found.table[0]), torch.ones_like(sizes[1:])
    given = torch.stack([sizes[:-1], ones, ones * (found.clip or 1.0), ones], 1)
    machine = realise(found.table * given / sizes[1:, None, None], tolerance, MOST_STATES)
    return machine._replace(
        d=machine.d / given * sizes[1:, None], h=machine.h * sizes[1:, None], B=machine.B / given[:, None]
    )


def _written(scheduler: Any, start: int, found: Responses, machine: Machine) -> StepTable:
    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([*values], dtype=torch.float64, device="cpu")

    levels, drawn = found.levels, {dtype for draws in found.draws for dtype in draws}
    return StepTable(
        scheduler=name_of(scheduler),
        start=start,
        kind=levels[0].kind,
        t=torch.as_tensor(scheduler.timesteps)[start:].clone(),
        input_scale=column(level.scale for level in levels),
        alpha=column(level.alpha for level in levels),
        sigma=column(level.sigma for level in levels),
        a=column(level.x0_hat[0] for level in levels),
        b=column(level.x0_hat[1] for level in levels),
        draws=tuple(len(draws) for draws in found.draws),
        noise_dtype=torch.float32 if drawn == {torch.float32} else None,
        clip=found.clip,
        d=machine.d,
        h=machine.h,
        A=machine.A,
        B=machine.B,
    )


def _require_replay(
    scheduler: Any, table: StepTable, arguments: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Refuse a table which does not do what the scheduler does with a network that is not linear."""
    generator = torch.Generator("cpu").manual_seed(0)
    sample, *noises = torch.randn(
        len(table) + 1, 1, 2, 4, 4, generator=generator, dtype=torch.float64, device="cpu"
    )
    running = started(scheduler, table.start)
    own = (sample * math.hypot(float(table.alpha[0]), float(table.sigma[0]))).to(dtype)
    ours, state, worst = own.double(), table.blank(own.double()), 0.0
    for row, noise in enumerate(noises):
        level, place = level_at(running, table.start + row), table.start + row
        output = torch.tanh(1.5 * level.scale * ours.flip(-1) + math.sin(float(table.t[row])))
        ours, state = table.advance(row, ours, output, noise, state)
        made = make_step(running, place, own, output.to(dtype), noise.to(dtype), arguments)
        own, worst = made.sample, max(worst, _apart(made.sample, ours))
    if not worst <= REPLAY_TOLERANCE:
        raise Refused(scheduler, f"its table strays from it by {worst:.2g} of the sample's size")


def _apart(sample: Tensor, other: Tensor) -> float:
    """The largest difference, of the sample's own size or 1."""
    return float((sample.double() - other).abs().max() / sample.abs().max().clamp(min=1.0))
