"""At which level every kind of diffusers pipeline is protected, tried on tiny ones with random weights.

python benchmarks/bench_pipelines.py                # benchmarks/results/pipelines.csv

Of each: the level that its verdicts name; the largest difference of a picture where no gate opens from the
plain pipeline's; that of a picture alone from the same one in its batch, guided at every step and sent back;
and, with the plain pipeline's own pictures planted in the index once each, how many come out over the
threshold without a mark, how many are delivered after all, and what they cost in rows of the network.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from protocol import RESULTS, ROOT
from torch import Tensor

import amg

sys.path.insert(0, str(ROOT))
from tests import pipelines_tiny

STEPS = 6
LIMITS = ("threshold", "lambda_min", "lambda_max", "rewind_threshold")
CLOSED: dict[str, Any] = {**dict.fromkeys(LIMITS, -0.3), "guard_threshold": None}
OPEN: dict[str, Any] = {
    **dict.fromkeys(LIMITS, -3.0),
    "threshold": -1.0,
    "rewind_threshold": -2.99,
    "guard_threshold": None,
    "terms_from": 0.0,
    "check_at": (),
    "rewind_at": (0.5,),
    "max_rewinds": 1,
    "on_memorized": "flag",
    "max_evaluations": None,
}


def drawn(pipe: Any, call: dict[str, Any], seeds: list[int]) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(**call, generator=generators, output_type="np" if "batch_size" in call else "pt")


def counting(forward: Any, rows: list[int]) -> Any:
    """A network's forward that notes how many rows each call gives, samples that went back included."""

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        rows.append(len(found[0]))
        return found

    return counted


def pictures(result: Any) -> Tensor:
    images = torch.as_tensor(result.images).float()
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[-1] == 3 else images


def index_of(planted: Tensor, folder: str) -> Any:
    noise = torch.rand(60, *planted.shape[1:], generator=torch.Generator().manual_seed(0))
    path = Path(folder) / "index.amg"
    captions = [f"abc {'fghi'[n % 4]} {n}" for n in range(60 + len(planted))]
    return amg.Index.build(
        torch.cat([planted, noise]), captions, None, path, progress=False, near_duplicate=False
    )


def tried(name: str, count: int) -> dict[str, Any]:
    """One pipeline's row."""
    pipe, call = pipelines_tiny.build(name, steps=STEPS)
    seeds = [[2 * n + 1, 2 * n + 2] for n in range(count // 2)]
    calls: list[int] = []
    network = getattr(pipe, "transformer", None) or pipe.unet
    network.forward = counting(network.forward, calls)
    plain = [pictures(drawn(pipe, call, pair)) for pair in seeds]
    cost = sum(calls)
    with tempfile.TemporaryDirectory() as folder:
        protect(pipe, index_of(plain[0][:0], folder), CLOSED)
        closed = drawn(pipe, call, seeds[0])
        level = closed.amg[0].level
        apart = float((pictures(closed) - plain[0]).abs().max())
        protect(pipe, pipe._amg_protection.index, OPEN)
        together = drawn(pipe, call, seeds[0])
        alone = torch.cat(
            [pictures(drawn(pipe, pipelines_tiny.cut(call, row), [seeds[0][row]])) for row in (0, 1)]
        )
        moved = float((alone - pictures(together)).abs().max())
    with tempfile.TemporaryDirectory() as folder:
        protect(pipe, index_of(torch.cat(plain).clamp(0, 1), folder), CLOSED)
        calls.clear()
        verdicts = [verdict for pair in seeds for verdict in drawn(pipe, call, pair).amg]
    return {
        "pipeline": f"`{type(pipe).__name__}`{NOTES.get(name, '')}",
        "level": level,
        "goes back inside its loop": "yes" if together.amg[0].rewinds else "no",
        "gates closed, from plain": f"{apart:.0e}" if apart else "0",
        "alone, from in a batch": f"{moved:.0e}",
        "planted": len(verdicts),
        "unmarked copies": sum(
            verdict.similarity > verdict.threshold and not verdict.memorized for verdict in verdicts
        ),
        "delivered": sum(not verdict.blocked for verdict in verdicts),
        "network rows over plain": f"{sum(calls) / cost:.1f}",
    }


NOTES = {
    "sd_lora": ", LoRA",
    "sd_ip_adapter": ", two IP-Adapters",
    "sd_inpaint": ", 4 channels",
    "sd_inpaint_9": ", 9 channels",
    "sdxl_refiner": ", refiner",
    "flux": ", distilled",
    "flux_cfg": ", true CFG",
}


def protect(pipe: Any, index: Any, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        amg.protect(pipe, index, amg.AMGConfig.preset("main", **options))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16, help="planted pictures of each pipeline")
    parser.add_argument("--only", nargs="*", default=[*pipelines_tiny.FAMILIES])
    parser.add_argument("--csv", type=Path, default=RESULTS / "pipelines.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name in options.only:
        rows.append(tried(name, options.images))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
