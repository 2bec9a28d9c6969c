"""Caption text as people's files hold it, made fit to store; whatever is changed is noted."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from amg.index.errors import IndexBuildError
from amg.index.notes import Note

MOST_BYTES = 1 << 20
NOT_UTF8 = "caption bytes that are not UTF-8, replaced"
HALF_PAIR = "half a surrogate pair in a caption, replaced"
CONTROL = "control characters in a caption, replaced"
SEVERAL = "several captions, the first one that is not empty taken"
OUTSIDE = "caption file is a link out of the folder, not read"
TOO_LARGE = "caption file larger than 1 MB, not read"
NO_FILE = "called like a caption file, but no file, not read"
NOT_READ = "caption file that cannot be read"
_BOMS = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LOW = bytes({*range(0x20)} - {*b"\t\n\r"})
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes of a file's name
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Caption(NamedTuple):
    """A caption and what was done to it; text None: there is none."""

    text: str | None = None
    notes: tuple[Note, ...] = ()


def make_caption(value: Any, where: str) -> Caption:
    """The caption out of a str, bytes, None or a list of them, of which the first that is not empty is taken.

    Bytes are in what encoding_of() tells. Bad bytes and halves of surrogate pairs become U+FFFD, control
    characters except tab and line breaks become spaces; white space alone is no caption. where: what is
    named in the notes and errors. Raises IndexBuildError for anything else.
    """
    if not isinstance(value, (list, tuple)):
        return _clean(value, where)
    captions = [_clean(item, where) for item in value]
    given = [caption for caption in captions if caption.text is not None]
    if len(given) < 2:
        return given[0] if given else Caption()
    return Caption(given[0].text, (*given[0].notes, Note(SEVERAL, where)))


def _clean(value: Any, where: str) -> Caption:
    notes = []
    if isinstance(value, bytes):
        value, whole = decode_text(value)
        notes += [] if whole else [Note(NOT_UTF8, where)]
    if value is None:
        return Caption()
    if not isinstance(value, str):
        raise IndexBuildError(
            f"{where} must be a str or None (or a list of these, of which the first is taken), "
            f"got {type(value).__name__}"
        )
    for pattern, replacement, what in ((_SURROGATE, "\ufffd", HALF_PAIR), (_CONTROL, " ", CONTROL)):
        value, replaced = pattern.subn(replacement, value)
        notes += [Note(what, where)] if replaced else []
    return Caption(value, tuple(notes)) if value.strip() else Caption()


def decode_text(content: bytes) -> tuple[str, bool]:
    """Text in the encoding that encoding_of() tells, without its BOM; False where bad bytes were replaced."""
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
        whole = True
    except UnicodeDecodeError:
        text, whole = content.decode(encoding, errors="replace"), False
    return text.removeprefix("\ufeff"), whole


def encoding_of(content: bytes) -> str:
    """UTF-8; UTF-16 or UTF-32 where a BOM says so or the control bytes leave no doubt.

    UTF-8 text holds hardly any, while alphabets in UTF-16 without a BOM have one in most of their pairs, on
    the same side of each: the higher byte, 0 for ASCII, 4 for Cyrillic. UTF-32 has zero bytes in every group
    of four. content: the beginning is enough.
    """
    for bom, encoding in _BOMS:
        if content.startswith(bom):
            return encoding
    whole = content[: len(content) // 4 * 4]
    if whole and not any(whole[3::4]) and max(whole[2::4]) <= 0x10 and any(whole[0::4]):
        return "utf-32-le"
    if whole and not any(whole[0::4]) and max(whole[1::4]) <= 0x10 and any(whole[3::4]):
        return "utf-32-be"
    pairs = len(content) // 2
    first, second = (pairs - len(content[at : 2 * pairs : 2].translate(None, _LOW)) for at in (0, 1))
    if 2 * second > pairs and 4 * first <= second:
        return "utf-16-le"
    if 2 * first > pairs and 4 * second <= first:
        return "utf-16-be"
    return "utf-8"


def plain_name(name: str | bytes) -> str:
    """A file name that can be stored: bytes that are not UTF-8, and halves of surrogate pairs, become
    U+FFFD."""
    if isinstance(name, str):
        if name.isascii():
            return name
        name = os.fsencode(_NO_BYTE.sub("\ufffd", name))
    return name.decode("utf-8", errors="replace")


def read_sidecar(text: Path, root: Path, name: str) -> Caption:
    """The caption in a file beside an image of the folder `root`; what cannot be read is noted under `name`.

    A link is followed only to where it stays in the folder or in the directory it lies in (a class folder
    may itself be a link); a file of more than 1 MB is not read.
    """
    try:
        if not text.is_file():
            return Caption(notes=(Note(NO_FILE, name),))
        if text.is_symlink() and not _within(text, root, text.parent):
            return Caption(notes=(Note(OUTSIDE, name),))
        with open(text, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError:
        return Caption(notes=(Note(NOT_READ, name),))
    if len(content) > MOST_BYTES:
        return Caption(notes=(Note(TOO_LARGE, name),))
    caption = make_caption(content, name)
    return caption._replace(text=None if caption.text is None else caption.text.strip())


def _within(file: Path, *folders: Path) -> bool:
    target = os.path.realpath(file)
    return any(os.path.commonpath([target, top]) == top for top in map(os.path.realpath, folders))
