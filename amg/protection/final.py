"""A pipeline's own call, whose pictures are checked, drawn again by that call, or withheld: the promise at
every level where the loop is not ours. Nothing guides it at level "final"; at "step" and "full" each call is
watched (`amg.protection.watch`)."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from amg.config import AMGConfig
from amg.engine.arguments import images_of, require_generator
from amg.guidance.flight import Flight
from amg.guidance.ordinary import Ordinary, ordinary_caption
from amg.pipelines.again import Asked
from amg.pipelines.check import check, rows_of
from amg.pipelines.pictures import pictures_of, put, to_tensor
from amg.pipelines.safety import flagged_pictures_kept_right
from amg.promise import check as promised
from amg.promise import memorized_row, strong
from amg.protection.tries import Stopped, Try
from amg.protection.watch import Watch, Watched, watching
from amg.verdict import MemorizedError, Verdict

GIVEN = ("image",)  # arguments that hold pictures of the user's own
LATENT = "latent"


class Held(NamedTuple):
    """What finished pictures are held to, and how calls are watched, None: not at all."""

    index: Any
    config: AMGConfig
    also: Sequence[Any]
    ordinary: Ordinary
    watched: Watched | None = None

    def check(self, images: Any) -> list[Verdict]:
        return check(images, self.index, self.config, self.also)

    def rows_of(self, given: Any) -> frozenset[int]:
        return rows_of(given, self.index, self.config, self.also)

    def verdicts(self, made: Made) -> list[Verdict]:
        """Verdicts on what a call made, with what happened to its samples; looked at once."""
        if made.verdicts is None:
            made.verdicts = self._verdicts(made)
        return made.verdicts

    def _verdicts(self, made: Made) -> list[Verdict]:
        if len(made.flights) != len(made.images):
            return self.check(made.pictures)
        pictures = to_tensor(made.pictures)
        found = promised(pictures, self.index, self.also, self.config, made.flights)
        return [replace(verdict, level=made.level) for verdict in found]


class Made:
    """What a pipeline's call gave: pictures in its own output type, what was said of each, and its safety
    checker's flags. `flights`: of its samples, where they were watched."""

    def __init__(self, result: Any, watch: Watch | None = None):
        self.result = result
        self.verdicts: list[Verdict] | None = None  # of these pictures, once they were looked at
        images = pictures_of(result)
        self.images, self.flags = images, self._flags(len(images))
        self.pictures, self.level, self.flights, self.plain = images, "final", list[Flight](), 0
        if watch is not None:
            watch.confirm(images)
            watch.tell()
            self.pictures = watch.pictures(images)
            self.level, self.flights = watch.level, watch.flights[: len(images)]
            self.plain = watch.plain

    def spread(self, count: int) -> Made:
        """`count` places for pictures, in the manner of these."""
        places = copy.copy(self)
        if len(self.images) != count:
            one = self.images[:1]
            places.images = [*one] * count if isinstance(one, list) else _repeat(one, count)
            places.flags = None if self.flags is None else self.flags[:1] * count
        return places

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
        nothing = torch.zeros_like(to_tensor(self.images)[:1])
        self.images = put(self.images, place, nothing, 0)

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
    """Run a pipeline's own `call` and hand out what keeps the promise. Errors: ValueError for latents that
    nobody could check here, TypeError for a result without pictures, `MemorizedError` where it was asked for.
    """
    bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    arguments, unnamed = _named(bound, args, kwargs)
    if arguments.get("output_type") == LATENT and held.watched is None:
        raise ValueError(
            '`output_type` must give pictures at level "final", where latents cannot be checked, '
            f"got {LATENT!r}"
        )
    require_generator(arguments.get("generator"), images_of(arguments))
    own = {row for name in GIVEN for row in held.rows_of(arguments.get(name))}
    if own and held.watched is not None and not held.config.block_input_copies:
        # what the user put in is nothing to push away from
        held = held._replace(watched=replace(held.watched, guides=False))
    draw = _Draw(pipe, call, held, args, kwargs, unnamed)
    asked = Asked(arguments, 0, bool(unnamed))
    made, verdicts, plain = _first(draw, held, asked)
    asked = replace(asked, count=len(verdicts))
    verdicts = [_from_input(verdict, own) for verdict in verdicts]
    bad = [place for place, verdict in enumerate(verdicts) if _withheld(held.config, verdict)]
    if held.config.on_memorized == "raise" and bad:
        raise MemorizedError(verdicts)
    if held.config.on_memorized == "resample" and bad:
        made = _draw_again(held, draw, asked, made, verdicts, bad, plain)
    assert made is not None
    if held.config.on_memorized in ("resample", "block"):
        for place in bad:
            if verdicts[place].memorized:
                made.blank(place)
                verdicts[place] = replace(verdicts[place], blocked=True)
    vars(pipe)["amg_verdicts"] = verdicts  # diffusers' own way asks for a config, which not all have
    return made.handed_out(verdicts)


