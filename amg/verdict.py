"""What is said of a finished image, and of each step that made it."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

METRIC_NAMES = {"cosine": "cosine", "nl2": "nL2"}
SIGNALS = ("squared_gap", "inner_product", "squared_uncond", "squared_move")
"""The free signals of a step: ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩, ‖ε_u‖², and ‖x_{t−1} − x_t‖² (later tries of
`protect` and `AMGScheduler` have no fourth); ε_c and ε_u are the network's outputs with the prompt and
without it, x_t is the sample."""


LEAST_COVERAGE = 0.99  # of which nothing needs to be said


def _percent(share: float) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{math.floor(1000 * share) / 10:g} %"


def similarity_text(metric: str, similarity: float) -> str:
    """Sigma as people know the metric: cosine as it is, nL2 = -sigma; three decimals."""
    value = -similarity if metric == "nl2" else similarity
    return f"{value + 0.0:.3f}"


def threshold_text(metric: str, threshold: float) -> str:
    """The condition under which an image counts as memorised: "nL2 < 1.4" or "cosine > 0.5"."""
    if metric == "nl2":
        return f"nL2 < {-threshold:g}"
    return f"{METRIC_NAMES.get(metric, metric)} > {threshold:g}"


@dataclass(frozen=True)
class TraceStep:
    """One denoising step of one sample.

    `similarity` is sigma_t (cosine, or -nL2) and `threshold` is lambda_t; `similarity` and `neighbour` are
    None where the check was skipped. `terms` names what fired: "despecification", "deduplication",
    "dissimilarity", "rewind". `signals` are what the step knows for free, by name: `named`. `estimated`:
    similarity and neighbour are the student's, which sufficed.
    """

    step: int
    t: float
    similarity: float | None
    threshold: float
    neighbour: int | None
    terms: tuple[str, ...] = ()
    signals: tuple[float, ...] | None = None
    estimated: bool = False

    @property
    def named(self) -> dict[str, float]:
        """The free signals that were kept, by their names in `SIGNALS`; {} where none were."""
        return dict(zip(SIGNALS, self.signals or (), strict=False))

    def __repr__(self) -> str:
        parts = [f"step={self.step}", f"t={self.t:g}"]
        if self.similarity is not None:
            parts += [f"similarity={self.similarity:.4f}", f"neighbour={self.neighbour}"]
        parts.append(f"threshold={self.threshold:.4f}")
        parts += [f"terms={self.terms}"] if self.terms else []
        parts += [f"{name}={value:.4g}" for name, value in self.named.items()]
        parts += ["estimated=True"] if self.estimated else []
        return f"TraceStep({', '.join(parts)})"


@dataclass(frozen=True)
class Neighbour:
    """The nearest training image: its row in the index, its id and its caption."""

    row: int
    id: str
    caption: str | None


@dataclass(frozen=True)
class GuardVerdict:
    """What an index's guard says of one image: `similarity` of its structure, in [-1, 1], to the training
    image most alike, and the `guard_threshold` it was held to; `false_alarm_rate`: of ordinary generations at
    most this share exceeds it, by the calibration it is of; None where it is of none."""

    similarity: float
    threshold: float
    neighbour: Neighbour
    false_alarm_rate: float | None = None

    @property
    def memorized(self) -> bool:
        """Whether the guard calls it a copy."""
        return self.similarity > self.threshold

    @property
    def limit(self) -> str:
        """The threshold for people, with what it was calibrated to: "0.8", "0.742 (false alarms <= 1 %)"."""
        if self.false_alarm_rate is None:
            return f"{self.threshold:g}"
        return f"{self.threshold:.3f} (false alarms <= {100 * self.false_alarm_rate:g} %)"


@dataclass(frozen=True)
class Verdict:
    """The final check of one delivered image.

    `similarity` is the exact similarity to the nearest training image (cosine in [-1, 1], or -nL2) and
    `threshold` the promise; `guard` is what the index's guard says, None where it has none or was not asked;
    `memorized`: `similarity > threshold`, or `guard.memorized`, under this index or any of `also`; or
    `exhausted`: a checkpoint found it too close and `max_evaluations` left nothing to try, so that its
    similarity was only pushed down.
    `rewinds` counts returns to an early step, `retries` whole re-runs, `evaluations` denoiser evaluations of
    one sample (one condition, one step), `blocked` says that a blank image was delivered instead (then
    `similarity` is that of the image withheld). `level`: "full" where the sampling was guided, "final" where
    the finished image alone was checked, whose `evaluations` are not known. `from_input`: the training image
    is one that the caller put in. `caption`: the ordinary prompt, or what was left of its own
    (`rewind_prompt`), that the last try was conditioned on, None where it was not; `optimised`: it was
    conditioned on its prompt's embedding, optimised; `remembered`: so was the first try on a caption, as the
    prompt's samples had gone back before (`prompt_memory`). `coverage`: the share of the training set that
    the index covers, which is what was promised; `verified`: False where it holds imported vectors that were
    compared with no picture; `trust`: "size" where the index was not read against its hashes (`Index.open`).
    """

    metric: str
    similarity: float
    threshold: float
    neighbour: Neighbour
    memorized: bool
    rewinds: int = 0
    retries: int = 0
    blocked: bool = False
    evaluations: int = 0
    trace: tuple[TraceStep, ...] = ()
    also: tuple[Verdict, ...] = ()
    guard: GuardVerdict | None = None
    exhausted: bool = False
    level: str = "full"
    from_input: bool = False
    caption: str | None = None
    remembered: bool = False
    optimised: bool = False
    coverage: float = 1.0
    verified: bool = True
    trust: str = "hashes"

    @property
    def reason(self) -> str | None:
        """What says that the image is memorised, and of which training image; None where nothing does."""
        if self.similarity > self.threshold:
            return f"{self._measured} to {self.neighbour.id!r}"
        if self.guard is not None and self.guard.memorized:
            guard = self.guard
            return f"guard {guard.similarity:.3f} > {guard.limit} to {guard.neighbour.id!r}"
        if self.exhausted:
            return f"too close at a checkpoint, and `max_evaluations` reached, to {self.neighbour.id!r}"
        return next((other.reason for other in self.also if other.reason), None)

    @property
    def _measured(self) -> str:
        """Metric, similarity and which side of the threshold it is on: "nL2 0.900 < 1.4"."""
        distance = self.metric == "nl2"
        close, far = ("<", ">=") if distance else (">", "<=")
        side = close if self.similarity > self.threshold else far
        limit = -self.threshold if distance else self.threshold
        name, value = (
            METRIC_NAMES.get(self.metric, self.metric),
            similarity_text(self.metric, self.similarity),
        )
        return f"{name} {value} {side} {limit:g}"

    def __str__(self) -> str:
        """One line for people: whether it is a copy, why or of what it is nearest, and what became of it."""
        if self.reason is None:
            parts = [f"not memorised: {self._measured}, nearest {self.neighbour.id!r}"]
        else:
            parts = [f"memorised: {self.reason}"]
        parts += ["blocked"] if self.blocked else []
        parts += ["the caller put that picture in"] if self.from_input else []
        for count, one, several in ((self.rewinds, "rewind", "rewinds"), (self.retries, "re-run", "re-runs")):
            parts += [f"{count} {one if count == 1 else several}"] if count else []
        parts += [f"{self.evaluations} evaluations"] if self.evaluations else []
        parts += [f"level {self.level}"] if self.level != "full" else []
        parts += [f"{_percent(self.coverage)} of the training set"] if self.coverage < LEAST_COVERAGE else []
        parts += [] if self.verified else ["vectors not verified"]
        parts += [] if self.trust == "hashes" else ["index not read against its hashes"]
        return plain("; ".join(parts))

    def __repr__(self) -> str:
        """The fields that say something, the trace by its length; nL2 as people write it."""
        parts = [self._measured, f"row {self.neighbour.row} {self.neighbour.id!r}"]
        if self.guard is not None:
            parts.append(f"guard {self.guard.similarity:.3f} of {self.guard.limit}")
        told = ("memorized", "blocked", "rewinds", "retries", "evaluations", "exhausted", "from_input")
        parts += [f"{name}={getattr(self, name)}" for name in told if getattr(self, name)]
        parts += [f"level={self.level!r}"] if self.level != "full" else []
        parts += [f"also {len(self.also)} more"] if self.also else []
        return f"<Verdict: {', '.join([*parts, f'trace of {len(self.trace)} steps'])}>"

    def as_dict(self, trace: bool = True) -> dict[str, Any]:
        """The verdict as plain JSON values; `trace=False` leaves the per-step trace out."""
        kept = self if trace else replace(self, trace=())
        return asdict(kept)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Verdict:
        """The verdict that `as_dict` described. ValueError naming a field that is missing, unknown or of
        another type; those with a default may be missing, as in verdicts of earlier versions."""
        return _record(Verdict, values, "verdict")


def plain(text: str) -> str:
    """Text of somebody else's files on one line, fit for a terminal: what does not print is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


