"""Level `final`: a pipeline whose loop nothing guides. What comes out is checked, drawn again by the
pipeline's own call, or withheld."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.ordinary import Ordinary, ordinary_caption
from amg.pipelines.again import Asked
from amg.pipelines.check import check
from amg.pipelines.pictures import put, to_tensor
from amg.promise import memorized_row
from amg.verdict import MemorizedError, Verdict

GIVEN = ("image",)  # arguments that hold pictures of the user's own
LATENT = "latent"


class Held(NamedTuple):
    """What finished pictures are held to."""

    index: Any
    config: AMGConfig
    also: Sequence[Any]
    ordinary: Ordinary

    def check(self, images: Any) -> list[Verdict]:
        return check(images, self.index, self.config, self.also)


class Made:
    """What a pipeline's call gave: pictures in its own output type, what was said of each, and its safety
    checker's flags."""

    def __init__(self, result: Any):
        self.result = result
        images = result[0] if isinstance(result, tuple) else getattr(result, "images", None)
        if images is None or len(images) == 0:
            raise TypeError(
                "`pipe` must give pictures as `.images` to be checked, "
                f"got {type(result).__name__}: nothing of it is handed out"
            )
        self.images, self.flags = images, self._flags(len(images))

    def _flags(self, count: int) -> list[bool | None] | None:
        flags = getattr(self.result, "nsfw_content_detected", None)
        if isinstance(self.result, tuple) and len(self.result) > 1:
            flags = self.result[1]
        if not isinstance(flags, (list, tuple)) or len(flags) != count:
            return None
        return [*flags] if all(flag is None or isinstance(flag, bool) for flag in flags) else None

    def take(self, place: int, other: Made, at: int) -> None:
        """Put picture `at` of another call in the place of one of these."""
        self.images = put(self.images, place, other.images, at)
        if self.flags is not None:
            self.flags[place] = other.flags[at] if other.flags is not None else None

    def blank(self, place: int) -> None:
        self.images = put(self.images, place, torch.zeros_like(to_tensor(self.images)[:1]), 0)

    def handed_out(self, verdicts: list[Verdict]) -> Any:
        """The pipeline's own result, of the pictures that are delivered."""
        if isinstance(self.result, tuple):
            rest = self.result[1:] if self.flags is None else (self.flags, *self.result[2:])
            return (self.images, *rest)
        self.result.images, self.result.amg = self.images, verdicts
        if self.flags is not None:
            self.result.nsfw_content_detected = self.flags
        return self.result


def checked_call(
    pipe: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], held: Held
) -> Any:
    """Run a pipeline's own `call` and hand out what keeps the promise. Errors: ValueError for latents, which
    nobody could check here, TypeError for a result without pictures, `MemorizedError` where it was asked for.
    """
    bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    arguments, unnamed = _named(bound, args, kwargs)
    if arguments.get("output_type") == LATENT:
        raise ValueError(
            '`output_type` must give pictures at level "final", where latents cannot be checked, '
            f"got {LATENT!r}"
        )
    made = Made(call(pipe, *args, **kwargs))
    verdicts = _marked(held, held.check(made.images), arguments)
    bad = [place for place, verdict in enumerate(verdicts) if _withheld(held.config, verdict)]
    if held.config.on_memorized == "raise" and bad:
        raise MemorizedError(verdicts)
    if held.config.on_memorized == "resample" and bad:
        asked = Asked(arguments, len(verdicts), bool(unnamed))
        _draw_again(held, lambda again: Made(call(pipe, *unnamed, **again)), asked, made, verdicts, bad)
    if held.config.on_memorized in ("resample", "block"):
        for place in bad:
            if verdicts[place].memorized:
                made.blank(place)
                verdicts[place] = replace(verdicts[place], blocked=True)
    pipe.amg_verdicts = verdicts
    return made.handed_out(verdicts)


