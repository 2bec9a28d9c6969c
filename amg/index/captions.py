"""Captions for training images: a list, a JSONL file, a Parquet column, or what lies beside the image."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amg.index.errors import IndexBuildError
from amg.index.images import TrainingImage

KEYS = ("index", "id", "file")


@dataclass(frozen=True)
class Captions:
    """Captions by position ("index"), id ("id") or path in the source ("file"); key None: the image's own."""

    key: str | None
    table: dict[Any, str | None]
    identity: str

    def of(self, image: TrainingImage, image_id: str) -> str | None:
        """The caption of an image. Raises IndexBuildError when a given caption set has none for it."""
        if self.key is None:
            return image.caption
        name = {"index": image.position, "id": image_id, "file": image.source}[self.key]
        if name not in self.table:
            raise IndexBuildError(
                f"`captions` do not match `images`: none for {self.key} {name!r} "
                f"({len(self.table)} captions in all)"
            )
        return self.table[name]

    def check_total(self, total: int) -> None:
        """As many captions as images. Raises IndexBuildError."""
        if self.key is not None and len(self.table) != total:
            raise IndexBuildError(
                f"`captions` do not match `images`: {len(self.table)} captions for {total} images"
            )


def caption_column(images: Any, captions: Any) -> str | None:
    """The Parquet column that `captions` names, None where it is a list, a JSONL path or absent."""
    if not isinstance(captions, str) or captions.endswith((".jsonl", ".json")) or Path(captions).is_file():
        return None
    return captions


def read_captions(captions: Any) -> Captions:
    """Captions out of None, a list of str (or None), or a JSONL path. Raises IndexBuildError."""
    if captions is None:
        return Captions(None, {}, "own")
    if isinstance(captions, (str, os.PathLike)):
        return _read_jsonl(Path(captions))
    if not isinstance(captions, Sequence):
        raise IndexBuildError(
            "`captions` must be a list of str, a JSONL path, a Parquet column name or None, "
            f"got {type(captions).__name__}"
        )
    for position, caption in enumerate(captions):
        if caption is not None and not isinstance(caption, str):
            raise IndexBuildError(
                f"`captions`[{position}] must be a str or None, got {type(caption).__name__}"
            )
    digest = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
    return Captions("index", dict(enumerate(captions)), f"list {digest}")


def _read_jsonl(path: Path) -> Captions:
    """Lines {"file" | "id" | "index": …, "caption": …}, the same key in every line."""
    if not path.is_file():
        raise IndexBuildError(f"`captions` is a path that does not exist: {path}")
    table: dict[Any, str | None] = {}
    key, digest = None, hashlib.sha256()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            digest.update(line.encode())
            if not line.strip():
                continue
            found, name, caption = _parse_line(line, f"{path}:{number}")
            if key not in (None, found):
                raise IndexBuildError(
                    f"`captions`: {path}:{number} is keyed by {found!r}, earlier lines by {key!r}"
                )
            if name in table:
                raise IndexBuildError(f"`captions`: {path}:{number} repeats {found} {name!r}")
            key, table[name] = found, caption
    if key is None:
        raise IndexBuildError(f"`captions`: {path} is empty")
    return Captions(key, table, f"jsonl {digest.hexdigest()}")


def _parse_line(line: str, where: str) -> tuple[str, Any, str | None]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise IndexBuildError(f"`captions`: {where} is not valid JSON ({error})") from error
    keys = [key for key in KEYS if isinstance(record, dict) and key in record]
    if len(keys) != 1 or "caption" not in record:
        raise IndexBuildError(f'`captions`: {where} must be {{"file" | "id" | "index": …, "caption": …}}')
    name, caption = record[keys[0]], record["caption"]
    if not isinstance(name, int if keys[0] == "index" else str) or not isinstance(caption, (str, type(None))):
        raise IndexBuildError(
            f"`captions`: {where} has a key or caption of the wrong type: {line.strip()[:80]}"
        )
    return keys[0], name, caption
