"""PixArt-alpha and PixArt-Sigma: a transformer whose learned variance is cut off after guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amg.pipelines.families.family import Family


def encode(pipe: Any, captions: list[str], arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """T5's tokens and which of them are the caption's."""
    length = arguments.get("max_sequence_length")
    states, mask, *_ = pipe.encode_prompt(
        captions,
        do_classifier_free_guidance=False,
        num_images_per_prompt=1,
        device=pipe._execution_device,
        **({} if length is None else {"max_sequence_length": length}),
    )
    return states, mask


PIXART = Family(
    name="PixArt",
    classes=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    encode=encode,
    said=("encoder_hidden_states", "encoder_attention_mask"),
    bare=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
)
