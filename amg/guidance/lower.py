"""Later tries where no ordinary caption is known: the prompt with a lower magnitude (Wen et al., ICLR 2024).

m = ||eps_cond - eps_uncond||_2 of the first step is large for prompts that memorise. "attribution" leaves out
the words that carry it, "embedding" optimises the prompt's embedding; each further try asks for less of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.embed.precision import carried_back, recorded
from amg.guidance.checkpoint import affords
from amg.guidance.flight import Flight, Lowered
from amg.guidance.predict import Conditions, Denoiser, captioned, encoded, plain, replace_captions
from amg.guidance.read import read_all

SHARE = 0.5  # of the prompt's own m: the n-th try asks for at most SHARE^n of it
ITERATIONS, LEARNING_RATE = 10, 0.1  # of AdamW, for each try
TOGETHER = 32  # rows of one call of the network
TEXT = "encoder_hidden_states"  # the condition that is a prompt's embedding [B, L, D]


@dataclass(frozen=True)
class Start:
    """The first step of one sample: what the network sees of its first noise, `sample` [1, ...], its timestep
    `t`, the prompt's own conditions, of one row and with an unconditional half, and the evaluations `plain`
    of a whole sample."""

    denoiser: Denoiser
    sample: Tensor
    t: Any
    conditions: Conditions
    plain: int

    @functools.cached_property
    def uncond(self) -> Tensor:
        """The raw unconditional output, [1, ...]."""
        return self.output(self.conditions.uncond or {}, 1)

    def output(self, condition: Mapping[str, Any], rows: int) -> Tensor:
        """The raw output [R, ...] of a condition of R rows."""
        sample = self.sample.expand(rows, *self.sample.shape[1:])
        return self.denoiser.network(sample, self.t, **plain(condition), **self.conditions.shared)


def require_same(config: AMGConfig, what: str) -> None:
    """ValueError where a config asks for prompts to be lowered of what cannot."""
    if config.rewind_prompt != "same":
        raise ValueError(f'`rewind_prompt` must be "same" for {what}, got {config.rewind_prompt!r}')


def lower(flight: Flight, start: Start, config: AMGConfig) -> None:
    """Find what a sample's next try is conditioned on, where it was marked for that (`Flight.to_lower`).

    Writes `Flight.lowered`, and the words that are left as `Flight.caption`; adds the network evaluations
    spent, of which a backward pass is none. The next try goes to what the last one went to where
    `max_evaluations` does not leave room for this beside one more run, without classifier-free guidance, for
    a prompt of one word or none that is known ("attribution"), and for a network that is given no embedding
    ("embedding").
    """
    how, flight.to_lower = flight.to_lower, None
    if how is None or start.conditions.uncond is None:
        return
    words, held, denoiser = (flight.prompt or "").split(), flight.lowered, start.denoiser
    if how == "attribution":
        possible, cost = len(words) > 1 and denoiser.encode_captions is not None, 2 * len(words) + 1
        cost = 0 if held is not None else cost
    else:
        possible, cost = TEXT in start.conditions.cond, 1 + ITERATIONS
    if not possible or not affords(config, flight, cost + start.plain, start.plain):
        return
    if how == "attribution":
        flight.lowered = attributed(start, words) if held is None else held.again()
        flight.caption = shorter(flight.lowered)
        flight.evaluations += cost
        return
    flight.lowered, spent = optimised(start, held)
    flight.evaluations += spent


def later(denoiser: Denoiser, conditions: Conditions, flights: Sequence[Flight]) -> Conditions:
    """Conditions with what later tries go to, captions or lowered embeddings, in place of their prompts; a
    flight for each row."""
    told = replace_captions(denoiser, conditions, [flight.caption for flight in flights])
    found = {
        row: flight.lowered.embedding
        for row, flight in enumerate(flights)
        if flight.lowered is not None and flight.lowered.embedding is not None
    }
    return captioned(told, {TEXT: torch.cat([*found.values()])}, [*found]) if found else told


def attributed(start: Start, words: Sequence[str]) -> Lowered:
    """m of a prompt of W >= 2 words, and of what is left of it without the first 1, 2, ..., W - 1 of them in
    the order of the m of each alone, largest first: 2·W + 1 evaluations.

    Each word alone, not all but one: a memorised prompt brings its picture back without any one of its words.
    """
    whole, *own = magnitudes(start, [" ".join(words), *words])
    order = sorted(range(len(words)), key=lambda at: -own[at])
    left = [without(words, order[:count]) for count in range(1, len(words))]
    return Lowered(whole, texts=tuple(zip(left, magnitudes(start, left), strict=True)))


def without(words: Sequence[str], places: Sequence[int]) -> str:
    """The words but those at `places`, in their order."""
    return " ".join(word for at, word in enumerate(words) if at not in places)


def shorter(lowered: Lowered) -> str:
    """What a try goes to: the fullest text with m <= SHARE^tries of the whole prompt's, else the one with
    the least."""
    most = lowered.whole * SHARE**lowered.tries
    least, _ = min(lowered.texts, key=lambda one: one[1])
    return next((text for text, m in lowered.texts if m <= most), least)


@torch.no_grad()
def magnitudes(start: Start, texts: Sequence[str]) -> list[float]:
    """m of one sample conditioned on each text, of raw outputs: in units of the model, to be compared with
    one another. One call of the network for up to `TOGETHER` texts; one read."""
    found = []
    for at in range(0, len(texts), TOGETHER):
        some = texts[at : at + TOGETHER]
        rows = start.conditions.take(torch.zeros(len(some), dtype=torch.int64))
        told = captioned(rows, encoded(start.denoiser, some, start.conditions))
        found.append(distance(start.output(told.cond, len(some)), start.uncond))
    return read_all(torch.cat(found))[0]


def optimised(start: Start, held: Lowered | None) -> tuple[Lowered, int]:
    """The prompt's embedding, all tokens but the first, after at most `ITERATIONS` of AdamW on m, or after
    the one that brought m to SHARE^tries of the whole prompt's; and the evaluations spent. A further try goes
    on from the last one's."""
    own: Tensor = start.conditions.cond[TEXT]
    with torch.no_grad():
        uncond = start.uncond
    with torch.inference_mode(False):
        embedding = (own if held is None or held.embedding is None else held.embedding).detach().float()
        first, rest = embedding[:, :1].clone(), embedding[:, 1:].clone().requires_grad_()
        optimiser = torch.optim.AdamW([rest], lr=LEARNING_RATE)
        whole, spent, tries = None if held is None else held.whole, 1, 1 if held is None else held.tries + 1
        for _ in range(ITERATIONS):
            m, rest.grad = _slope(start, first, rest, uncond)
            spent, whole = spent + 1, m if whole is None else whole
            if m <= whole * SHARE**tries:
                break
            optimiser.step()
        assert whole is not None
        found = torch.cat([first, rest.detach()], 1)
    return Lowered(whole, tries, embedding=found.to(own)), spent


def _slope(start: Start, first: Tensor, rest: Tensor, uncond: Tensor) -> tuple[float, Tensor]:
    """m of an embedding [1, L, D], and its gradient in all tokens but the first; one read."""
    own = start.conditions.cond

    def output_of(leaf: Tensor) -> Tensor:
        said = torch.cat([first, leaf], 1).to(own[TEXT].dtype)
        return start.output({**own, TEXT: said}, 1)

    leaf, output = recorded(output_of, rest)
    difference = (output.detach().float() - uncond.float()).flatten(1)
    m = difference.norm(dim=1)
    direction = (difference / m.clamp_min(torch.finfo(m.dtype).tiny)).view_as(output)
    return read_all(m)[0][0], carried_back(output, leaf, direction)


def distance(output: Tensor, other: Tensor) -> Tensor:
    """The norm of the difference of raw outputs [R, ...] -> [R], of 32 bits at least."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return (output.to(wide) - other.to(wide)).flatten(1).norm(dim=1)
