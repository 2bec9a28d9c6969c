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
from amg.guidance.gate import Gate
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
    """Ordinary captions for later tries: of rows of an index near memorised ones, nearest first, kept once
    they were searched for; or of a `bank` of ordinary prompts, where the index knows none."""

    def __init__(self, bank: Sequence[str] = ()) -> None:
        self.bank = tuple(dict.fromkeys(bank))
        self._near: dict[int, list[int]] = {}
        self._alike: dict[tuple[int, str | None], list[str]] = {}
        self._often: list[int] = []  # of each row, how often its caption or its image occurs
        self._frequent: frozenset[str | None] | None = None

    def captions(self, index: Any, rows: Sequence[int], prompts: Sequence[str | None]) -> list[list[str]]:
        """What samples may go to that copy the memorised `rows` (-1: not known which) and were asked for
        `prompts`: captions near the row, or else those of the bank nearest to the prompt; one search."""
        told = [_known(index, row) for row in rows]
        near = iter(self.near(index, [row for row, known in zip(rows, told, strict=True) if known]))
        found = [
            self.alike(index, row, next(near), prompt) if known else []
            for row, prompt, known in zip(rows, prompts, told, strict=True)
        ]
        return [
            own or self.banked(index, row, prompt)
            for own, row, prompt in zip(found, rows, prompts, strict=True)
        ]

    def banked(self, index: Any, row: int, prompt: str | None) -> list[str]:
        """The prompts of the bank nearest to a prompt, any where none shares a word with it; never itself,
        nor a caption that the index knows to occur often."""
        if not self.bank:
            return []
        if (-1, prompt) not in self._alike:
            refused = {prompt, *self._often_said(index)}
            texts = [text for text in self.bank if text not in refused]
            self._alike[-1, prompt] = closest_captions(prompt or "", texts) or texts
        own = index.captions[row] if row >= 0 else None
        return [text for text in self._alike[-1, prompt] if text != own]

    def _often_said(self, index: Any) -> frozenset[str | None]:
        if self._frequent is None:
            often = (index.caption_counts() > FREQUENT_CAPTION).nonzero().flatten().tolist()
            self._frequent = frozenset(index.captions[row] for row in often)
        return self._frequent

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
    training image near that row, or an ordinary prompt of the bank where the index knows none.

    The caption is one of those nearest to the sample's prompt, or to the memorised caption where the prompt
    is not known or shares no word with them, chosen by the sample's own chance. Passed over are captions and
    images that occur often, the memorised image itself, its caption and the prompt. Where none is known the
    prompt is marked to be lowered, if `rewind_prompt` asks for that.
    """
    for flight, config, _ in samples:
        if config.rewind_prompt != "same" and (flight.caption is None or flight.lowered is not None):
            flight.to_lower = config.rewind_prompt
    if denoiser.encode_captions is None:
        return
    samples = [sample for sample in samples if sample[1].rewind_caption == "ordinary"]
    if not ordinary.bank:
        samples = [sample for sample in samples if _known(index, sample[2])]
    if not samples:
        return
    seeded([flight for flight, _, _ in samples])
    found = ordinary.captions(
        index, [row for _, _, row in samples], [flight.prompt for flight, _, _ in samples]
    )
    for (flight, _, _), captions in zip(samples, found, strict=True):
        if captions:
            flight.caption = captions[flight.choose(len(captions))]
            flight.to_lower = flight.lowered = None


def ordinary_caption(
    index: Any, ordinary: Ordinary, row: int, prompt: str, choose: Callable[[int], int]
) -> str | None:
    """What a sample outside any loop that copies a memorised `row` may go to; None where nothing is known."""
    (captions,) = ordinary.captions(index, [row], [prompt])
    return captions[choose(len(captions))] if captions else None


def _known(index: Any, row: int) -> bool:
    """Whether the index can tell ordinary captions near a memorised row: of pixels it cannot say what is
    near."""
    return row >= 0 and index.metric == "cosine" and index.captions[row] is not None


def bank_of(config: AMGConfig, gate: Gate | None) -> Sequence[str]:
    """The ordinary prompts of a config, or those that its calibration was made with."""
    if isinstance(config.ordinary_prompts, tuple):  # as a config keeps them
        return config.ordinary_prompts
    return () if gate is None else gate.ordinary


def warn_without_captions(index: Any, bank: Sequence[str], config: AMGConfig) -> None:
    """Say to the caller's caller that a text model's later tries can only go back to the memorised prompt, or
    that pixels are compared of a model that denoises latents."""
    if index.metric == "nl2":
        warnings.warn(
            f"`index` compares pixels ({index.path}), of a model that denoises latents: ordinary pictures "
            "that are alike in their pixels alone are called copies, and later tries find no captions in "
            "it; build it with a copy-detection `embedder=`",
            stacklevel=3,
        )
    elif not index.captioned and not bank and config.rewind_prompt == "same":
        warnings.warn(
            f"`index` has captions for 0 of its {index.count} rows ({index.path}): what memorises can only "
            "be tried again with the same prompt, and is blocked where that brings the copy back; build it "
            "with `captions=`, or give `ordinary_prompts=`, or see `rewind_prompt=`",
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
