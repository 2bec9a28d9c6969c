"""The guard's calibrated threshold on photos-sd: what other ordinary prompts and copies make of it.

python benchmarks/bench_guard_threshold.py             # benchmarks/results/guard_threshold.csv
python benchmarks/bench_guard_threshold.py --images 128 --copies 16    # quick
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from bench_guard import BATCH, MODEL, SEED, STEPS, bank, memorised, ordinary, without_captions, write
from protocol import RESULTS

import amg
from amg.commands.demo import GUIDANCE_SCALES, open_pipeline
from amg.guidance.guard_threshold import GuardScores, scores_of
from amg.verdict import Verdict
from amg.zoo.photos import training_set

RATES = (0.05, 0.02, 0.01, None)
PUSHED = {"guard_threshold": 0.99}  # asked, and heard by nobody: copies are pushed under the metric's


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="ordinary ones to calibrate, and as many new")
    parser.add_argument("--copies", type=int, default=64, help="memorised prompts")
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder of the index, built if missing"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "guard_threshold.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*has captions for 0 of")
    options.work.mkdir(parents=True, exist_ok=True)
    data = training_set(64)
    index = without_captions(data, options.work / f"{MODEL}-no-captions.amg")
    others = bank(data)
    new = [others[at % len(others)] for at in range(options.images)]
    copied = memorised(data, options.copies)
    asked = ordinary(data, options.images)
    calibrating = drawn(index, asked, "off", SEED)
    alike = drawn(index, asked, "off", SEED + 30_000)
    apart = drawn(index, new, "off", SEED + 10_000)
    copies = drawn(index, copied, "off", SEED + 20_000)
    pushed = drawn(index, copied, "main", SEED + 20_000, **PUSHED)
    scores = scores_of([*calibrating, *copies], [True] * len(calibrating) + [False] * len(copies))
    assert scores is not None
    drawings = {"same prompts": alike, "other prompts": apart, "copies": copies, "pushed copies": pushed}
    rows = [row_of(rate, scores, drawings) for rate in RATES]
    write(options.csv, rows)
    return 0


def drawn(index: Any, prompts: list[str], preset: str, seed: int, **changes: Any) -> list[Verdict]:
    """Verdicts of a picture of each prompt; delivered whatever they say."""
    options = {"guidance_scale": GUIDANCE_SCALES[MODEL], "on_memorized": "flag", **changes}
    sampler = amg.Sampler(open_pipeline(MODEL), index, amg.AMGConfig.preset(preset, **options))
    verdicts: list[Verdict] = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        noise = [torch.Generator().manual_seed(seed + start + at) for at in range(len(some))]
        verdicts += sampler(some, generator=noise, num_inference_steps=STEPS, progress=False).amg
    return verdicts


def row_of(rate: float | None, scores: GuardScores, drawings: dict[str, list[Verdict]]) -> dict[str, Any]:
    """Percent above a stated rate's threshold, None: above the default, of each drawing's pictures; of
    ordinary prompts, of those that the metric calls no copies. Prints a line."""
    default = amg.AMGConfig().guard_threshold
    assert default is not None
    threshold = default if rate is None else scores.threshold(rate)
    row = {"stated rate": "none" if rate is None else f"{100 * rate:g} %", "threshold": f"{threshold:.3f}"}
    row["calibrated on"] = "–" if rate is None else f"{len(scores.ordinary)} pictures"
    for name, verdicts in drawings.items():
        kept = verdicts if "copies" in name else [one for one in verdicts if one.similarity <= one.threshold]
        row[f"{name}: % of {len(kept)} above"] = f"{share(kept, threshold):.1f}"
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def share(verdicts: list[Verdict], threshold: float) -> float:
    """Percent of the verdicts whose guard is above a threshold."""
    scores = [verdict.guard.similarity for verdict in verdicts if verdict.guard is not None]
    return 100 * sum(score > threshold for score in scores) / len(scores)


def tables(path: Path) -> str:
    """The committed CSV as a Markdown table."""
    from tables import markdown

    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return markdown(list(lines[0]), [[value or "–" for value in line.values()] for line in lines])


if __name__ == "__main__":
    sys.exit(main())
