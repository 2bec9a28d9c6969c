"""`amg audit` on the command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amg.commands.audit.plan import DEFAULT_GUIDANCES
from amg.commands.indexes import add_also
from amg.config import PRESETS

DESCRIPTION = """\
Draw the same prompts and seeds unguided and guided, and measure what comes out: the memorised
share by the metric that guided and by judges that guidance never saw, quality, and cost. Writes a
PNG and a JSON per picture, table.json, table.csv, images.parquet (one row per picture and step)
and an HTML report. Interrupt it at any time: the same command goes on where it stopped."""
EXAMPLES = """\
examples:
  amg audit photos-sd --index demo/photos-sd.amg --embedder photos --prompts prompts.jsonl --out audit
  amg audit my-checkpoint/ --index training.amg --embedder sscd:sscd_disc_mixup.safetensors \\
      --prompts sdv1_500_memorized.jsonl --images 4 --guidance off --guidance main --config mine.json \\
      --images-of-index training_images/ --judge clip.amg --judge-embedder open_clip:ViT-B-32:clip.pt \\
      --clip clip-vit-large-patch14/ --fid-network sscd:sscd_disc_mixup.safetensors --out audit
"""


def add_parser(commands: Any) -> None:
    """Add `audit` to the subparsers of `amg`."""
    parser = commands.add_parser(
        "audit",
        help="measure a model's memorisation, unguided and guided, with independent judges",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    drawn = parser.add_argument_group("what is drawn")
    _add_inputs(drawn)
    _add_drawing(drawn)
    _add_guidances(parser.add_argument_group("guidances, one column each"))
    _add_judges(parser.add_argument_group("judges that guidance never sees, and quality"))
    parser.set_defaults(run=_run, interrupted="the same command goes on where it stopped")


def _add_inputs(group: Any) -> None:
    group.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers folder, or a bundled model: photos-ddpm, photos-sd, photos-flow",
    )
    group.add_argument("--index", type=Path, required=True, help="index of the training set, which guides")
    group.add_argument(
        "--embedder",
        metavar="NAME",
        help="what made the index, if not pixels: photos, sscd:FILE, open_clip:MODEL:FILE",
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="one prompt a line, or JSONL with `caption` and optionally `kind`, `index`, `url`; class "
        "numbers for a class-conditional model; may be left out only for a model that takes no prompt",
    )


def _add_drawing(group: Any) -> None:
    group.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=1,
        help="pictures per prompt, or in all without prompts (default: 1)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="picture n has this seed + n under every guidance (default: 0)",
    )
    group.add_argument("--steps", metavar="N", type=int, default=50, help="denoising steps (default: 50)")
    group.add_argument("--scheduler", metavar="NAME", help="as in `amg sample` (default: the model's own)")
    group.add_argument(
        "--guidance-scale",
        metavar="S0",
        type=float,
        help="scale of classifier-free guidance (default: 7.5, and 2 for pixel models)",
    )
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=8,
        help="pictures drawn together; changes times only (default: 8)",
    )
    group.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="folder for everything written; resumes, refuses other settings",
    )


def _add_guidances(group: Any) -> None:
    group.add_argument(
        "--guidance",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a preset: {', '.join(PRESETS)}; repeat for several (default: {', '.join(DEFAULT_GUIDANCES)})",
    )
    group.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.json",
        help="fields of AMGConfig as one JSON object, open ones from its `preset_name` (main); the column is "
        "named after the file; repeat for several",
    )
    add_also(group, "that the final check holds pictures to")


def _add_judges(group: Any) -> None:
    group.add_argument(
        "--images-of-index",
        type=Path,
        metavar="PATH",
        help="the training images, a folder or Parquet, for the structural judge, FID and the report "
        "(default: a pixel index's own rows; those of a bundled model)",
    )
    group.add_argument(
        "--judge",
        type=Path,
        action="append",
        default=[],
        metavar="INDEX",
        help="an index of the training set made by something else than --embedder; repeat for several",
    )
    group.add_argument(
        "--judge-embedder",
        action="append",
        default=[],
        metavar="NAME",
        help="what made each --judge, in the same order; `pixels` for a pixel index",
    )
    group.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="text alignment: a local transformers CLIP model"
    )
    group.add_argument("--open-clip", metavar="MODEL:FILE", help="text alignment: an open_clip model")
    group.add_argument(
        "--fid-network",
        metavar="NAME",
        help="features for FID and KID: photos-judge (default for the bundled models), any embedder that "
        "--embedder takes, or torchscript:FILE, from float [B, 3, H, W] in [0, 1] to [B, D]",
    )
    group.add_argument(
        "--report-pictures",
        type=int,
        default=256,
        metavar="N",
        help="at most as many pictures per guidance on the page, evenly taken (default: 256)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from amg.commands.audit.run import run

    return run(arguments, command_line(sys.argv[1:]))


def command_line(arguments: Sequence[str]) -> str:
    """The command as it was given, quoted for a shell."""
    return shlex.join(["amg", *arguments])
