"""A run of a sample on paper: the scheduler's table with what the config asks of each of its steps."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import in_double, make_step, quietly, started
from amg.engine.frame import COLUMN
from amg.engine.table import Setting, StepTable, Tables
from amg.guidance.checkpoint import guided_steps, is_check, restart
from amg.guidance.gate import Gate
from amg.guidance.schedule import LEAST_ALPHA_BAR, Step, threshold_at

SNAP = 1e-12  # of 1: what float64 leaves of a difference that is 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of one table under one config and guidance scale.

    coefficients float32 [N, 42] of `amg.kernels.guided_step`, all gates closed; t [N]; steps: what the host
    knows of each; halves: whether classifier-free guidance, where there is any, acts in each; attended:
    whether the host looks at each; after [N, 2]: alpha and sigma that its scheduler noises a picture with
    after each, None: none is.
    """

    table: StepTable
    config: AMGConfig
    scale: float
    coefficients: Tensor
    t: Tensor
    steps: tuple[Step, ...]
    attended: tuple[bool, ...]
    halves: tuple[bool, ...]
    after: Tensor | None = None

    @property
    def start(self) -> int:
        """The whole run's step that the table's first row is."""
        return self.table.start

    @property
    def total(self) -> int:
        """Steps of a whole run."""
        return self.start + len(self.steps)

    @functools.cached_property
    def events(self) -> tuple[int, ...]:
        """The rows where the host has something to do: it looks, the unconditional half comes or goes, and
        the last one."""
        rows = range(len(self.steps))
        turns = [row for row in rows[1:] if self.halves[row] != self.halves[row - 1]]
        return tuple(sorted({*(row for row in rows if self.attended[row]), *turns, rows[-1]}))

    @functools.cached_property
    def scaled(self) -> bool:
        """Whether the network's input is another than x_t."""
        return bool((self.table.input_scale != 1).any())

    @functools.cached_property
    def size(self) -> float:
        """How large x_t is where it starts."""
        return math.hypot(float(self.table.alpha[0]), float(self.table.sigma[0]))


@dataclass(frozen=True, eq=False)
class Course:
    """How a request is run: its scheduler with timesteps set, and its guidance scale. Plans are kept.

    first: the step that its runs begin with, later tries too, which begin with the picture that was put in;
    None: the first of all, and a sample that is sent back goes to an early one. keeps: whether that picture
    is kept outside a mask, noised as its samples are.
    """

    setting: Setting
    tables: Tables
    scale: float
    gate: Gate | None
    device: torch.device
    first: int | None = None
    keeps: bool = False

    @functools.cached_property
    def _plans(self) -> dict[tuple[AMGConfig, int], Plan]:
        return {}

    @property
    def noise_scale(self) -> float:
        """How large a whole run's first sample is."""
        return noise_scale(self.setting.scheduler)

    def plan(self, config: AMGConfig, start: int | None = None) -> Plan:
        """The plan of a run under `config` that starts at step `start`, None: where runs begin. Errors:
        `Refused`."""
        start = (self.first or 0) if start is None else start
        key = (config, start)
        if key not in self._plans:
            table = self.tables.table(self.setting, start)
            plan = planned(table, config, self.scale, self.gate, self.device)
            if self.keeps:
                plan = replace(plan, after=noised_after(self.setting, start).to(self.device))
            self._plans[key] = plan
        return self._plans[key]

    def again(self, config: AMGConfig, total: int) -> Plan:
        """The plan of a sample that was sent back: from the last step up to `rewind_to` where a fresh
        scheduler can start."""
        if self.first is not None:
            return self.plan(config)
        return self.plan(config, self.tables.latest(self.setting, restart(config, total)))


@quietly
def noised_after(setting: Setting, start: int) -> Tensor:
    """float32 [N, 2]: what a scheduler that starts at step `start` makes of a picture and of noise after each
    step (`add_noise`); after the last, the picture as it is."""
    return in_double(functools.partial(_noised_after, setting, start)).float()


def _noised_after(setting: Setting, start: int, dtype: torch.dtype) -> Tensor:
    running, rows = started(setting.scheduler, start), []
    steps = running.timesteps
    nothing, one = torch.zeros(2, 1, 1, 1, 1, dtype=dtype, device="cpu").unbind(0)
    one = one + 1
    for step in range(start, len(steps) - 1):
        make_step(running, step, nothing, nothing, nothing, setting.step_arguments)
        t = steps[step + 1 : step + 2]
        pairs = ((one, nothing), (nothing, one))
        rows.append([float(running.add_noise(picture, noise, t)) for picture, noise in pairs])
    return torch.tensor([*rows, [1.0, 0.0]], dtype=torch.float64, device="cpu")


