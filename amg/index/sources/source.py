"""What every kind of training set gives: images in a fixed order, each with its caption, id and place."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from amg.index.decode import MissingImage, Picture, UnreadableImage, decode_image
from amg.index.notes import Tally
from amg.index.text import Caption

IMAGE_FIELDS = ("image", "img", "images", "png", "jpg", "jpeg", "webp")
CAPTION_FIELDS = ("caption", "text", "captions", "prompt", "txt")
PATH_FIELDS = ("file_name", "file", "path", "image", "filename", "filepath", "file_path", "image_path", "img")


class Decoding(NamedTuple):
    """How pictures are decoded. background: what transparent ones are composited over (None: alpha is
    dropped); least: pixels a side that are enough, formats that can may be decoded at no more than needed
    for it (None: whole)."""

    background: str | None = "white"
    least: int | None = None


class Fields(NamedTuple):
    """Which columns or keys the caller names; None: found by their usual names and types."""

    caption: str | None = None
    image: str | None = None


class Found(NamedTuple):
    """A file: its path in the folder, size in bytes, why it cannot be read where that shows, when it was last
    written to (ns), and whether it is one that other files speak of and that is not there."""

    name: str
    size: int
    fault: str | None = None
    written: int = 0
    missing: bool = False


@dataclass(frozen=True)
class TrainingImage:
    """One image of the training set. load() gives its Picture or raises UnreadableImage; MissingImage for one
    that is known to be missing."""

    position: int
    id: str
    source: str
    caption: Caption
    load: Callable[[], Picture]


class ImageSource(Protocol):
    """Images in a fixed order; length: None when only reading tells; identity: compared on resume.

    identity_tells: whether any change shows in it; else a resumed build compares every image it has seen.
    passed_over: what lies among the images and is none, by reason; complete once they are all read. first():
    the first image, not loaded, to see what it is called; unlike read() it draws nothing from an iterator.
    read(start): the images from position `start` on; what came before costs as little as the kind allows.
    """

    length: int | None
    identity: str
    identity_tells: bool

    @property
    def passed_over(self) -> Tally: ...

    def first(self) -> TrainingImage | None: ...

    def read(self, start: int) -> Iterator[TrainingImage]: ...


def identity_of(kind: str, files: Iterable[Found]) -> str:
    """A digest of the names, sizes and times of files, and of what is known to be wrong with them."""
    digest = hashlib.sha256()
    for at, file in enumerate(files):
        lost = f" {file.fault}" if file.missing else ""
        line = f"{file.name}\0{file.size} {file.written}{lost}"
        digest.update((f"\n{line}" if at else line).encode(errors="surrogatepass"))
    return f"{kind} {digest.hexdigest()}"


def found(path: Path, name: str) -> Found:
    """A file that is there, under a name."""
    info = path.stat()
    return Found(name, info.st_size, None, info.st_mtime_ns)


def loader(path: Path, file: Found, decoding: Decoding) -> Callable[[], Picture]:
    """load() of a picture in a file of its own."""
    if file.fault is not None:
        return functools.partial(lost, file.fault, file.missing)
    return functools.partial(_decode_file, path, decoding)


def lost(fault: str, missing: bool = False) -> NoReturn:
    """load() of a picture that cannot be had."""
    raise (MissingImage if missing else UnreadableImage)(fault)


def _decode_file(path: Path, decoding: Decoding) -> Picture:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    return decode_image(content, path.name, decoding.background, decoding.least)
