"""Pictures as PNG, each distinct one kept once."""

from __future__ import annotations

import base64
import io

import numpy as np

from amg.extras import needed
from amg.report.content import Picture


class PictureStore:
    """PNG data URIs by number; a picture seen before gets the number it had."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self._numbers: dict[tuple[tuple[int, ...], bytes], int] = {}

    def add(self, picture: Picture) -> int:
        """Number of the picture. uint8 [H, W], [H, W, 1], [H, W, 3] or a PIL image; ValueError otherwise."""
        array = _array(picture)
        key = (array.shape, array.tobytes())
        if key not in self._numbers:
            self._numbers[key] = len(self.uris)
            self.uris.append("data:image/png;base64," + base64.b64encode(_png(array)).decode("ascii"))
        return self._numbers[key]


def _array(picture: Picture) -> np.ndarray:
    if hasattr(picture, "convert"):
        picture = picture.convert("RGB")
    array = np.asarray(picture)
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3))
    ):
        raise ValueError(
            f"`picture` must be uint8 [H, W, 3] or a PIL image, got {array.dtype} {list(array.shape)}"
        )
    if array.ndim == 3 and (array.shape[2] == 1 or (array == array[:, :, :1]).all()):
        array = array[:, :, 0]
    return np.ascontiguousarray(array)


def _png(array: np.ndarray) -> bytes:
    Image = needed("PIL.Image", "the report", "report")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
