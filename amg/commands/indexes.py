"""The indexes that a command line names, each with the embedder that made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_also(parser: Any, purpose: str) -> None:
    """Add `--also` and what made these indexes."""
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="INDEX",
        help=f"another index {purpose}; repeat for several",
    )
    parser.add_argument(
        "--also-embedder",
        action="append",
        default=[],
        metavar="NAME",
        help="what made each --also, in the same order, `pixels` for a pixel index (default: pixels, or "
        "--embedder where that made it)",
    )


def open_index(path: Path, embedder: str | None, device: str, option: str = "--embedder") -> Any:
    """An index with the embedder named on the command line, under `option`, attached. ValueError naming
    that option where it is no embedder, or not the one that made the index."""
    from amg.index import Index
    from amg.index.errors import EmbedderMismatch

    index = Index.open(path, device=device)
    made = index.manifest.embedder
    if embedder in (None, "pixels"):
        if made is not None:
            raise ValueError(
                f"`{option}` must name the embedder that made {path} ({made.name}), got {embedder or 'none'}"
            )
        return index
    if made is None:
        raise ValueError(
            f"`{option}` must be pixels, or left out, for the pixel index {path}, got {embedder}"
        )
    try:
        return index.attach(_load(str(embedder), option))
    except EmbedderMismatch as error:
        said = str(error).removeprefix("`embedder` must be the one the index was built with: ")
        raise ValueError(f"`{option}` must be what made {path}: {said}") from error


def _load(embedder: str, option: str) -> Any:
    from amg import embed

    try:
        return embed.load(embedder)
    except ValueError as error:
        raise ValueError(str(error).replace("`spec`", f"`{option}`")) from error


def open_also(arguments: Any) -> list[Any]:
    """The indexes of `--also`, each with its embedder."""
    given: Sequence[str] = arguments.also_embedder
    if given and len(given) != len(arguments.also):
        raise ValueError(
            "`--also-embedder` must be given once per `--also`, or not at all, got "
            f"{len(given)} for {len(arguments.also)}"
        )
    named: Sequence[str | None] = given or [_maker(path, arguments.embedder) for path in arguments.also]
    pairs = zip(arguments.also, named, strict=True)
    return [open_index(path, one, arguments.device, "--also-embedder") for path, one in pairs]


def _maker(path: Path, embedder: str | None) -> str | None:
    """The embedder of the command line where it made this index too."""
    from amg.index.store import read_manifest

    made = read_manifest(path.absolute()).embedder
    if made is None or embedder in (None, "pixels"):
        return None
    return embedder if _load(str(embedder), "--embedder").sha == made.sha256 else None
