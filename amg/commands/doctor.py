"""`amg doctor`: what would act on a model's pictures under an index, and why not more."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from amg.commands.said import Defaults
from amg.config import PRESETS, AMGConfig
from amg.verdict import plain

EXAMPLE = """example:
  amg doctor my-flux/ --index laion.amg --embedder sscd:sscd.safetensors
"""


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the subparsers of `amg`."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what would act on a model's pictures under an index",
        description="Read a diffusers folder and an index, sample nothing, and say at which level the "
        "pipeline would be protected, why not at a higher one, and what is missing.",
        epilog=EXAMPLE,
        formatter_class=Defaults,
    )
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder, or a bundled model")
    parser.add_argument("--index", type=Path, required=True, help="index of the training set")
    parser.add_argument(
        "--embedder", help="what made it: pixels (default), photos, sscd:FILE, open_clip:MODEL:FILE"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="main", help="whose config")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    from amg.commands.indexes import open_index
    from amg.commands.sample import open_pipeline
    from amg.pipelines.explain import explained

    index = open_index(arguments.index, arguments.embedder, "cpu")
    pipe = open_pipeline(arguments.model, "cpu")
    print(table(explained(pipe, index, AMGConfig.preset(arguments.preset))))
    return 0


def table(rows: list[tuple[str, str]]) -> str:
    """The rows, one a line."""
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {plain(answer)}" for what, answer in rows)
