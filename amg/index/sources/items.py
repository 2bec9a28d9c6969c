"""Datasets in memory: what an iterable, a torch Dataset or a DataLoader yields, as pictures with captions."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amg.index.decode import RASTER_FORMATS, Picture, UnreadableImage, decode_image, import_pil, to_picture
from amg.index.errors import IndexBuildError
from amg.index.notes import Tally
from amg.index.sources.source import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    PATH_FIELDS,
    Decoding,
    Fields,
    Found,
    TrainingImage,
    loader,
    lost,
)
from amg.index.sources.tensor import in_range
from amg.index.text import Caption, make_caption

TAKEN = (
    "PIL images, uint8 or float tensors [3, H, W], uint8 arrays [H, W, 3], encoded bytes, paths, dicts of "
    "one of these (and a caption), or pairs (image, caption or label)"
)
OTHERS = "pictures of an item beside the one that was taken"
KEYS = (*IMAGE_FIELDS, "pixel_values")


class ItemSource:
    """What a dataset yields, item by item; a resumed build draws, compares and drops what it has seen.

    Each item is one picture, or a batch of them (a tensor [B, 3, H, W], as a DataLoader yields). A dataset
    with `__getitem__` and a length is read by number, and an item that it fails to open is skipped.
    """

    identity_tells = False

    def __init__(self, images: Any, decoding: Decoding, fields: Fields):
        self.images, self.decoding, self.fields = images, decoding, fields
        self.by_number = _by_number(images)
        size = len(images) if isinstance(images, Sized) else None
        if size == 0:
            raise IndexBuildError("`images` is empty")
        self.length: int | None = None if hasattr(images, "batch_sampler") else size
        self.identity = f"iterable {self.length}, every image compared"
        self.passed_over = Tally()

    def first(self) -> TrainingImage:
        return TrainingImage(0, "0", "iterable#0", Caption(), functools.partial(lost, "not drawn yet"))

    def read(self, start: int) -> Iterator[TrainingImage]:
        position, self.passed_over = 0, Tally()
        for number, item in enumerate(self._items()):
            if (drawn := _drawn_in(item)) > 1:
                self.passed_over.add(OTHERS, f"iterable#{number}", drawn - 1)
            for value, caption in _pictures(item, number, self.fields):
                if position >= start:
                    yield self._image(position, value, caption)
                position += 1
                del value
            del item

    def _items(self) -> Iterator[Any]:
        if not self.by_number:
            yield from self.images
            return
        for number in range(len(self.images)):
            try:
                item = self.images[number]
            except OSError as error:  # a file behind it is gone or damaged
                yield UnreadableImage(str(error) or type(error).__name__)
                continue
            yield item

    def _image(self, position: int, value: Any, caption: Any) -> TrainingImage:
        where = f"iterable#{position}"
        load = _loader(value, position, self.decoding)
        return TrainingImage(position, str(position), where, make_caption(caption, where), load)


def _by_number(images: Any) -> bool:
    """Whether to read by number what may have no end of its own: a torch Dataset knows its length alone."""
    ordered = hasattr(images, "__getitem__") and isinstance(images, Sized)
    return ordered and not isinstance(images, (list, tuple)) and not hasattr(images, "__iter__")


class Encoded(NamedTuple):
    """A struct {bytes, path}: an encoded picture, and what it was called."""

    content: bytes
    name: str


def _loader(value: Any, position: int, decoding: Decoding) -> Callable[[], Picture]:
    if isinstance(value, UnreadableImage):
        return functools.partial(lost, str(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = Encoded(bytes(value), "")
    if isinstance(value, Encoded):
        return functools.partial(_decode, value, decoding)
    if isinstance(value, (str, os.PathLike)):
        return loader(Path(value), Found(os.fspath(value), 0), decoding)
    if isinstance(value, torch.Tensor):
        return functools.partial(_of_tensor, value, position)
    if hasattr(value, "__array__") and not isinstance(value, import_pil().Image):
        return functools.partial(_of_array, value, position, decoding)
    file = _unread_file(value)
    if file is not None:
        return loader(file, Found(os.fspath(file), 0), decoding)
    return functools.partial(to_picture, value, decoding.background)


def _unread_file(picture: Any) -> Path | None:
    """The file of a PIL image that was opened and not read: to read it there would keep its pixels with the
    caller, who may have a list of thousands."""
    name = getattr(picture, "filename", "")
    fresh = getattr(picture, "tile", None) and not getattr(picture, "decoderconfig", ())
    known = picture.format in RASTER_FORMATS and isinstance(name, str) and os.path.isfile(name)
    return Path(name) if fresh and known and picture.tell() == 0 else None


def _decode(value: Encoded, decoding: Decoding) -> Picture:
    return decode_image(value.content, value.name, decoding.background, decoding.least)


def _of_tensor(value: torch.Tensor, position: int) -> Picture:
    image = value.detach().cpu()
    image = image[None] if image.ndim == 2 else image
    if image.ndim == 3 and image.shape[0] != 3 and image.shape[-1] == 3:
        image = image.permute(2, 0, 1)
    usable = image.dtype == torch.uint8 or image.is_floating_point()
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape or not usable:
        raise IndexBuildError(
            "`images` must yield tensors uint8 [3, H, W] or float [3, H, W] in [0, 1] (or [1, H, W]), "
            f"item {position} is {list(value.shape)} {value.dtype}"
        )
    return Picture(in_range(image.expand(3, -1, -1).contiguous(), f"item {position}"))


def _of_array(value: Any, position: int, decoding: Decoding) -> Picture:
    import numpy as np

    array = np.asarray(value)
    colour = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (3, 4)
    drawn = colour or (array.ndim == 2 and array.dtype in (np.uint8, np.uint16))
    if drawn and 0 not in array.shape:
        return to_picture(import_pil().fromarray(array), decoding.background)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        raise IndexBuildError(
            "`images` must yield arrays uint8 [H, W, 3] or float [H, W, 3] in [0, 1], "
            f"item {position} is {list(array.shape)} {array.dtype}"
        )
    return _of_tensor(torch.from_numpy(np.ascontiguousarray(array)), position)


def _drawn_in(item: Any) -> int:
    """How many PIL images an item has: masks, control images, other views."""
    values = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else ()
    return sum(isinstance(value, import_pil().Image) for value in values)


def _pictures(item: Any, number: int, fields: Fields) -> Iterator[tuple[Any, Any]]:
    """The pictures of one item, with the captions that come with them."""
    value, caption = _split(item, number, fields)
    batched = getattr(value, "ndim", 0) == 4 and hasattr(value, "shape")
    several = isinstance(value, (list, tuple)) and not isinstance(value, Encoded)
    if not batched and several and value and all(map(_is_picture, value)):
        batched = True
    if not batched:
        yield value, caption
        return
    captions = caption if isinstance(caption, (list, tuple)) and len(caption) == len(value) else None
    for at in range(len(value)):
        yield value[at], caption if captions is None else captions[at]


def _split(item: Any, number: int, fields: Fields) -> tuple[Any, Any]:
    """One item as its picture and what it has of a caption (None: nothing)."""
    if isinstance(item, UnreadableImage):
        return item, None
    if isinstance(item, Mapping):
        return _of_mapping(item, number, fields)
    if fields.caption is not None:
        raise IndexBuildError(
            f"`captions` names a Parquet column or a key ({fields.caption!r}), but `images` yields no dicts: "
            f"item {number} is a {type(item).__name__}"
        )
    if isinstance(item, (list, tuple)) and item:
        return _of_sequence(item, number)
    if not _is_picture(item):
        raise _unlike(item, number)
    return item, None


def _of_sequence(item: Sequence, number: int) -> tuple[Any, Any]:
    """A pair or longer: its first picture, and the first text (or texts, or dict with one) beside that."""
    drawn = [at for at, value in enumerate(item) if _is_drawn(_encoded(value))]
    first = drawn[0] if drawn else 0
    value = _encoded(item[first])
    if value is None:
        raise _unlike(item, number)
    for rest in (*item[:first], *item[first + 1 :]):
        caption = _caption_among(rest, None) if isinstance(rest, Mapping) else _caption(rest)
        if caption is not None:
            return value, caption
    return value, None


def _unlike(item: Any, number: int) -> IndexBuildError:
    return IndexBuildError(
        f"`images` must yield {TAKEN}; item {number} is a {type(item).__name__}"
        + (f" with keys {', '.join(map(str, list(item)[:8]))}" if isinstance(item, Mapping) else "")
    )


def _of_mapping(item: Mapping, number: int, fields: Fields) -> tuple[Any, Any]:
    named = {str(key).lower(): key for key in item}
    if fields.image is not None:
        if fields.image not in item:
            raise _unlike(item, number)
        keys = [fields.image]
    else:
        keys = [named[name] for name in KEYS if name in named and _encoded(item[named[name]]) is not None]
        keys = keys or [key for key in item if _is_drawn(_encoded(item[key]))]
        keys = keys or [named[name] for name in PATH_FIELDS if isinstance(item.get(named.get(name)), str)]
        keys = keys or [named[name] for name in KEYS if name in named and _is_empty(item[named[name]])]
    if not keys:
        raise _unlike(item, number)
    if fields.caption is not None and fields.caption not in item:
        raise IndexBuildError(
            f"`captions` names {fields.caption!r}; item {number} of `images` has {', '.join(map(str, item))}"
        )
    value = _encoded(item[keys[0]])
    return UnreadableImage("no image in this item") if value is None else value, _caption_among(
        item, fields.caption
    )


def _caption_among(item: Mapping, field: str | None) -> Any:
    if field is not None:
        value = item[field]
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    named = {str(key).lower(): key for key in item}
    for name in CAPTION_FIELDS:
        caption = _caption(item[named[name]]) if name in named else None
        if caption is not None:
            return caption
    inner = item[named["json"]] if "json" in named else None
    return _caption_among(inner, None) if isinstance(inner, Mapping) else None


def _caption(value: Any) -> Any:
    """A caption where it is one: text, or a list of texts; labels are none."""
    if isinstance(value, (str, bytes)):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, (str, bytes)) for text in value):
        return value
    return None


def _encoded(value: Any) -> Any:
    """What is drawn or decoded of a value: the bytes or the path of a struct {bytes, path}, or itself."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        return Encoded(content, str(path or "")) if content else path
    return value if _is_picture(value) or _is_batch(value) else None


def _is_empty(value: Any) -> bool:
    """Whether a picture could be where there is none: nothing, or a struct {bytes, path} of nothing."""
    return value is None or (isinstance(value, Mapping) and bool(value.keys() & {"bytes", "path"}))


def _is_batch(value: Any) -> bool:
    several = isinstance(value, (list, tuple)) and bool(value)
    return several and all(_is_picture(one) and not isinstance(one, (str, os.PathLike)) for one in value)


def _is_drawn(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, os.PathLike))


def _is_picture(value: Any) -> bool:
    """A PIL image, a tensor or array of two dimensions or more, encoded bytes, a path, or what failed."""
    if isinstance(value, (bytes, bytearray, memoryview, str, os.PathLike, UnreadableImage)):
        return True
    if isinstance(value, import_pil().Image):
        return True
    return (isinstance(value, torch.Tensor) or hasattr(value, "__array__")) and getattr(value, "ndim", 0) >= 2
