"""`amg index import`: an index of vectors that were embedded elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amg.index.imported.verify import LEAST_COSINE
from amg.index.index import Index


def add_import(commands: Any, reporting: Callable[..., Any], near_duplicate: Callable[[str], Any]) -> None:
    """Add `import` to the subparsers of `amg index`."""
    parser = commands.add_parser(
        "import",
        help="build an index of vectors that were embedded elsewhere (clip-retrieval, .npy, Parquet, Arrow)",
        description="Build an index of vectors instead of pictures. Interrupted, the same command resumes. "
        "It has no guard, and counts as not verified until --sample has compared some pictures.",
    )
    parser.add_argument(
        "vectors",
        nargs="+",
        metavar="VECTORS",
        help=".npy files (with metadata_N.parquet beside them), Parquet or Arrow files, or folders of these",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="directory to write; must not exist")
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument(
        "--embedder", metavar="SPEC", help="what made them: photos, sscd:PATH, open_clip:MODEL:PATH"
    )
    made.add_argument("--embedder-name", metavar="NAME", help="its name alone, where it is not at hand")
    parser.add_argument(
        "--embedder-sha256", default="", metavar="HEX", help="of its weights, beside its name"
    )
    parser.add_argument("--captions", metavar="COLUMN", help="column of captions (default: a usual name)")
    parser.add_argument("--id-column", metavar="COLUMN", help="column of ids (default: a usual name)")
    parser.add_argument("--vector-column", metavar="COLUMN", help="column of vectors (default: the only one)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the rows")
    parser.add_argument(
        "--near-duplicate",
        type=near_duplicate,
        default=True,
        metavar="COSINE|off",
        help="fold copies at this cosine (default 0.98)",
    )
    parser.add_argument(
        "--sample", metavar="PICTURES", help="pictures of some rows, to compare; needs --embedder"
    )
    parser.add_argument("--no-resume", action="store_true", help="discard what an interrupted import left")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=reporting(run_import))


def run_import(arguments: argparse.Namespace) -> None:
    """amg index import."""
    from amg import embed
    from amg.commands.index import print_info

    if arguments.sample is not None and arguments.embedder is None:
        raise ValueError("`--sample` needs `--embedder`, which embeds the pictures again, got none")
    if arguments.embedder_sha256 and arguments.embedder_name is None:
        raise ValueError("`--embedder-sha256` goes with `--embedder-name`, got none")
    if arguments.sample is not None and not Path(arguments.sample).exists():  # said before hours of folding
        raise ValueError(f"`--sample` must be pictures, there is nothing at {arguments.sample}")
    made: Any = {"name": arguments.embedder_name, "sha256": arguments.embedder_sha256}
    if arguments.embedder is not None:
        made = embed.load(arguments.embedder)
    index = Index.from_embeddings(
        [Path(path) for path in arguments.vectors],
        arguments.captions,
        made,
        arguments.out,
        dtype=arguments.dtype,
        near_duplicate=arguments.near_duplicate,
        vector_column=arguments.vector_column,
        id_column=arguments.id_column,
        progress=not arguments.quiet,
        resume=not arguments.no_resume,
    )
    if arguments.sample is not None:
        index = index.attach(made).verify_embeddings(arguments.sample, LEAST_COSINE)
    print_info(index)
