"""Captions of ordinary training images near a memorised one: what its later tries are conditioned on."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from amg.config import AMGConfig
from amg.guidance.flight import Flight, seeded
from amg.guidance.predict import Denoiser
from amg.guidance.read import read_all

FREQUENT_CAPTION = 20  # the released code calls a caption that occurs more often than this duplicated
HELD_STEPS = 10  # and goes on de-duplicating one for this many steps
ORDINARY_SEARCHED = 1024  # nearest rows looked through for captions that are not duplicated

STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "at",
        "by",
        "for",
        "from",
        "her",
        "his",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "over",
        "the",
        "to",
        "with",
    ]
)  # rare in some caption sets, yet they name nothing


def hold_deduplicated(index: Any, flight: Flight, row: int, position: int) -> None:
    """The released form goes on de-duplicating for ten steps once a sample's gate opened at `position` with a
    frequent caption at its nearest `row`."""
    if index.caption_counts()[row] > FREQUENT_CAPTION:
        flight.deduplicated_until = position + HELD_STEPS


class Ordinary:
    """Rows of an index near memorised ones, nearest first, kept once they were searched for."""

    def __init__(self) -> None:
        self._near: dict[int, list[int]] = {}
        self._alike: dict[tuple[int, str | None], list[str]] = {}
        self._often: list[int] = []  # of each row, how often its caption or its image occurs

    def near(self, index: Any, rows: Sequence[int]) -> list[list[int]]:
        """The nearest rows to each of `rows` whose caption and image do not occur often, itself left out; one
        search, one read."""
        if new := [row for row in dict.fromkeys(rows) if row not in self._near]:
            vectors = index.rows[torch.tensor(new, device=index.rows.device)].float()
            _, found = index.searcher.top(vectors, min(ORDINARY_SEARCHED, index.count))
            if not self._often:
                self._often = torch.maximum(index.caption_counts(), index.counts).tolist()
            for row, numbers in zip(new, read_all(*found), strict=True):
                others = [int(number) for number in numbers]
                self._near[row] = [
                    other for other in others if other != row and self._often[other] <= FREQUENT_CAPTION
                ]
        return [self._near[row] for row in rows]

    def alike(self, index: Any, row: int, near: Sequence[int], prompt: str | None) -> list[str]:
        """The captions of the rows `near` to a memorised `row` that are closest to a prompt, or to the
        memorised caption where the prompt is not known or shares no word with them."""
        if (row, prompt) not in self._alike:
            own = index.captions[row]
            refused = {own, prompt, None}  # the memorised caption need not repeat to bring the copy back
            captions = [one for one in (index.captions[other] for other in near) if one not in refused]
            self._alike[row, prompt] = closest_captions(prompt or "", captions) or closest_captions(
                own, captions
            )
        return self._alike[row, prompt]


def despecify(
    index: Any, denoiser: Denoiser, ordinary: Ordinary, samples: Sequence[tuple[Flight, AMGConfig, int]]
) -> None:
    """Give the next try of each sample (its flight, its config, the memorised row) the caption of an ordinary
    training image near that row.

    One of those nearest to the sample's prompt, or to the memorised caption where the prompt is not known or
    shares no word with them, chosen by the sample's own chance. Passed over are captions and images that
    occur often, the memorised image itself, its caption and the prompt.
    """
    if denoiser.encode_captions is None or index.metric != "cosine":
        return
    samples = [
        (flight, config, row)
        for flight, config, row in samples
        if config.rewind_caption == "ordinary" and row >= 0 and index.captions[row] is not None
    ]
    if not samples:
        return
    seeded([flight for flight, _, _ in samples])
    nearby = ordinary.near(index, [row for _, _, row in samples])
    for (flight, _, row), near in zip(samples, nearby, strict=True):
        alike = ordinary.alike(index, row, near, flight.prompt)
        if alike:
            flight.caption = alike[flight.choose(len(alike))]


def ordinary_caption(
    index: Any, ordinary: Ordinary, row: int, prompt: str, choose: Callable[[int], int]
) -> str | None:
    """The caption of an ordinary training image near a memorised `row`, for a sample outside any loop; None
    where the index knows none."""
    if index.metric != "cosine" or index.captions[row] is None:
        return None
    (near,) = ordinary.near(index, [row])
    alike = ordinary.alike(index, row, near, prompt)
    return alike[choose(len(alike))] if alike else None


def warn_without_captions(index: Any) -> None:
    """Say to the caller's caller that a text model's later tries can only go back to the memorised prompt."""
    if index.captioned:
        return
    warnings.warn(
        f"`index` has captions for 0 of its {index.count} rows ({index.path}): what memorises can only be "
        "tried again with the same prompt, and is blocked where that brings the copy back; build it with "
        "`captions=`",
        stacklevel=3,
    )


def closest_captions(caption: str, others: Sequence[str]) -> list[str]:
    """Those of `others` nearest to `caption` by the cosine of TF-IDF vectors, within a fifth of the best.

    Words weigh log(count / occurrences among `others`); stop words are left out, and `caption`'s own length
    is the same for all.
    """
    words = [_words(other) for other in others]
    occurrences = Counter(word for own in words for word in own)
    weight = {word: math.log(len(others) / count) ** 2 for word, count in occurrences.items()}
    wanted = _words(caption)
    scores = [
        sum(weight[word] for word in own & wanted) / math.sqrt(sum(weight[word] for word in own) or 1.0)
        for own in words
    ]
    best = max(scores, default=0.0)
    return [other for other, score in zip(others, scores, strict=True) if best > 0 and score >= 0.8 * best]


@functools.lru_cache(maxsize=2**16)
def _words(caption: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", caption.lower())) - STOP_WORDS
