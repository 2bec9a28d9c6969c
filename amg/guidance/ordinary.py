"""Captions of ordinary training images near a memorised one: what its later tries are conditioned on."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.guidance.flight import Flight
from amg.guidance.predict import Denoiser

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


def deduplicated(
    index: Any, flights: Sequence[Flight], near: Tensor, opened: Tensor, position: int
) -> Tensor:
    """[B] bool: the samples whose neighbour's caption the released form de-duplicates at step `position`: an
    open one (`opened` [B]) with a frequent caption at its nearest row `near` [B], and on for ten steps."""
    counts = index.caption_counts()
    for flight, nearest, is_open in zip(flights, near.tolist(), opened.tolist(), strict=True):
        if is_open and counts[nearest] > FREQUENT_CAPTION:
            flight.deduplicated_until = position + HELD_STEPS
    return torch.tensor([position < flight.deduplicated_until for flight in flights])


def despecify(config: AMGConfig, index: Any, denoiser: Denoiser, flight: Flight, row: int) -> None:
    """Give a sample's next try the caption of an ordinary training image near the memorised `row`.

    One of those nearest to the sample's prompt, or to the memorised caption where the prompt is not known or
    shares no word with them, chosen by the sample's own generator. Passed over are captions and images that
    occur often, the memorised image itself, its caption and the prompt.
    """
    if config.rewind_caption != "ordinary" or denoiser.encode_captions is None:
        return
    if index.captions[row] is None or index.metric != "cosine":
        return
    found = index.search(index.rows[row][None].float(), k=min(ORDINARY_SEARCHED, index.count)).row[0]
    often = torch.maximum(
        index.caption_counts().to(found.device)[found], index.counts.to(found.device)[found]
    )
    refused = {index.captions[row], flight.prompt}  # the memorised caption need not repeat to bring it back
    near = [
        other
        for other, count in zip(found.tolist(), often.tolist(), strict=True)
        if other != row and count <= FREQUENT_CAPTION and index.captions[other] not in refused
    ]
    captions = [caption for caption in (index.captions[other] for other in near) if caption is not None]
    alike = closest_captions(flight.prompt or "", captions) or closest_captions(index.captions[row], captions)
    if alike:
        flight.caption = alike[int(torch.randint(len(alike), (1,), generator=flight.generator))]


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
