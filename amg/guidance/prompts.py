"""Prompts of a file or a list, and the bank of ordinary ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path


class Prompts(tuple[str, ...]):
    """A tuple of prompts that is hashed once: configs that hold one are compared at every step."""

    @functools.cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"<{len(self)} prompts>"


def read_prompts(path: Path, option: str = "--prompts") -> list[str]:
    """The prompts of a UTF-8 file: one a line, or JSONL with `caption`; ValueError naming `option` if there
    are none."""
    if not path.is_file():
        raise ValueError(f"`{option}` must be a file of prompts, got {path}, which is none")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{option}` must be a file of text in UTF-8, got {path} ({error})") from error
    lines = text.split("\n")
    prompts = [_caption(line, option, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"`{option}` must hold at least one prompt, got an empty file {path}")
    return prompts


def _caption(line: str, option: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        caption = json.loads(line)["caption"]
        if not isinstance(caption, str):
            raise ValueError(f"`caption` is {caption!r}")
        return caption
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"`{option}` must hold JSON with `caption`, a text, in each such line, got {line[:200]!r} "
            f"in {where}"
        ) from error
