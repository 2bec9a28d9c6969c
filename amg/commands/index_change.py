"""`amg index extend | remove | merge | gc`: an index that changes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amg.index.change import extend, gc, merge, remove
from amg.index.index import Index


def add_changes(commands: Any, reporting: Callable[..., Any]) -> None:
    """Add these to the subparsers of `amg index`."""
    longer = commands.add_parser(
        "extend",
        help="add pictures; the index becomes what a build of all would be",
        description="Add pictures to an index. Interrupted, the same command resumes, and until it is done "
        "the index is what it was. Whoever has it open keeps what it opened.",
    )
    longer.add_argument("path", metavar="INDEX", help="directory of the index")
    longer.add_argument("images", nargs="+", metavar="IMAGES", help="as for build")
    longer.add_argument("--captions", metavar="FILE|COLUMN", help="as for build")
    longer.add_argument("--embedder", metavar="SPEC", help="what the index was built with, if not pixels")
    longer.add_argument("--strict", action="store_true", help="stop at an unreadable image, do not skip it")
    shorter = commands.add_parser(
        "remove",
        help="take pictures out, by id, place or content; nothing of them stays",
        description="Take pictures out of an index: vectors, sketches, captions, names, and the files of "
        "before. A model that still knows them is then not kept from copying them, and coverage falls.",
    )
    shorter.add_argument("path", metavar="INDEX", help="directory of the index")
    shorter.add_argument("--id", action="append", default=[], help="id of a picture; repeat for several")
    shorter.add_argument("--source", action="append", default=[], help="where a picture lay; several")
    shorter.add_argument("--picture", action="append", default=[], help="the picture itself; several")
    shorter.add_argument("--embedder", metavar="SPEC", help="what the index was built with, for --picture")
    shorter.add_argument("--retrained", action="store_true", help="the model is another one, without them")
    joined = commands.add_parser("merge", help="join indexes of one embedder and size")
    joined.add_argument("paths", nargs="+", metavar="INDEX", help="directories of the indexes")
    joined.add_argument("--out", required=True, metavar="OUT", help="directory to write; must not exist")
    joined.add_argument("--prefix", action="store_true", help="put the name of its index before every id")
    for parser in (longer, shorter, joined):
        parser.add_argument("--no-resume", action="store_true", help="discard what an interrupted run left")
        parser.add_argument("--quiet", action="store_true", help="no progress bar")
    swept = commands.add_parser("gc", help="delete files of earlier generations and of changes that stopped")
    swept.add_argument("path", metavar="INDEX", help="directory of the index")
    for parser, run in ((longer, _extend), (shorter, _remove), (joined, _merge), (swept, _gc)):
        parser.set_defaults(run=reporting(run))


def _shown(path: str) -> None:
    from amg.commands.index import print_info

    print_info(Index.open(path))


def _embedder(arguments: argparse.Namespace) -> Any:
    from amg import embed

    return None if arguments.embedder in (None, "pixels") else embed.load(arguments.embedder)


def _extend(arguments: argparse.Namespace) -> None:
    extend(
        arguments.path,
        arguments.images[0] if len(arguments.images) == 1 else arguments.images,
        arguments.captions,
        _embedder(arguments),
        on_error="raise" if arguments.strict else "skip",
        progress=not arguments.quiet,
        resume=not arguments.no_resume,
    )
    _shown(arguments.path)


def _remove(arguments: argparse.Namespace) -> None:
    count = remove(
        arguments.path,
        ids=arguments.id,
        sources=arguments.source,
        pictures=arguments.picture or None,
        embedder=_embedder(arguments),
        retrained=arguments.retrained,
        progress=not arguments.quiet,
        resume=not arguments.no_resume,
    )
    print(f"removed {count} picture{'s' * (count != 1)}")
    _shown(arguments.path)


def _merge(arguments: argparse.Namespace) -> None:
    merge(
        [Path(path) for path in arguments.paths],
        arguments.out,
        prefix=arguments.prefix,
        progress=not arguments.quiet,
        resume=not arguments.no_resume,
    )
    _shown(arguments.out)


def _gc(arguments: argparse.Namespace) -> None:
    gone = gc(arguments.path)
    print("\n".join(f"deleted {name}" for name in gone) or "nothing to delete")
