"""Later tries where no ordinary caption is known: photos-sd, an index without captions, no bank.

python benchmarks/bench_later_tries.py                # 64 of each kind; benchmarks/results/later_tries.csv
python benchmarks/bench_later_tries.py --images 16    # quick
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from pathlib import Path
from typing import Any

from bench_guard import MODEL, bank, counted, memorised, ordinary, without_captions, write
from protocol import RESULTS

from amg.zoo.photos import TrainingSet, training_set

CASES: dict[str, dict[str, Any]] = {
    "none, blocked": {"on_memorized": "block", "rewind_at": ()},
    "same prompt": {},
    "attribution": {"rewind_prompt": "attribution"},
    "embedding": {"rewind_prompt": "embedding"},
    "bank": {},  # for comparison: the ordinary prompts of bench_guard.py
}
NOT_SHOWN = ("most evaluations",)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="memorised prompts, and as many ordinary")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--kinds", nargs="+", choices=("memorised", "ordinary"), default=["memorised", "ordinary"]
    )
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder of the index, built if missing"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / "later_tries.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*has captions for 0 of")
    options.work.mkdir(parents=True, exist_ok=True)
    data = training_set(64)
    index = without_captions(data, options.work / f"{MODEL}-no-captions.amg")
    rows = [
        measure(case, kind, index, data, options.images) for kind in options.kinds for case in options.cases
    ]
    write(options.csv, rows)
    return 0


def measure(case: str, kind: str, index: Any, data: TrainingSet, images: int) -> dict[str, Any]:
    """A case's pictures of one kind of prompts, counted; prints a line."""
    prompts = (memorised if kind == "memorised" else ordinary)(data, images)
    changes = {**CASES[case], **({"ordinary_prompts": bank(data)} if case == "bank" else {})}
    row = {"later tries": case, "prompts": kind, **counted("main", changes, index, prompts, data)}
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def tables(path: Path) -> str:
    """The committed CSV as a Markdown table."""
    from tables import markdown

    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    shown = [name for name in lines[0] if name not in NOT_SHOWN]
    heads = [f"of these {name}" if name.startswith(("copies by", "subject")) else name for name in shown]
    return markdown(heads, [[line[name] or "–" for name in shown] for line in lines])


if __name__ == "__main__":
    sys.exit(main())
