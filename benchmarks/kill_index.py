"""Kills builds and changes of an index at random moments: every index opens and verifies, nothing is lost.

python benchmarks/kill_index.py --kills 200

A process builds, extends, removes from or merges indexes of small pictures, and is killed (SIGKILL). What
lies there must open, verify and hold the pictures from before or those from after; the same act is killed
again and again until it is done, and then is what it is where nothing is killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from amg.index import Index, gc

PICTURES, FIRST = 400, 250
DONE = {"build": FIRST, "extend": PICTURES, "remove": FIRST - FIRST // 5, "merge": PICTURES}
ACT = """
import sys, numpy, torch
import amg.index.plan
from amg.index import Index, extend, merge, remove
amg.index.plan.SHARD_IMAGES = 16
act, path, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
pictures = torch.from_numpy(numpy.load(path + "/pictures.npy"))
ids = [f"p{number}" for number in range(len(pictures))]
print("go", flush=True)
options = {"progress": False}
if act == "build":
    Index.build(pictures[:first], path=path + "/i", ids=ids[:first], batch_size=16, **options)
elif act == "extend":
    extend(path + "/i", pictures[first:], ids=ids[first:], batch_size=16, **options)
elif act == "remove":
    remove(path + "/i", ids=ids[0:first:5], **options)
else:
    merge([path + "/i", path + "/o"], path + "/m", **options)
"""


def started(act: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that has begun to act."""
    command = [sys.executable, "-W", "ignore", "-c", ACT, act, str(folder), str(FIRST)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert running.stdout is not None
    running.stdout.readline()
    return running


def prepared(act: str, folder: Path, pictures: torch.Tensor) -> None:
    """What the act starts from."""
    np.save(folder / "pictures.npy", pictures.numpy())
    ids = [f"p{number}" for number in range(PICTURES)]
    if act != "build":
        Index.build(pictures[:FIRST], path=folder / "i", ids=ids[:FIRST], progress=False)
    if act == "merge":
        Index.build(pictures[FIRST:], path=folder / "o", ids=ids[FIRST:], progress=False)


def checked(act: str, folder: Path) -> bool:
    """Whether the act is done; AssertionError where what lies there is neither of the two."""
    target = folder / ("m" if act == "merge" else "i")
    if not target.exists():
        assert act in ("build", "merge"), f"{act}: the index is gone"
        return False
    index = Index.open(target)
    index.verify()
    before = None if act in ("build", "merge") else FIRST
    assert index.manifest.images in (before, DONE[act]), f"{act}: {index.manifest.images} pictures"
    return index.manifest.images == DONE[act]


def once(act: str, seconds: float, dice: random.Random, pictures: torch.Tensor) -> tuple[int, torch.Tensor]:
    """One act, killed until it is done -> kills, its rows."""
    with tempfile.TemporaryDirectory() as name:
        folder, kills = Path(name), 0
        prepared(act, folder, pictures)
        while not checked(act, folder):
            running = started(act, folder)
            time.sleep(dice.uniform(0, seconds * (1 + kills / 5)))  # each try may come further
            if running.poll() is None:
                running.send_signal(signal.SIGKILL)
                kills += 1
            running.wait()
        target = folder / ("m" if act == "merge" else "i")
        gc(target)
        index = Index.open(target, verify=True)
        left = {entry.name for entry in target.iterdir()}
        assert not any("partial" in entry for entry in left), left
        return kills, index.rows.clone()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dice = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    pictures = torch.randint(0, 256, (PICTURES, 3, 8, 8), generator=generator, dtype=torch.uint8)
    whole: dict[str, torch.Tensor] = {}
    kills, done = dict.fromkeys(DONE, 0), 0
    while sum(kills.values()) < options.kills:
        act = min(kills, key=lambda name: kills[name])
        found, rows = once(act, 0.6, dice, pictures)
        kills[act] += found
        done += 1
        assert torch.equal(whole.setdefault(act, rows), rows), f"{act}: not what it was the first time"
        print(f"{sum(kills.values())} kills, {done} acts finished: {kills}", flush=True)
    print("every index opened and verified; nothing was lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