def _named(
    bound: inspect.BoundArguments, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Sequence[Any]]:
    """A call's arguments by name, without how it returns them; and those without one, where not all have
    one."""
    named: dict[str, Any] = {}
    for name, value in [*bound.arguments.items()][1:]:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL and value:
            return {name: value for name, value in kwargs.items() if name != "return_dict"}, args
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
    return {name: value for name, value in named.items() if name != "return_dict"}, ()


def _withheld(config: AMGConfig, verdict: Verdict) -> bool:
    return verdict.memorized and (config.block_input_copies or not verdict.from_input)


def _draw_again(
    held: Held,
    draw: Callable[[dict[str, Any]], Made],
    asked: Asked,
    made: Made,
    verdicts: list[Verdict],
    bad: Sequence[int],
) -> None:
    """Draw the pictures `bad` anew, at most `max_retries` times and while `max_evaluations` allows; from the
    second try on conditioned on an ordinary training image's caption, as a memorised prompt rarely leaves its
    picture by another seed."""
    cost = {place: 1.0 for place in bad}
    for attempt in range(1, held.config.max_retries + 1):
        left = [place for place in bad if verdicts[place].memorized]
        each = 1.0 if asked.by_rows else asked.count / max(len(left), 1)
        limit = math.inf if held.config.max_evaluations is None else held.config.max_evaluations
        left = [place for place in left if cost[place] + each <= limit]
        if not left:
            return
        captions = _captions(held, asked, verdicts, left, attempt) if attempt > 1 else {}
        for place, other, at in _drawn(draw, asked, left, attempt, captions):
            (verdict,) = held.check(other.images[at : at + 1])
            cost[place] += each
            verdicts[place] = replace(verdict, retries=attempt, caption=captions.get(place))
            if not verdict.memorized:
                made.take(place, other, at)


def _drawn(
    draw: Callable[[dict[str, Any]], Made],
    asked: Asked,
    places: Sequence[int],
    attempt: int,
    captions: Mapping[int, str],
) -> list[tuple[int, Made, int]]:
    """(place, a further call's result, where in it that picture is), one by one or all in one call."""
    if asked.by_rows:
        return [(place, draw(asked.alone(place, attempt, captions.get(place))), 0) for place in places]
    whole = draw(asked.whole(attempt, captions))
    if len(whole.images) != asked.count:
        raise RuntimeError(
            f"`pipe` must give {asked.count} pictures again when it is called again, got {len(whole.images)}"
        )
    return [(place, whole, place) for place in places]


def _captions(
    held: Held, asked: Asked, verdicts: Sequence[Verdict], places: Sequence[int], attempt: int
) -> dict[int, str]:
    """The caption of an ordinary training image near the one each picture copies, by its own chance."""
    found = {}
    for place in places:
        row, prompt = memorized_row(verdicts[place]), asked.prompt_of(place)
        if row is None or prompt is None or held.config.rewind_caption != "ordinary":
            continue
        chance = Flight.from_noise(torch.tensor([place, attempt], dtype=torch.float32), prompt)
        caption = ordinary_caption(held.index, held.ordinary, row, prompt, chance.choose)
        if caption is not None:
            found[place] = caption
    return found


def _marked(held: Held, verdicts: list[Verdict], arguments: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts, with those marked whose training image is what the user put in."""
    if not any(verdict.memorized for verdict in verdicts):
        return verdicts
    own = {row for name in GIVEN for row in _rows_of(held, arguments.get(name))}
    return [
        replace(verdict, from_input=verdict.memorized and memorized_row(verdict) in own)
        for verdict in verdicts
    ]


def _rows_of(held: Held, given: Any) -> set[int]:
    """The training images that a user's own pictures are copies of; none of what is no picture."""
    pictures = given if isinstance(given, (list, tuple)) else [given]
    if given is None or not all(hasattr(picture, "convert") for picture in pictures):
        return set()
    found = held.check([picture.convert("RGB") for picture in pictures])
    return {row for verdict in found if (row := memorized_row(verdict)) is not None}
