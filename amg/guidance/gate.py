"""A calibration (`amg calibrate`): its rules let a check pass over samples whose free signals say ordinary,
and send back at once those whose signals say copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.guidance.combine import COMBINED, features, score
from amg.guidance.guard_threshold import GuardScores
from amg.guidance.signals import SIGNALS, free_signals

FORMAT, VERSION = "amg calibration", 3


@dataclass(frozen=True)
class Key:
    """What a calibration holds for: the last part of the model's name or path, sha256 of its denoiser's
    config, scheduler class, number of timesteps, guidance scale and interval, sha256 of the index's manifest,
    and the promise."""

    model: str
    denoiser_sha256: str
    scheduler: str
    steps: int
    guidance_scale: float
    index_sha256: str
    threshold: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """At one step a sample with sign·signal < threshold is called ordinary; an alarm's rule calls one with
    sign·signal > threshold a copy. `weights`: of the signal "combined", see `amg.guidance.combine.score`."""

    signal: str
    sign: float
    threshold: float
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Gate:
    """Rules by step, with μ_t and τ_t of ‖x_{t−1} − x_t‖ over ordinary generations, float64 [T − 1].

    `alarm`: the step, and the rule, of early rewinds. `ordinary`: the prompts of its ordinary images.
    `guard`: what the index's guard says of its images, None where that is not known. Without rules and alarm
    it changes nothing, but has the free signals of every step kept in the traces.
    """

    key: Key | None = None
    source: str = ""
    rules: dict[int, Rule] = field(default_factory=dict)
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    deviation: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    alarm: dict[int, Rule] = field(default_factory=dict)
    ordinary: tuple[str, ...] = ()
    guard: GuardScores | None = None

    @staticmethod
    def load(path: str | Path) -> Gate:
        """The gate of a calibration file. Errors: FileNotFoundError, ValueError where it is not one of this
        version."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"`calibration` must be a file of `amg calibrate`, found none at {path}")
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if (record["format"], record["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{record['format']!r} version {record['version']!r}")
            parts = (record["region"][name] for name in ("mean", "deviation"))
            region = [torch.tensor(part, dtype=torch.float64) for part in parts]
            alarm = [] if record["alarm"] is None else [record["alarm"]]
            made_for = {**record["key"], "guidance_interval": tuple(record["key"]["guidance_interval"])}
            rules, key = _rules(record["gate"]), Key(**made_for)
            ordinary = tuple(record.get("ordinary_prompts", ()))
            if not all(isinstance(text, str) for text in ordinary):
                raise ValueError(f"`ordinary_prompts` {ordinary!r:.100}")
            guard = GuardScores.of(record.get("guard"))
            return Gate(key, str(path), rules, region[0], region[1], _rules(alarm), ordinary, guard)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"`calibration` must be a file of `amg calibrate`, {FORMAT} version {VERSION}, "
                f"got {path} ({error!r})"
            ) from error

    def require(self, key: Key) -> None:
        """ValueError naming what differs, unless this calibration was made for `key`."""
        if self.key is None:
            return
        made, asked = asdict(self.key), asdict(key)
        differing = [item.name for item in fields(Key) if made[item.name] != asked[item.name]]
        if differing:
            was = ", ".join(f"{name}={made[name]!r}" for name in differing)
            now = ", ".join(f"{name}={asked[name]!r}" for name in differing)
            raise ValueError(f"`calibration` {self.source} must be for this run's {now}, got one for {was}")

    def excess(self, rule: Rule, position: int, raw: Tensor) -> Tensor:
        """How far each sample is beyond a rule at step `position`, sign·signal − threshold, float64 [N].

        raw [N, >= position + 1, 4]: see `free_signals`; the last of step `position` is not read. Below 0 a
        check's rule calls a sample ordinary, above 0 an alarm's calls it a copy. Both were calibrated on
        samples that neither went back nor run again.
        """
        values = free_signals(raw[:, : position + 1], self.mean.to(raw.device), self.deviation.to(raw.device))
        if rule.signal == COMBINED:
            found = score(features(values, position), rule.weights)
        else:
            found = values[rule.signal][:, position]
        return rule.sign * found - rule.threshold


def _rules(records: Sequence[dict[str, Any]]) -> dict[int, Rule]:
    rules = {
        int(one["step"]): Rule(one["signal"], one["sign"], one["threshold"], tuple(one.get("weights", ())))
        for one in records
    }
    unknown = [rule.signal for rule in rules.values() if rule.signal not in (*SIGNALS, COMBINED)]
    if unknown:
        raise ValueError(f"unknown signal {unknown[0]!r}")
    return rules


def steps_of(fractions: Sequence[float], total: int) -> set[int]:
    """The steps 0..total-1 nearest to fractions of the trajectory."""
    return {round(at * (total - 1)) for at in fractions}
