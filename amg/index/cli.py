"""`amg index build | info | verify | guard | search`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from amg.index.add_guard import add_guard
from amg.index.errors import IndexFault
from amg.index.index import Index

EXAMPLES = """examples:
  amg index build photos/ --out photos.amg                        pixels, captions from photos/*.txt
  amg index build photos/ --out photos.amg --size 64 --captions captions.jsonl
  amg index build train.parquet --out laion.amg --embedder sscd:sscd.safetensors --captions text
  amg index info laion.amg
  amg index verify laion.amg
  amg index guard old.amg photos/                                 for an index of an earlier version
  amg index search picture.png --index laion.amg --embedder sscd:sscd.safetensors -k 5
"""
EMBEDDER_HELP = "pixels (default), photos, sscd:PATH or open_clip:MODEL:PATH"


def add_parser(subparsers: Any) -> None:
    """Add `index` to the subparsers of `amg`; each command sets `run(arguments) -> exit code`."""
    parser = subparsers.add_parser(
        "index",
        help="build, inspect and search the index of a training set",
        description="The index of a training set: what delivered images are compared with.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="index_command", required=True, metavar="COMMAND")
    _add_build(commands)
    info = commands.add_parser("info", help="what an index holds; instant at any size")
    info.add_argument("path", metavar="INDEX", help="directory of the index")
    info.add_argument("--json", action="store_true", help="print the whole manifest as JSON")
    info.set_defaults(run=_reporting(run_info))
    verify = commands.add_parser("verify", help="check the sha256 of every file; reads all of them")
    verify.add_argument("path", metavar="INDEX", help="directory of the index")
    verify.set_defaults(run=_reporting(run_verify))
    guard = commands.add_parser(
        "guard",
        help="add the guard that an index of an earlier version lacks",
        description="Add a guard to an index that was built without one, from the pictures it was built of.",
    )
    guard.add_argument("path", metavar="INDEX", help="directory of the index")
    guard.add_argument("images", metavar="IMAGES", help="what it was built of: a folder or Parquet")
    guard.add_argument("--quiet", action="store_true", help="no progress bar")
    guard.set_defaults(run=_reporting(run_guard))
    _add_search(commands)


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="build an index of a folder of images or of Parquet files",
        description="Build an index. Interrupted, the same command resumes; OUT is never half-built.",
    )
    build.add_argument("images", metavar="IMAGES", help="folder of images, Parquet file, or folder of them")
    build.add_argument("--out", required=True, metavar="OUT", help="directory to write; must not exist")
    build.add_argument(
        "--captions",
        metavar="FILE|COLUMN",
        help='JSONL with {"file" | "id" | "index": …, "caption": …} lines, or a Parquet column; '
        "default: name.txt beside name.png",
    )
    build.add_argument("--embedder", default="pixels", metavar="SPEC", help=EMBEDDER_HELP)
    build.add_argument("--size", type=_size, metavar="N|HxW", help="resize images to this size")
    build.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of embedded rows (float16)"
    )
    build.add_argument("--batch-size", type=int, default=64, metavar="N", help="images a batch (default 64)")
    build.add_argument(
        "--near-duplicate",
        type=_near_duplicate,
        default=True,
        metavar="X|off",
        help="fold copies at this cosine (default 0.98) or RMS pixel distance on [0, 1] (default 0.02)",
    )
    build.add_argument("--strict", action="store_true", help="stop at an unreadable image, do not skip it")
    build.add_argument("--no-resume", action="store_true", help="discard what an interrupted build left")
    build.add_argument("--quiet", action="store_true", help="no progress bar")
    build.set_defaults(run=_reporting(run_build))


def _add_search(commands: Any) -> None:
    search = commands.add_parser("search", help="the training images closest to given images")
    search.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    search.add_argument("--index", required=True, metavar="INDEX", help="directory of the index")
    search.add_argument(
        "--embedder", metavar="SPEC", help="as it was built with: photos, sscd:PATH, open_clip:MODEL:PATH"
    )
    search.add_argument("-k", type=int, default=1, metavar="K", help="neighbours per image (default 1)")
    search.add_argument(
        "--searcher",
        default="exact",
        metavar="NAME",
        help='"exact" (default) or "faiss:FACTORY[;nprobe=N]", such as faiss:IVF256,Flat;nprobe=16',
    )
    search.add_argument("--json", action="store_true", help="one JSON object a line")
    search.set_defaults(run=_reporting(run_search))


def _size(text: str) -> int | tuple[int, int]:
    try:
        extents = [int(part) for part in text.lower().split("x")]
    except ValueError:
        extents = []
    if len(extents) not in (1, 2) or min(extents, default=0) < 1:
        raise argparse.ArgumentTypeError(f"must be N or HxW, got {text!r}")
    return extents[0] if len(extents) == 1 else (extents[0], extents[1])


def _near_duplicate(text: str) -> float | bool:
    if text == "off":
        return False
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number or "off", got {text!r}') from None


def _reporting(action: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """The action as a command: 0, or one line on stderr and 2."""

    def command(arguments: argparse.Namespace) -> int:
        try:
            action(arguments)
        except (IndexFault, ValueError, TypeError, OSError, ImportError) as error:
            print(f"amg index: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0

    return command


def _load_embedder(spec: str | None) -> Any:
    if spec in (None, "pixels"):
        return None
    from amg.embed import load

    return load(spec)


def run_build(arguments: argparse.Namespace) -> None:
    """amg index build."""
    index = Index.build(
        arguments.images,
        arguments.captions,
        _load_embedder(arguments.embedder),
        arguments.out,
        size=arguments.size,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        near_duplicate=arguments.near_duplicate,
        progress=not arguments.quiet,
        resume=not arguments.no_resume,
        on_error="raise" if arguments.strict else "skip",
    )
    print_info(index)


def run_info(arguments: argparse.Namespace) -> None:
    """amg index info."""
    index = Index.open(arguments.path)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(index.manifest), indent=1, sort_keys=True))
    else:
        print_info(index)


def run_verify(arguments: argparse.Namespace) -> None:
    """amg index verify."""
    index = Index.open(arguments.path)
    index.verify()
    total = sum(record.size for record in index.manifest.files.values())
    print(f"{index.path}: {len(index.manifest.files)} files, {total:,} bytes, every sha256 as it should be")


def run_guard(arguments: argparse.Namespace) -> None:
    """amg index guard."""
    add_guard(arguments.path, arguments.images, progress=not arguments.quiet)
    print_info(Index.open(arguments.path))


def run_search(arguments: argparse.Namespace) -> None:
    """amg index search."""
    from amg.index.images import UnreadableImage, import_pil

    index = Index.open(arguments.index, _load_embedder(arguments.embedder), searcher=arguments.searcher)
    for name in arguments.images:
        try:
            with import_pil().open(name) as picture:
                hits = index.search([picture], arguments.k)
        except UnreadableImage as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        for rank, (similarity, row) in enumerate(
            zip(hits.similarity.flatten().tolist(), hits.row.flatten().tolist(), strict=True), start=1
        ):
            print_hit(index, name, rank, similarity, row, as_json=arguments.json)


def print_hit(index: Index, image: str, rank: int, similarity: float, row: int, *, as_json: bool) -> None:
    """One neighbour of one image."""
    hit = {
        "image": image,
        "rank": rank,
        "similarity": round(similarity, 6),
        "row": row,
        "id": index.ids[row],
        "caption": index.captions[row],
        "count": int(index.counts[row]),
        "source": index.sources[row],
    }
    if as_json:
        print(json.dumps(hit, ensure_ascii=False))
        return
    measure = f"cosine {similarity:.4f}" if index.metric == "cosine" else f"nL2 {abs(similarity):.4f}"
    copies = f" ({hit['count']} copies)" if int(index.counts[row]) > 1 else ""
    caption = "" if hit["caption"] is None else f"  {hit['caption']!r}"
    print(f"{image}  {rank}.  {measure}  row {row}  {hit['id']}{copies}{caption}")


def _guard_line(index: Index) -> str:
    if index.guard is None:
        return "none: built by an earlier version, see `amg index guard`"
    return f"{len(index.guard.rows):,} sketches ({index.manifest.guard})"


def print_info(index: Index) -> None:
    """What an index holds, a line each."""
    manifest = index.manifest
    near = "off" if manifest.near_duplicate is None else f"{manifest.near_duplicate:g}"
    lines = {
        "path": index.path,
        "metric": manifest.metric,
        "rows": f"{manifest.count:,} of {manifest.dimension:,} {manifest.dtype}",
        "images": f"{manifest.images:,} ({manifest.images - manifest.count:,} folded as duplicates)",
        "skipped": f"{len(manifest.skipped):,} unreadable",
        "captions": f"{index.captioned:,} of {manifest.count:,} rows",
        "guard": _guard_line(index),
        "embedder": manifest.embedder.name if manifest.embedder else "none (pixels)",
        "embedder sha256": manifest.embedder.sha256 if manifest.embedder else None,
        "preprocessing": manifest.preprocessing,
        "image size": "x".join(map(str, manifest.image_size)) if manifest.image_size else None,
        "near duplicates": near,
        "format version": manifest.version,
        "bytes": f"{sum(record.size for record in manifest.files.values()):,}",
    }
    for name, value in lines.items():
        if value is not None:
            print(f"{name:16} {value}")
    for entry in manifest.skipped[:10]:
        print(f"  skipped {entry.id}: {entry.reason}")
