"""What the library says of its arguments, as the command line calls them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any


class Defaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with each option's default, where it has one and its text does not say it; examples as written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        if nothing or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


# arguments of the library by the command line's names for them, where these are others
OTHER_NAMES = {
    "num_inference_steps": "steps",
    "class_labels": "label",
    "ordinary_prompts": "ordinary",
    "source": "file",
    "pipe": "model",
    "path": "out",
    "pictures": "sample",
}
OF_BUILDING = {"captions": "--captions", "embedder": "--embedder"}  # of `amg index build`, in advice


def options_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, str]:
    """The options of the command that was given, as people write them, by their names in `arguments`."""
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            chosen = getattr(arguments, action.dest, None)
            if chosen in action.choices:
                found |= options_of(action.choices[chosen], arguments)
        elif action.option_strings:
            found[action.dest] = max(action.option_strings, key=len)
        else:
            found[action.dest] = str(action.metavar or action.dest)
    return found


def as_said(text: Any, options: Mapping[str, str]) -> str:
    """An error or a warning of the library with the command line's options for its arguments.

    `steps` and `also[1]` become `--steps` and `--also`, `pipe.unet` becomes the unet of `MODEL`, and
    `captions=`, as advice, the option that gives them.
    """

    def named(found: re.Match[str]) -> str:
        name = OTHER_NAMES.get(found[1], found[1])
        option = options.get(name, options.get(found[1]))
        return found[0] if option is None else f"`{option}`{_part(found[2])}"

    def advised(found: re.Match[str]) -> str:
        name = OTHER_NAMES.get(found[1], found[1])
        option = OF_BUILDING.get(name, options.get(name))
        return found[0] if option is None else f"`{option}`"

    said = re.sub(r"`(\w+)(\[\d+\]|\.\w+)?`", named, str(text))
    return re.sub(r"`(\w+)=`", advised, said)


def _part(of: str | None) -> str:
    return f"'s {of[1:]}" if of is not None and of.startswith(".") else ""
