"""The contact sheet of the CIFAR-10 tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def write_sheet(path: Path, blocks: Sequence[Sequence[Tensor]], size: int = 48, gap: int = 8) -> None:
    """Blocks of lines of pictures, each line float32 [N, 3, H, W] in [0, 1], one column per picture."""
    from PIL import Image

    pitch, columns = size + 2, max(len(line) for block in blocks for line in block)
    height = sum(len(block) for block in blocks) * pitch + gap * (len(blocks) - 1)
    sheet, top = Image.new("RGB", (pitch * columns, height), "white"), 0
    for block in blocks:
        for line in block:
            for column, picture in enumerate((line * 255).round().to(torch.uint8)):
                tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
                sheet.paste(tile.resize((size, size), Image.Resampling.BICUBIC), (column * pitch, top))
            top += pitch
        top += gap
    sheet.quantize(256).save(path, optimize=True)
