"""`amg check`: finished pictures, whoever made them, against the index of a training set."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amg.commands.indexes import add_also
from amg.commands.said import Defaults
from amg.config import PRESETS, AMGConfig
from amg.index.store import write_atomically
from amg.verdict import METRIC_NAMES, Verdict, plain, similarity_text

EXAMPLES = """examples:
  amg check out/*.png --index laion.amg --embedder sscd:sscd.safetensors
  amg check out/ --index laion.amg --embedder sscd:sscd.safetensors --json verdicts.jsonl

exit status: 0 where no picture is called memorised, 1 where one is, 2 where one could not be checked
"""


def add_parser(subparsers: Any) -> None:
    """Add `check` to the subparsers of `amg`."""
    parser = subparsers.add_parser(
        "check",
        help="hold finished pictures, whoever made them, to an index",
        description="The final check alone: is any of these pictures a copy of a training image?",
        epilog=EXAMPLES,
        formatter_class=Defaults,
    )
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="files, or folders of them")
    parser.add_argument("--index", type=Path, required=True, help="index of the training set")
    parser.add_argument(
        "--embedder", help="what made it: pixels (default), photos, sscd:FILE, open_clip:MODEL:FILE"
    )
    add_also(parser, "to hold them to")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="main", help="whose thresholds")
    parser.add_argument("--threshold", type=float, help="of the metric, instead of the preset's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a picture, too")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check what the command line names; returns the exit status."""
    from amg.commands.indexes import open_also, open_index
    from amg.report.content import Table
    from amg.report.terminal import table_text

    files = list(_files(arguments.pictures))
    index = open_index(arguments.index, arguments.embedder, arguments.device)
    also = open_also(arguments)
    config = AMGConfig.preset(arguments.preset, threshold=arguments.threshold)
    found = [(file, _checked(file, index, config, also)) for file in files]
    answered = [(file, verdict) for file, verdict in found if verdict is not None]
    if answered:
        columns = ["picture", METRIC_NAMES[index.metric], "guard", "nearest", "memorised"]
        print(table_text(Table(columns, [_row(file, verdict) for file, verdict in answered])))
    if arguments.json is not None:
        lines = (json.dumps({"picture": str(file), **verdict.as_dict()}) for file, verdict in answered)
        write_atomically(arguments.json, "".join(f"{line}\n" for line in lines))
    copies = sum(verdict.memorized for _, verdict in answered)
    unread = len(found) - len(answered)
    print(f"{len(answered)} pictures checked, {copies} called memorised, {unread} unreadable")
    return 2 if unread else int(copies > 0)


def _files(named: Sequence[Path]) -> Iterator[Path]:
    """The files named, and the pictures in the folders named; ValueError for what is neither."""
    from amg.index.decode import IMAGE_SUFFIXES

    for path in named:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"`PICTURE` must be a file or a folder of pictures, got {path} without any")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise ValueError(
                f"`PICTURE` must be a file or a folder of pictures, got {path}, which is neither"
            )


def _checked(file: Path, index: Any, config: AMGConfig, also: Sequence[Any]) -> Verdict | None:
    """The verdict of one file; None, and a line on stderr, where it cannot be read."""
    from amg.index.decode import decode_image
    from amg.pipelines.check import check

    try:
        picture = decode_image(file.read_bytes(), file.name, index.manifest.background)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"amg check: error: {plain(f'{file} cannot be checked: {reason}')}", file=sys.stderr)
        return None
    (verdict,) = check(picture.pixels, index, config, also)
    return verdict


def _row(file: Path, verdict: Verdict) -> list[Any]:
    guard = "–" if verdict.guard is None else f"{verdict.guard.similarity:.3f}"
    nearest = plain(verdict.neighbour.id)
    return [
        plain(str(file)),
        similarity_text(verdict.metric, verdict.similarity),
        guard,
        nearest,
        plain(verdict.reason or "no"),
    ]
