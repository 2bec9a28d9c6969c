"""`amg index build | info | verify | guard | search`, and those of index_import.py and index_change.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amg.commands.index_change import add_changes
from amg.commands.index_import import add_import
from amg.commands.said import as_said
from amg.extras import told
from amg.index.add_guard import add_guard
from amg.index.decode import FRAME_FILES, FRAMES
from amg.index.errors import IndexFault
from amg.index.index import Index
from amg.index.store import Manifest
from amg.verdict import plain

EXAMPLES = """examples:
  amg index build photos/ --out photos.amg                        pixels, captions from photos/*.txt
  amg index build photos/ --out photos.amg --size 64 --captions captions.jsonl
  amg index build train.parquet --out laion.amg --embedder sscd:sscd.safetensors --captions text
  amg index build 'shards/{00000..00099}.tar' more/ --out all.amg --embedder sscd:sscd.safetensors
  amg index import clip_embeddings/ --out clip.amg --embedder-name "open_clip ViT-B-32 openai"
  amg index extend laion.amg more.parquet --embedder sscd:sscd.safetensors
  amg index remove laion.amg --id 000017.jpg
  amg index info laion.amg
  amg index verify laion.amg
  amg index guard old.amg photos/                                 for an index of an earlier version
  amg index search picture.png --index laion.amg --embedder sscd:sscd.safetensors -k 5
"""
SKIPPED_NAMED = 10
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
    verify.add_argument(
        "--sample", metavar="PICTURES", help="pictures of some rows, for an index of imported vectors"
    )
    verify.add_argument("--embedder", metavar="SPEC", help="what embeds them again, as for import")
    verify.set_defaults(run=_reporting(run_verify))
    guard = commands.add_parser(
        "guard",
        help="add the guard that an index of an earlier version lacks",
        description="Add a guard to an index that was built without one, from the pictures it was built of.",
    )
    guard.add_argument("path", metavar="INDEX", help="directory of the index")
    guard.add_argument("images", nargs="+", metavar="IMAGES", help="what it was built of, as for build")
    guard.add_argument(
        "--embedder",
        metavar="SPEC",
        help="as the index was built with: compares every picture with its row, and covers folded ones under "
        "the metric too (pixel indexes need none)",
    )
    guard.add_argument("--quiet", action="store_true", help="no progress bar")
    guard.set_defaults(run=_reporting(run_guard))
    add_import(commands, _reporting, _near_duplicate)
    add_changes(commands, _reporting)
    _add_search(commands)


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="build an index of folders of images, tar, Parquet or Arrow files, or lists of paths",
        description="Build an index. Interrupted, the same command resumes; OUT is never half-built. The "
        "last line says what share of the pictures it covers.",
    )
    build.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folder of images, tar, Parquet or Arrow files; one of these; '{000..009}.tar'; a .npy file; or "
        "a JSONL, CSV or text file of paths; several go into one index",
    )
    build.add_argument("--out", required=True, metavar="OUT", help="directory to write; must not exist")
    build.add_argument(
        "--captions",
        metavar="FILE|COLUMN",
        help='JSONL with {"file" | "id" | "index": …, "caption": …} lines, a .json file '
        "{path or id: caption}, or the name of a column or field; of a list of captions the first is taken; "
        "default: name.txt beside name.png, metadata.jsonl, or a column or field caption, text or prompt",
    )
    build.add_argument(
        "--image-column", metavar="NAME", help="column of the pictures, where several could hold them"
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
    build.add_argument(
        "--background",
        default="white",
        metavar="COLOUR",
        help='what transparent pictures are shown over: white (default), black or "#rrggbb"',
    )
    build.add_argument("--strict", action="store_true", help="stop at an unreadable image, do not skip it")
    build.add_argument("--no-resume", action="store_true", help="discard what an interrupted build left")
    build.add_argument("--quiet", action="store_true", help="no progress bar")
    build.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="build by the workers of this Ray cluster (HOST:PORT, auto or local), all of which must have "
        "IMAGES and OUT at the same paths; it always resumes",
    )
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


def _reporting(action: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int]:
    """The action as a command: its exit code or 0; one line on stderr and 2 for an error."""

    def command(arguments: argparse.Namespace) -> int:
        try:
            return action(arguments) or 0
        except (IndexFault, ValueError, TypeError, OSError, ImportError) as error:
            _say("error", as_said(told(error), getattr(arguments, "said_as", {})))
            return 2

    return command


def _say(kind: str, text: str) -> None:
    print(f"amg index: {kind}: {plain(' '.join(text.split()))}", file=sys.stderr)


def _load_embedder(spec: str | None) -> Any:
    if spec in (None, "pixels"):
        return None
    from amg.embed import load

    return load(spec)


def run_build(arguments: argparse.Namespace) -> None:
    """amg index build."""
    images, captions, out = _one_or_all(arguments.images), arguments.captions, arguments.out
    options = {
        "size": arguments.size,
        "dtype": arguments.dtype,
        "batch_size": arguments.batch_size,
        "near_duplicate": arguments.near_duplicate,
        "progress": not arguments.quiet,
        "on_error": "raise" if arguments.strict else "skip",
        "background": arguments.background,
        "image_column": arguments.image_column,
    }
    if arguments.ray is not None:
        from amg.index.ray import build

        if arguments.no_resume:
            raise ValueError("`--no-resume` must not be given with `--ray`: remove OUT.segments instead")
        made = None if arguments.embedder == "pixels" else arguments.embedder
        print_info(build(images, captions, made, out, address=arguments.ray, **options))
        return
    embedder = _load_embedder(arguments.embedder)
    print_info(Index.build(images, captions, embedder, out, resume=not arguments.no_resume, **options))


def _one_or_all(images: list[str]) -> str | list[str]:
    return images[0] if len(images) == 1 else images


def run_info(arguments: argparse.Namespace) -> None:
    """amg index info."""
    index = Index.open(arguments.path)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(index.manifest), indent=1, sort_keys=True))
    else:
        print_info(index)


def run_verify(arguments: argparse.Namespace) -> None:
    """amg index verify."""
    if (arguments.sample is None) != (arguments.embedder is None):
        raise ValueError("`--sample` and `--embedder` go together: the pictures, and what embeds them again")
    index = Index.open(arguments.path)
    index.verify()
    total = sum(record.size for record in index.manifest.files.values())
    print(f"{index.path}: {len(index.manifest.files)} files, {total:,} bytes, every sha256 as it should be")
    if arguments.sample is not None:
        index = index.attach(_load_embedder(arguments.embedder)).verify_embeddings(arguments.sample)
        print(f"{index.path}: {_imported_line(index.manifest)}")


def run_guard(arguments: argparse.Namespace) -> None:
    """amg index guard."""
    embedder = _load_embedder(arguments.embedder)
    add_guard(arguments.path, _one_or_all(arguments.images), embedder, progress=not arguments.quiet)
    print_info(Index.open(arguments.path))


def run_search(arguments: argparse.Namespace) -> int:
    """amg index search: 2 where a file could not be answered, which is named; the others are."""
    index = Index.open(arguments.index, _load_embedder(arguments.embedder), searcher=arguments.searcher)
    if not 1 <= arguments.k <= index.count:
        raise ValueError(f"`k` must be in [1, {index.count}] (rows of the index), got {arguments.k}")
    if index.metric == "cosine" and index.embedder is None:
        record = index.manifest.embedder
        raise ValueError(
            f"`--embedder` must be what built {index.path} ({record.name if record else '?'}), got none"
        )
    answered = [_search_file(index, Path(name), arguments) for name in arguments.images]
    return 0 if all(answered) else 2


def _search_file(index: Index, file: Path, arguments: argparse.Namespace) -> bool:
    """Print the neighbours of one file, or its name and what is wrong with it; False then."""
    from amg.index.decode import decode_image

    try:
        picture = decode_image(file.read_bytes(), file.name, index.manifest.background)
        hits = index.search(picture.pixels[None].to(index.device), arguments.k)
    except (ValueError, OSError) as error:
        _say("error", f"{file} cannot be searched for: {getattr(error, 'strerror', None) or error}")
        return False
    for note in picture.notes:
        _say("note", f"{file}: {note.what}: {note.amount}")
    found = zip(hits.similarity.flatten().tolist(), hits.row.flatten().tolist(), strict=True)
    for rank, (similarity, row) in enumerate(found, start=1):
        print_hit(index, str(file), rank, similarity, row, as_json=arguments.json)
    return True


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
    measure = f"cosine {similarity:.4f}" if index.metric == "cosine" else f"nL2 {-similarity:.4f}"
    copies = f" ({hit['count']} copies)" if int(index.counts[row]) > 1 else ""
    caption = "" if hit["caption"] is None else f"  {hit['caption']!r}"
    print(f"{plain(image)}  {rank}.  {measure}  row {row}  {plain(index.ids[row])}{copies}{caption}")


def _imported_line(manifest: Manifest) -> str | None:
    if manifest.imported is None:
        return None
    pictures, cosine = manifest.imported.pictures, manifest.imported.cosine
    if not pictures:
        return "not verified"
    return f"verified by {pictures:,} picture{'s' * (pictures != 1)}, cosine {cosine:.4f} or more"


def _guard_line(index: Index) -> str:
    if index.manifest.imported is not None:
        return "none: imported vectors, no picture was seen"
    if index.guard is None:
        return "none: built by an earlier version, see `amg index guard`"
    return f"{index.manifest.count + index.manifest.members:,} sketches ({index.manifest.guard})"


def print_info(index: Index) -> None:
    """What an index holds and what it leaves out, a line each; last, what share of the pictures it covers."""
    manifest, covered = index.manifest, index.manifest.covered
    skipped = sum(covered.skipped.values())
    near = "off" if manifest.near_duplicate is None else f"{manifest.near_duplicate:g}"
    lines = {
        "path": index.path,
        "metric": manifest.metric,
        "rows": f"{manifest.count:,} of {manifest.dimension:,} {manifest.dtype}",
        "seen": f"{covered.seen:,} images",
        "images": f"{manifest.images:,} ({manifest.images - manifest.count:,} folded as duplicates)",
        "skipped": f"{skipped:,} unreadable",
        "captions": f"{index.captioned:,} of {manifest.count:,} rows",
        "guard": _guard_line(index),
        "passed over": f"{sum(manifest.passed_over.values()):,} that are no images",
        "embedder": manifest.embedder.name if manifest.embedder else "none (pixels)",
        "embedder sha256": (manifest.embedder.sha256 or "not known") if manifest.embedder else None,
        "imported": _imported_line(manifest),
        "preprocessing": manifest.preprocessing,
        "image size": "x".join(map(str, manifest.image_size)) if manifest.image_size else None,
        "near duplicates": near,
        "format version": manifest.version,
        "generation": manifest.generation or None,
        "bytes": f"{sum(record.size for record in manifest.files.values()):,}",
    }
    for name, value in lines.items():
        if value is not None:
            print(f"{name:16} {value}")
    for line in left_out(manifest):
        print(f"  {plain(line)}")
    shown = f"{covered.indexed:,} indexed, {covered.folded:,} folded, {skipped:,} skipped"
    print(f"{'coverage':16} {_percent(covered.share)} of {covered.seen:,} images: {shown}")


def _percent(share: float) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{math.floor(1000 * share) / 10:g} %"


def left_out(manifest: Manifest) -> list[str]:
    """What is not in the rows, or not as it was: skipped images, what was passed over, notes; by reason."""
    lines = [f"skipped {entry.id}: {entry.reason}" for entry in manifest.skipped[:SKIPPED_NAMED]]
    reasons = Counter(manifest.covered.skipped)
    if reasons.total() > SKIPPED_NAMED:
        lines += [
            f"skipped in all, {reason}: {count:,}" for reason, count in reasons.most_common(SKIPPED_NAMED)
        ]
    notes = dict(manifest.notes)
    frames, files = notes.pop(FRAMES, 0), notes.pop(FRAME_FILES, 0)
    if frames:
        named = _named(manifest, FRAME_FILES, files)
        lines.append(f"note: frames after the first: {frames:,} in {files:,} files, left out{named}")
    for kind, counts in (("passed over", manifest.passed_over), ("note", notes)):
        for what, count in sorted(counts.items()):
            lines.append(f"{kind}: {what}: {count:,}{_named(manifest, what, count)}")
    return lines


def _named(manifest: Manifest, what: str, count: int) -> str:
    names = manifest.examples.get(what, [])
    more = ", …" if count > len(names) else ""
    return f" ({', '.join(names)}{more})" if names else ""
