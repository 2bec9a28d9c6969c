"""Cross-attention re-weighting at inference: Ren et al., ECCV 2024 (arXiv 2403.11052), section 5.1."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mitigations.interface import Drawn
from mitigations.loop import decode, denoise, start

MASKS = ("none", "padding", "summary")


@dataclass(frozen=True)
class AttentionReweighting:
    """In the conditional half, multiply the first token's logit by `factor` before the softmax and mask
    tokens: "padding" (after the end token), "summary" (the end token too), "none"."""

    factor: float = 1.25
    mask: str = "padding"

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"`mask` must be one of {MASKS}, got {self.mask!r}")

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
        kept = kept_tokens(pipe.tokenizer, prompts, begin.cond.shape[1], self.mask).to(begin.cond.device)
        with reweighted(pipe.unet, self.factor, kept):
            sample = denoise(begin)
        return Drawn(decode(pipe, sample), 2.0 * steps)


def kept_tokens(tokenizer: Any, prompts: Sequence[str], length: int, mask: str) -> Tensor:
    """bool [B, length]: the tokens of each prompt that stay visible."""
    if mask == "none":
        return torch.ones(len(prompts), length, dtype=torch.bool)
    ids = tokenizer(list(prompts), truncation=True, max_length=length).input_ids
    counts = torch.tensor([len(row) - (mask == "summary") for row in ids])
    return torch.arange(length)[None] < counts[:, None]


@contextlib.contextmanager
def reweighted(unet: Any, factor: float, kept: Tensor) -> Iterator[None]:
    """Replace the processors of the U-Net's cross-attention, and put them back."""
    before = dict(unet.attn_processors)
    own = {
        name: ReweightedProcessor(factor, kept) if name.endswith("attn2.processor") else processor
        for name, processor in before.items()
    }
    unet.set_attn_processor(own)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class ReweightedProcessor:
    """Scaled dot-product attention with `attention_weights`; the batch is [unconditional, conditional]."""

    def __init__(self, factor: float, kept: Tensor) -> None:
        self.factor, self.kept = factor, kept

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        residual = hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key = heads(attn.to_q(hidden_states)), heads(attn.to_k(encoder_hidden_states))
        weights = attention_weights(query, key, self.factor, self.kept)
        mixed = (weights @ heads(attn.to_v(encoder_hidden_states))).transpose(1, 2).flatten(2)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return (output + residual if attn.residual_connection else output) / attn.rescale_output_factor


def attention_weights(query: Tensor, key: Tensor, factor: float, kept: Tensor) -> Tensor:
    """softmax of the logits q·k/sqrt(d), [2B, heads, pixels, L] from query [2B, heads, pixels, d] and key
    [2B, heads, L, d]; in the second half the first token's logit is multiplied by `factor` and tokens that
    `kept` [B, L] leaves out get -inf."""
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    plain, conditional = logits.chunk(2)
    first = conditional[..., :1] * factor
    conditional = torch.cat([first, conditional[..., 1:]], -1)
    conditional = conditional.masked_fill(~kept[:, None, None, :], -torch.inf)
    return torch.cat([plain, conditional]).softmax(-1)
