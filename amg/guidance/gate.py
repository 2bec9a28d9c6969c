"""Which samples are measured at a step: all at the checks, in between only those already suspected.

A calibration (`amg calibrate`) lets a check skip the samples whose free signals say ordinary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.guidance.combine import COMBINED, features, score
from amg.guidance.flight import Flight
from amg.guidance.signals import SIGNALS, free_signals, raw_signals

FORMAT, VERSION = "amg calibration", 2


@dataclass(frozen=True)
class Key:
    """What a calibration holds for: the last part of the model's name or path, sha256 of its denoiser's
    config, scheduler class, number of timesteps, guidance scale, sha256 of the index's manifest, and the
    promise."""

    model: str
    denoiser_sha256: str
    scheduler: str
    steps: int
    guidance_scale: float
    index_sha256: str
    threshold: float


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

    `alarm`: the step, and the rule, of early rewinds. Without rules and alarm it changes nothing, but has the
    free signals of every step kept in the traces.
    """

    key: Key | None = None
    source: str = ""
    rules: dict[int, Rule] = field(default_factory=dict)
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    deviation: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    alarm: dict[int, Rule] = field(default_factory=dict)

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
            rules, key = _rules(record["gate"]), Key(**record["key"])
            return Gate(key, str(path), rules, region[0], region[1], _rules(alarm))
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

    def ordinary(
        self, rows: Sequence[int], position: int, flights: Sequence[Flight], signals: dict[int, Any]
    ) -> set[int]:
        """Those of `rows` whose free signal at step `position` says ordinary.

        A sample that went back, or runs again, is none that was calibrated: it is never among them.
        """
        found = self._scores(self.rules.get(position), rows, position, flights, signals)
        return {row for row, excess in found.items() if excess < 0}

    def alarmed(self, position: int, flights: Sequence[Flight], signals: dict[int, Any]) -> set[int]:
        """The rows on their first try whose free signal at step `position` is the alarm's."""
        found = self._scores(self.alarm.get(position), range(len(flights)), position, flights, signals)
        return {row for row, excess in found.items() if excess > 0}

    def _scores(
        self,
        rule: Rule | None,
        rows: Sequence[int],
        position: int,
        flights: Sequence[Flight],
        signals: dict[int, Any],
    ) -> dict[int, float]:
        """sign·signal − threshold of those of `rows` on their first try."""
        rows = [row for row in rows if not (flights[row].rewinds or flights[row].retries)]
        if rule is None or not rows:
            return {}
        raw = raw_signals([flights[row].trace for row in rows], [signals[row] for row in rows])
        values = free_signals(raw, self.mean, self.deviation)
        if rule.signal == COMBINED:
            found = score(features(values, position), rule.weights)
        else:
            found = values[rule.signal][:, position]
        return dict(zip(rows, (rule.sign * found - rule.threshold).tolist(), strict=True))


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


def rows_to_check(
    config: AMGConfig,
    position: int,
    total: int,
    flights: Sequence[Flight],
    gate: Gate | None = None,
    signals: dict[int, Any] | None = None,
) -> list[int]:
    """The rows whose similarity is measured at step `position` of `total`.

    A sample whose gate was open at its last check is suspected and measured again at every step until it
    closes; with a calibration a check passes over the others whose `signals` (three per row, of this step)
    say ordinary. Skipping only saves work: finished images are always checked.
    """
    checks = steps_of((*(config.check_at or ()), *(config.rewind_at or ())), total)
    due = not config.check_at or position in checks
    rows = [row for row, flight in enumerate(flights) if due or flight.suspected]
    if gate is None or not due:
        return rows
    unsuspected = [row for row in rows if not flights[row].suspected]
    ordinary = gate.ordinary(unsuspected, position, flights, signals or {})
    return [row for row in rows if row not in ordinary]
