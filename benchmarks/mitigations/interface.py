"""What every mitigation is: a name, options, and `draw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Drawn(NamedTuple):
    """`images` float32 [B, 3, H, W] in [0, 1]; `evaluations`: denoiser evaluations per image (one condition,
    one step, forward passes only), averaged over the batch; `late`: bool [B], still memorised before a final
    check replaced or blocked it, None where the method has no such check; `blocked`: bool [B], a blank image
    was delivered."""

    images: Tensor
    evaluations: float
    late: Tensor | None = None
    blocked: Tensor | None = None


class Mitigation(Protocol):
    """A frozen dataclass whose fields are its options; neutral ones give the plain pipeline's pictures."""

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        """Draw one image per prompt with a diffusers `StableDiffusionPipeline`, which is left as it was.

        generators: one per image; an image never depends on its batch-mates.
        """
        ...


def side_generators(generators: Sequence[torch.Generator], stream: int) -> list[torch.Generator]:
    """One more CPU generator per image, seeded from the image's own, which is left untouched: x_T stays what
    the plain pipeline starts from. `stream` keeps the methods' random numbers apart."""
    return [torch.Generator().manual_seed(one.initial_seed() * 1000003 + stream) for one in generators]
