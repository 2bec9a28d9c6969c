"""`amg …`: the command line."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import amg
from amg.commands.indexes import add_also
from amg.commands.said import Defaults, as_said, options_of
from amg.config import PRESETS
from amg.extras import told

SAMPLE_EXAMPLES = """examples:
  amg sample photos-sd --index demo/photos-sd.amg --embedder photos --prompt "a photo of a cat" --out pictures
  amg sample my-checkpoint/ --index training.amg --embedder sscd:sscd_disc_mixup.safetensors \\
      --prompts prompts.txt --preset strong --scheduler dpm++ --steps 25 --out pictures
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on stderr for bad input, 130 when interrupted."""
    parser = make_parser()
    return _ran(parser, parser.parse_args(argv))


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    from amg.commands.audit.cli import add_parser as add_audit
    from amg.commands.bench import add_parser as add_bench
    from amg.commands.calibrate import add_parser as add_calibrate
    from amg.commands.check import add_parser as add_check
    from amg.commands.distill import add_parser as add_distill
    from amg.commands.doctor import add_parser as add_doctor
    from amg.commands.embed import add_parser as add_embedder
    from amg.commands.index import add_parser as add_index

    parser = argparse.ArgumentParser(
        prog="amg", description="Sample from diffusion models without regurgitating training images."
    )
    parser.add_argument("--version", action="version", version=f"amg {amg.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sample(commands)
    add_check(commands)
    add_doctor(commands)
    add_calibrate(commands)
    add_distill(commands)
    add_audit(commands)
    add_bench(commands)
    add_index(commands)
    add_embedder(commands)
    add_demo(commands)
    commands.add_parser("info", help="versions, device and which kernels run").set_defaults(run=_info)
    return parser


def _ran(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    options = arguments.said_as = options_of(parser, arguments)
    try:
        with _warnings_in_a_line(options):
            return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        goes_on = getattr(arguments, "interrupted", "nothing was written that is not whole")
        print(f"\namg {arguments.command}: interrupted; {goes_on}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        print(f"amg {arguments.command}: {as_said(told(error), options)}", file=sys.stderr)
        return 2


@contextmanager
def _warnings_in_a_line(options: Mapping[str, str]) -> Iterator[None]:
    """Warnings as the command line says things, without the place in the code."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"amg: warning: {as_said(message, options)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="sample from a model, guided away from an index and checked against it",
        description="Write a PNG and a line of verdicts.jsonl a picture; the same command goes on.",
        epilog=SAMPLE_EXAMPLES,
        formatter_class=Defaults,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers folder, or a bundled model: photos-ddpm, photos-sd, photos-flow",
    )
    parser.add_argument(
        "--index", type=Path, required=True, help="index of the training set (`amg index build`)"
    )
    parser.add_argument(
        "--embedder", help="what made the index, if not pixels: photos, sscd:FILE, open_clip:MODEL:FILE"
    )
    add_also(parser, "for the final check")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="one prompt")
    what.add_argument("--prompts", type=Path, help="a file with one prompt a line, or JSONL with `caption`")
    what.add_argument(
        "--class", dest="label", type=int, help="class of a class-conditional model (default: none)"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="main", help="how guidance acts")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument(
        "--scheduler",
        help="ddpm, ddim, pndm, euler, euler-a, dpm++ or unipc (default: the model's own scheduler)",
    )
    parser.add_argument("--guidance-scale", type=float, help="s0 (default: 7.5, and 2 for pixel models)")
    parser.add_argument("--images", type=int, default=1, help="images per prompt, or in all without prompts")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="images sampled together; changes nothing else"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; the next have the next seeds"
    )
    parser.add_argument(
        "--on-memorized", choices=("resample", "block", "flag", "raise"), help="what to do with a copy"
    )
    parser.add_argument("--calibration", type=Path, help="file of `amg calibrate` for just such a run")
    parser.add_argument("--student", type=Path, help="file of `amg distill` for this model and embedder")
    parser.add_argument(
        "--ordinary",
        type=Path,
        help="a file of ordinary prompts: what later tries go to where the index knows no caption",
    )
    parser.add_argument(
        "--rewind-prompt",
        choices=("same", "attribution", "embedding"),
        default="same",
        help="what becomes of the prompt in later tries where no ordinary one is known: docs/guard.md",
    )
    parser.add_argument(
        "--guard-false-alarm-rate",
        type=float,
        help="hold pictures to the guard's threshold at this rate, by `--calibration` "
        "(by default the threshold is 0.8)",
    )
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for PNGs and verdicts.jsonl; the same request goes on there, another one is refused",
    )
    parser.set_defaults(run=_sample, interrupted="the same command goes on where it stopped")


def add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="the bundled models, unguided and guided, with a report",
        formatter_class=Defaults,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the report, the indexes and the pictures"
    )
    parser.add_argument("--images", type=int, default=64, help="images per model and column")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--csv", type=Path, help="file to write the tables' rows to, replacing what it held")
    parser.set_defaults(
        run=_demo,
        interrupted="the same command draws anew, on the indexes and the set-up that are there already",
    )


def _sample(arguments: argparse.Namespace) -> int:
    from amg.commands.sample import run

    return run(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from amg.commands.demo import run

    return run(arguments.out, arguments.images, arguments.seed, arguments.steps, arguments.csv)


def _info(arguments: argparse.Namespace) -> int:
    from amg.commands import info

    print(info.info_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
