"""The contact sheet of the CIFAR-10 tables: unguided, its nearest training image, main and strong."""

from __future__ import annotations

from pathlib import Path

import torch
from rows import Drawn, Row
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 20  # pictures of a row
ORDER = ("off", "main", "strong")


def keep_pictures(work: Path, row: Row, drawn: Drawn) -> None:
    """Keep a row's first pictures, and which training row each is nearest to, in the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    nearest = torch.tensor([verdict.neighbour.row for verdict in drawn.verdicts[:KEPT]])
    images = (drawn.images[:KEPT] * 255).round().to(torch.uint8).contiguous()
    save_file({"images": images, "nearest": nearest}, _file(work, row.condition, row.name))


def _file(work: Path, condition: str, name: str) -> Path:
    return work / f"pictures-{condition}-{name}.safetensors"


def strips(work: Path, training: Tensor, condition: str) -> list[Tensor]:
    """One uint8 [KEPT, 3, 32, 32] per line: unguided, nearest to it, main, strong."""
    kept = {name: load_file(_file(work, condition, name)) for name in ORDER}
    nearest = training[kept["off"]["nearest"]]
    return [kept["off"]["images"], nearest, kept["main"]["images"], kept["strong"]["images"]]


def write_sheet(path: Path, work: Path, training: Tensor, size: int = 48) -> None:
    """Four lines of unconditional pictures, then four of class-conditional ones; one column per seed.

    training: uint8 [N, 3, 32, 32] in the index's order.
    """
    from PIL import Image

    lines = [line for condition in ("unconditional", "class") for line in strips(work, training, condition)]
    pitch, gap = size + 2, 8
    sheet = Image.new("RGB", (pitch * KEPT, pitch * len(lines) + gap), "white")
    for number, line in enumerate(lines):
        top = number * pitch + (gap if number >= len(lines) // 2 else 0)
        for column, picture in enumerate(line):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
            sheet.paste(tile.resize((size, size), Image.Resampling.BICUBIC), (column * pitch, top))
    sheet.quantize(256).save(path, optimize=True)
