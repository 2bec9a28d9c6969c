"""No mitigation: the diffusers pipeline itself, called as anyone would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mitigations.interface import Drawn


@dataclass(frozen=True)
class Plain:
    """Classifier-free guidance and nothing else (Ho and Salimans 2022)."""

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        images = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=list(generators),
            output_type="pt",
        ).images
        return Drawn(images.float(), 2.0 * steps)
