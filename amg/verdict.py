"""What is said of a finished image, and of each step that made it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TraceStep:
    """One denoising step of one sample.

    `similarity` is sigma_t (cosine, or -nL2) and `threshold` is lambda_t; `similarity` and `neighbour` are
    None where the check was skipped. `terms` names what fired: "despecification", "deduplication",
    "dissimilarity", "rewind". `signals` are the free signals of the fused step, in its order. `estimated`:
    similarity and neighbour are the student's, which sufficed. Where a lazy search proved that nothing is
    above the step's thresholds, they are those of the closest of the rows it kept.
    """

    step: int
    t: float
    similarity: float | None
    threshold: float
    neighbour: int | None
    terms: tuple[str, ...] = ()
    signals: tuple[float, ...] | None = None
    estimated: bool = False


@dataclass(frozen=True)
class Neighbour:
    """The nearest training image: its row in the index, its id and its caption."""

    row: int
    id: str
    caption: str | None


@dataclass(frozen=True)
class Verdict:
    """The final check of one delivered image.

    `similarity` is the exact similarity to the nearest training image (cosine in [-1, 1], or -nL2) and
    `threshold` the promise; `memorized` is `similarity > threshold` under this index or any of `also`.
    `rewinds` counts returns to an early step, `retries` whole re-runs, `evaluations` denoiser evaluations of
    one sample (one condition, one step), `blocked` says that a blank image was delivered instead (then
    `similarity` is that of the image withheld).
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

    def as_dict(self, trace: bool = True) -> dict[str, Any]:
        """The verdict as plain JSON values; `trace=False` leaves the per-step trace out."""
        kept = self if trace else replace(self, trace=())
        return asdict(kept)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Verdict:
        """The verdict that `as_dict` described."""
        trace = tuple(
            TraceStep(
                **{
                    **step,
                    "terms": tuple(step["terms"]),
                    "signals": step["signals"] and tuple(step["signals"]),
                }
            )
            for step in values["trace"]
        )
        also = tuple(Verdict.from_dict(other) for other in values["also"])
        return Verdict(
            **{**values, "neighbour": Neighbour(**values["neighbour"]), "trace": trace, "also": also}
        )


class MemorizedError(RuntimeError):
    """`on_memorized="raise"`: an image broke the promise; `verdicts` are those of the whole batch."""

    def __init__(self, verdicts: list[Verdict]):
        rows = [row for row, verdict in enumerate(verdicts) if verdict.memorized]
        worst = max((verdicts[row] for row in rows), key=lambda verdict: verdict.similarity)
        super().__init__(
            f"{len(rows)} of {len(verdicts)} images are memorised (rows {rows}): similarity "
            f"{worst.similarity:.3f} > {worst.threshold} to training image {worst.neighbour.id!r}"
        )
        self.verdicts = verdicts