class _Draw(NamedTuple):
    """One more call of the pipeline; the first one exactly as it was asked for."""

    pipe: Any
    call: Callable[..., Any]
    held: Held
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    unnamed: Sequence[Any]

    def __call__(self, one: Try) -> Made:
        """Raises `Stopped` where it may and no sample of it is wanted."""
        args, kwargs = (self.unnamed, one.arguments) if one.attempt else (self.args, self.kwargs)
        run, watched = functools.partial(self.call, self.pipe, *args, **kwargs), self.held.watched
        if watched is None:
            return Made(run())
        watch = Watch(watched, one, strong(self.held.config) if one.attempt else self.held.config)
        with watching(watch), flagged_pictures_kept_right(self.pipe):
            result = run()
        return Made(result, watch)


def _first(draw: _Draw, held: Held, asked: Asked) -> tuple[Made | None, list[Verdict], int]:
    """The call as it was asked for: its pictures, None where none of them was finished, their verdicts, and
    the evaluations of one, 0 where they are not counted."""
    config = held.config
    again = config.on_memorized == "resample" and config.max_retries > 0
    again = again and (config.max_evaluations is None or config.max_evaluations >= 2)
    try:
        counted = again and asked.expected is not None
        made = draw(
            Try(asked.arguments, asked.texts, may_leave=again, may_stop=counted, count=asked.expected)
        )
    except Stopped as stopped:
        return None, stopped.verdicts(held.index, config), stopped.plain
    return made, held.verdicts(made), made.plain


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
    draw: _Draw,
    asked: Asked,
    made: Made | None,
    verdicts: list[Verdict],
    bad: Sequence[int],
    plain: int,
) -> Made | None:
    """Draw the pictures `bad` anew, at most `max_retries` times and while `max_evaluations` allows; from the
    second try on conditioned on an ordinary training image's caption, as a memorised prompt rarely leaves its
    picture by another seed. Returns the pictures: those of `made`, None: there are none yet, with the new
    ones in their places."""
    cost = {place: _cost(verdicts[place], 0.0, plain) for place in bad}
    limit = math.inf if held.config.max_evaluations is None else held.config.max_evaluations
    for attempt in range(1, held.config.max_retries + 1):
        left = [place for place in bad if verdicts[place].memorized]
        each = 1.0 if asked.by_rows else asked.count / max(len(left), 1)
        left = [place for place in left if cost[place] + each <= limit]
        if not left:
            break
        more = attempt < held.config.max_retries and max(cost[place] for place in left) + 2 * each <= limit
        captions = _captions(held, asked, verdicts, left, attempt) if attempt > 1 else {}
        spent = {place: verdicts[place].evaluations for place in left}
        for place, other, at in _drawn(draw, asked, left, attempt, captions, spent, more):
            found = (
                other.verdicts(held.index, held.config)
                if isinstance(other, Stopped)
                else held.verdicts(other)
            )
            verdict = replace(found[at], retries=attempt, caption=captions.get(place))
            cost[place] = _cost(verdict, cost[place], other.plain)
            verdicts[place] = verdict
            if isinstance(other, Made):
                made = made or other.spread(asked.count)
                if not verdict.memorized:
                    made.take(place, other, at)
    return made


def _cost(verdict: Verdict, before: float, plain: int) -> float:
    """What a picture has cost, in whole pictures: by its evaluations where these are counted."""
    return verdict.evaluations / plain if plain else before + 1


def _drawn(
    draw: _Draw,
    asked: Asked,
    places: Sequence[int],
    attempt: int,
    captions: Mapping[int, str],
    spent: Mapping[int, int],
    more: bool,
) -> Iterator[tuple[int, Made | Stopped, int]]:
    """(place, a further call's result, where in it that picture is), one by one or all in one call; a call
    that may be tried again (`more`) may stop early."""
    for place in places if asked.by_rows else ():
        text, caption = asked.prompt_of(place), captions.get(place)
        texts, told = ({} if one is None else {0: one} for one in (text, caption))
        arguments = asked.alone(place, attempt, caption)
        one = Try(arguments, texts, attempt, told, {0: spent[place]}, more, more, 1)
        try:
            yield place, draw(one), 0
        except Stopped as stopped:
            yield place, stopped, 0
    if asked.by_rows:
        return
    whole = draw(Try(asked.whole(attempt, captions), asked.texts, attempt, captions, spent))
    if len(whole.images) != asked.count:
        raise RuntimeError(
            f"`pipe` must give {asked.count} pictures again when it is called again, got {len(whole.images)}"
        )
    for place in places:
        yield place, whole, place


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


def _from_input(verdict: Verdict, own: set[int]) -> Verdict:
    """The verdict, marked where its training image is what the user put in."""
    return replace(verdict, from_input=verdict.memorized and memorized_row(verdict) in own)


def _repeat(image: Any, count: int) -> Any:
    """An array or tensor of one picture, `count` times."""
    if isinstance(image, torch.Tensor):
        return image.repeat(count, *[1] * (image.ndim - 1))
    return np.repeat(image, count, axis=0)
