"""Randomised prompts: Somepalli et al., NeurIPS 2023 (arXiv 2305.20086), section 5.2, at inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mitigations.interface import Drawn, side_generators
from mitigations.loop import decode, denoise, start

NUMBERS = 100_000
Draw = Callable[[list[str], torch.Generator], str]


@dataclass(frozen=True)
class RandomTokens:
    """RT: `insertions` random tokens of the tokenizer's vocabulary at random places between the words."""

    insertions: int = 4

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        tokenizer, special = pipe.tokenizer, set(pipe.tokenizer.all_special_ids)
        ordinary = [token for token in range(len(tokenizer)) if token not in special]

        def word(words: list[str], generator: torch.Generator) -> str:
            return str(tokenizer.decode([ordinary[_integer(len(ordinary), generator)]])).strip()

        edited = insert_words(prompts, self.insertions, word, side_generators(generators, 1))
        return _drawn(pipe, edited, generators, steps, guidance_scale)


@dataclass(frozen=True)
class RandomNumbers:
    """RNA: `insertions` random integers below 100,000 at random places between the words."""

    insertions: int = 4

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        def number(words: list[str], generator: torch.Generator) -> str:
            return str(_integer(NUMBERS, generator))

        edited = insert_words(prompts, self.insertions, number, side_generators(generators, 2))
        return _drawn(pipe, edited, generators, steps, guidance_scale)


@dataclass(frozen=True)
class RepeatedWords:
    """CWR: `insertions` words of the prompt itself, repeated at random places."""

    insertions: int = 4

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        def repeated(words: list[str], generator: torch.Generator) -> str:
            return words[_integer(len(words), generator)]

        edited = insert_words(prompts, self.insertions, repeated, side_generators(generators, 3))
        return _drawn(pipe, edited, generators, steps, guidance_scale)


@dataclass(frozen=True)
class GaussianNoise:
    """GNI: the prompt's embedding e becomes e + level·N(0, 1), e [L, D]; the empty prompt's stays."""

    level: float = 0.1

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        begin = start(pipe, prompts, generators, steps, guidance_scale)
        cond = noised(begin.cond, self.level, side_generators(generators, 4))
        return Drawn(decode(pipe, denoise(replace(begin, cond=cond))), 2.0 * steps)


def insert_words(
    prompts: Sequence[str], insertions: int, word: Draw, generators: Sequence[torch.Generator]
) -> list[str]:
    """Insert `word(words, generator)` `insertions` times into each prompt, each time at a uniform place
    (before, between or after the words there are then)."""
    if insertions < 0:
        raise ValueError(f"`insertions` must be >= 0, got {insertions}")
    edited = []
    for prompt, generator in zip(prompts, generators, strict=True):
        words = prompt.split(" ")
        for _ in range(insertions):
            new = word(words, generator)
            words.insert(_integer(len(words) + 1, generator), new)
        edited.append(" ".join(words))
    return edited


def noised(embedding: Tensor, level: float, generators: Sequence[torch.Generator]) -> Tensor:
    """embedding [B, L, D] + level·N(0, 1), each row's noise from its own generator."""
    noise = torch.stack([torch.randn(embedding.shape[1:], generator=one) for one in generators])
    return embedding + level * noise.to(embedding)


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))


def _drawn(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance_scale: float,
) -> Drawn:
    begin = start(pipe, prompts, generators, steps, guidance_scale)
    return Drawn(decode(pipe, denoise(begin)), 2.0 * steps)
