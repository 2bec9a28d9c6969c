"""The training set of the CIFAR-10 benchmark: a class-balanced subset of which two images per class repeat.

Read from CIFAR-10's training split as Parquet (columns `img`: struct with `bytes`, and `label`), as usually
released. Everything is drawn from one seed, so training, index and tables see the same pictures.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NULL_CLASS = len(CLASSES)
PER_CLASS = 150
REPEATED = 2  # images of each class that are repeated
COPIES = 75  # how often each of these is
SEED = 20240402
FLAT = 0.2  # standard deviation on [-1, 1] below which nL2 finds any smooth picture "memorised"


@dataclass(frozen=True)
class Subset:
    """Distinct images, uint8 [N, 3, 32, 32], their labels and repetitions, int64 [N], and rows of the
    Parquet, int64 [N]."""

    images: Tensor
    labels: Tensor
    counts: Tensor
    rows: Tensor

    @property
    def distinct(self) -> Tensor:
        """The distinct images, float32 [N, 3, 32, 32] in [0, 1]."""
        return self.images.float() / 255


def read_rows(path: Path, rows: slice) -> tuple[Tensor, Tensor]:
    """Images uint8 [R, 3, 32, 32] and labels int64 [R] of a slice of the Parquet's rows."""
    import pyarrow.parquet
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"`--data` must be CIFAR-10's training split as Parquet, got {path}")
    table = pyarrow.parquet.read_table(path, columns=["img", "label"])
    start, stop, _ = rows.indices(len(table))
    part = table.slice(start, stop - start)
    pictures = [
        np.asarray(Image.open(io.BytesIO(entry["bytes"])).convert("RGB")) for entry in part["img"].to_pylist()
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(part["label"].to_pylist())


def training_subset(path: Path) -> Subset:
    """`PER_CLASS` images of every class that are not flat, from the Parquet's first rows; which of them
    repeat is drawn from `SEED`. Repeated images come first."""
    images, labels = read_rows(path, slice(0, 2 * PER_CLASS * len(CLASSES)))
    vivid = images.float().flatten(1).std(1) / 127.5 >= FLAT
    generator = torch.Generator().manual_seed(SEED)
    first, others = [], []
    for label in range(len(CLASSES)):
        rows = ((labels == label) & vivid).nonzero().flatten()
        if len(rows) < PER_CLASS:
            raise ValueError(
                f"`--data` must have {PER_CLASS} images of class {label} that are not flat in its first "
                f"{len(images)} rows, got {len(rows)}"
            )
        order = rows[:PER_CLASS][torch.randperm(PER_CLASS, generator=generator)]
        first.append(order[:REPEATED])
        others.append(order[REPEATED:])
    repeated, once = torch.cat(first), torch.cat(others)
    rows = torch.cat([repeated, once])
    counts = torch.cat([torch.full_like(repeated, COPIES), torch.ones_like(once)])
    return Subset(images[rows], labels[rows], counts, rows)
