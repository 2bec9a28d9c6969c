"""The CSVs: rows keyed by method and point, replaced when measured again, and the choice on validation."""

from __future__ import annotations

import csv
import datetime
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from amg.replacing import replacing

GRID, TEST, SECONDS = "mitigations_grid.csv", "mitigations.csv", "mitigations_seconds.csv"
TIE = 1.0  # percentage points of the memorised share
SHARE = "cosine > 0.5 %"
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def put(path: Path, row: Mapping[str, Any], key: Sequence[str]) -> None:
    """Write `row` in the place of the one with the same values of `key`, or at the end; other rows and new
    columns are kept. The file is replaced as a whole, so that a killed run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # two runs may fill one file
    try:
        _put(path, {name: _text(value) for name, value in row.items()}, key)
    finally:
        os.close(folder)


def _put(path: Path, new: Row, key: Sequence[str]) -> None:
    rows = read(path)
    same = [i for i, old in enumerate(rows) if all(old[name] == new[name] for name in key)]
    for i in same[:1]:
        rows[i] = new
    if not same:
        rows.append(new)
    columns = list(dict.fromkeys([*new, *(name for old in rows for name in old)]))
    with replacing(path) as partial, partial.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def point_text(point: Mapping[str, Any]) -> str:
    """A point of a grid as it stands in the CSVs."""
    return json.dumps(dict(point), sort_keys=True)


def chosen(rows: Sequence[Row], method: str) -> dict[str, Any]:
    """The point of `method` with the lowest memorised share on validation (cosine > 0.5); of those within one
    percentage point of it the one with the highest text alignment. ValueError if none was measured."""
    own = [row for row in rows if row["method"] == method]
    if not own:
        raise ValueError(f"`method` must have been tuned, got {method!r}, of which no point was measured")
    least = min(float(row[SHARE]) for row in own)
    ties = [row for row in own if float(row[SHARE]) <= least + TIE]
    point: dict[str, Any] = json.loads(max(ties, key=lambda row: float(row["alignment"]))["options"])
    return point


def provenance() -> dict[str, str]:
    """When, where and with what a row was measured."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root).stdout.strip()
    return {
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "commit": commit,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
