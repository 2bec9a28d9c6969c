"""`amg embedder convert IN OUT` and `amg embedder info FILE`."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from amg.commands.said import as_said
from amg.embed.convert import WeightsInfo, convert_sscd, weights_info
from amg.extras import told


def print_info(info: WeightsInfo) -> None:
    for key, value in dataclasses.asdict(info).items():
        print(f"{key:14} {value:,}" if isinstance(value, int) else f"{key:14} {value}")


def run_convert(arguments: argparse.Namespace) -> WeightsInfo:
    return convert_sscd(
        arguments.source,
        arguments.destination,
        allow_torchscript=arguments.allow_torchscript,
        overwrite=arguments.force,
    )


def run_info(arguments: argparse.Namespace) -> WeightsInfo:
    return weights_info(arguments.file)


def reporting(action: Callable[[argparse.Namespace], WeightsInfo]) -> Callable[[argparse.Namespace], int]:
    """The action as a command: its result on stdout and 0, or one line on stderr and 1."""

    def command(arguments: argparse.Namespace) -> int:
        try:
            print_info(action(arguments))
        except (ValueError, OSError, ImportError) as error:
            said = as_said(told(error), getattr(arguments, "said_as", {}))
            print(f"amg embedder: {said}", file=sys.stderr)
            return 1
        return 0

    return command


def add_parser(subparsers: Any) -> None:
    """Add `embedder` to the subparsers of `amg`; the result carries `run(arguments) -> exit status`."""
    parser = subparsers.add_parser("embedder", help="convert and inspect embedder weights")
    commands = parser.add_subparsers(dest="embedder_command", required=True, metavar="COMMAND")
    convert = commands.add_parser("convert", help="official SSCD weights (.torchvision.pt) to safetensors")
    convert.add_argument(
        "source", metavar="IN", help="sscd_disc_mixup.torchvision.pt or another SSCD ResNet-50"
    )
    convert.add_argument("destination", metavar="OUT", help="file to write, *.safetensors")
    convert.add_argument(
        "--allow-torchscript",
        action="store_true",
        help="accept a TorchScript file: loading it runs the code inside",
    )
    convert.add_argument("--force", action="store_true", help="replace OUT if it exists")
    convert.set_defaults(run=reporting(run_convert))
    info = commands.add_parser("info", help="architecture, hashes and preprocessing of a converted file")
    info.add_argument("file", metavar="FILE")
    info.set_defaults(run=reporting(run_info))