PLAIN: Mapping[Any, tuple[type, ...]] = {float: (float, int), int: (int,), bool: (bool,), str: (str,)}


def _value(kind: Any, value: Any, name: str) -> Any:
    """A value as JSON keeps it as one of `kind`: a class of this module, a tuple, a plain type, or None."""
    if get_origin(kind) is types.UnionType:
        return None if value is None else _value(get_args(kind)[0], value, name)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{name}` must be a list, got {value!r}")
        return tuple(_value(get_args(kind)[0], one, f"{name}[{at}]") for at, one in enumerate(value))
    if is_dataclass(kind):
        return _record(kind, value, name)
    if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{name}` must be {kind.__name__}, got {value!r}")
    return value


def _record(kind: Any, values: Any, name: str) -> Any:
    """An object of JSON as a `kind`, field by field."""
    if not isinstance(values, Mapping):
        raise ValueError(f"`{name}` must be an object of the fields of {kind.__name__}, got {values!r}")
    hints = _hints(kind)
    unknown = [field for field in values if field not in hints]
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
    if unknown or missing:
        wrong = f"no field {unknown[0]!r}" if unknown else f"the field {missing[0]!r}"
        raise ValueError(f"`{name}` must have {wrong}, got {sorted(map(str, values))}")
    return kind(**{field: _value(hints[field], value, f"{name}.{field}") for field, value in values.items()})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


class MemorizedError(RuntimeError):
    """`on_memorized="raise"`: an image broke the promise; `verdicts` are those of the whole batch."""

    def __init__(self, verdicts: list[Verdict]):
        rows = [row for row, verdict in enumerate(verdicts) if verdict.memorized]
        worst = verdicts[rows[0]]
        super().__init__(
            f"{len(rows)} of {len(verdicts)} images are memorised (rows {rows}), first {worst.reason}"
        )
        self.verdicts = verdicts