def noise_scale(scheduler: Any) -> float:
    """How large a run's first sample is: flow-matching schedulers, which do not say so, start from 1."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def planned(
    table: StepTable, config: AMGConfig, scale: float, gate: Gate | None, device: torch.device
) -> Plan:
    """The plan of a table under a config."""
    total = table.start + len(table)
    steps = tuple(_step(table, config, row, total) for row in range(len(table)))
    checks = [config.active and is_check(config, step.position, total) for step in steps]
    alarms = [gate is not None and step.position in gate.alarm for step in steps]
    heard = [
        alarm or (gate is not None and check and step.position in gate.rules)
        for step, check, alarm in zip(steps, checks, alarms, strict=True)
    ]
    halves = tuple(_in_interval(config, step) or read for step, read in zip(steps, heard, strict=True))
    coefficients = coefficient_rows(table, scale)
    return Plan(
        table=table,
        config=config,
        scale=scale,
        coefficients=coefficients.to(device),
        t=table.t.to(device),
        steps=steps,
        attended=tuple(check or alarm for check, alarm in zip(checks, alarms, strict=True)),
        halves=halves,
    )


def _step(table: StepTable, config: AMGConfig, row: int, total: int) -> Step:
    """The step's place and numbers."""
    alpha, sigma, t = float(table.alpha[row]), float(table.sigma[row]), float(table.t[row])
    alpha_bar = max(alpha**2 / (alpha**2 + sigma**2), LEAST_ALPHA_BAR)
    return Step(table.start + row, total, t, alpha_bar, lambda_of(config, alpha_bar, t))


def lambda_of(config: AMGConfig, alpha_bar: float, t: float) -> float:
    """lambda_t of a config that is resolved for its index's metric."""
    assert config.lambda_min is not None and config.lambda_max is not None
    limits, decay = (config.lambda_min, config.lambda_max), config.threshold_decay or 0.005
    return threshold_at(config.threshold_schedule, *limits, alpha_bar, t, decay)


def _in_interval(config: AMGConfig, step: Step) -> bool:
    return step.position in guided_steps(config, step.total)


def coefficient_rows(table: StepTable, scale: float) -> Tensor:
    """float32 [N, 42], the columns of `amg.kernels.STEP_COEFFICIENTS`, all gates closed."""
    rows = torch.zeros(len(table), len(COLUMN), dtype=torch.float64, device="cpu")
    size = (table.alpha**2 + table.sigma**2).sqrt()
    floor = math.sqrt(LEAST_ALPHA_BAR)
    a = torch.where(table.a.isfinite(), table.a, 1 / floor)
    b = torch.where(table.b.isfinite(), table.b, -math.sqrt(1 - LEAST_ALPHA_BAR) / floor)
    e_sample = (1 - table.alpha * a) / table.sigma
    columns = {
        "k_sample": table.d[:, 0],
        "k_eps": table.d[:, 1],
        "k_clipped": table.d[:, 2],
        "k_noise": table.d[:, 3],
        "sqrt_one_minus_alpha_bar": table.sigma / size,
        "inv_sqrt_alpha_bar": (size / table.alpha).clamp(max=1 / floor),
        "s0": torch.full_like(size, scale),
        "a": a,
        "b": b,
        "clip": torch.full_like(size, math.inf if table.clip is None else table.clip),
        "e_sample": torch.where(e_sample.abs() < SNAP, 0.0, e_sample),
        "e_output": torch.where(table.alpha > 0, -table.alpha * b / table.sigma, 1.0),
        "scale": table.input_scale,
        "next_scale": torch.cat([table.input_scale[1:], table.input_scale[-1:]]),
    }
    for name, values in columns.items():
        rows[:, COLUMN[name]] = values
    _write_states(rows, table)
    return rows.float()


def _write_states(rows: Tensor, table: StepTable) -> None:
    for i in range(table.states):
        rows[:, COLUMN[f"h{i}"]] = table.h[:, i]
        for j in range(table.states):
            rows[:, COLUMN[f"A{i}{j}"]] = table.A[:, i, j]
        for at, name in enumerate(("sample", "output", "clipped", "noise")):
            rows[:, COLUMN[f"B{i}_{name}"]] = table.B[:, i, at]
