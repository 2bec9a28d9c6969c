"""Who draws the pictures: plain diffusers, the paper's method done literally, and each saving on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.sampler import Sampler
from amg.verdict import Verdict
from sampling.models import Model


class Drawing(NamedTuple):
    """`images` float [B, 3, H, W] in [0, 1], and their verdicts, none from the plain pipeline."""

    images: Tensor
    verdicts: list[Verdict]


Draw = Callable[[Any, Any, Model, list[str], list[torch.Generator], int], Drawing]


def plain(
    pipe: Any, index: Any, model: Model, prompts: list[str], noise: list[torch.Generator], steps: int
) -> Drawing:
    """The diffusers pipeline itself, with classifier-free guidance."""
    out = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=model.guidance_scale,
        generator=noise,
        output_type="pt",
    )
    return Drawing(out.images, [])


def guided(preset: str, searcher: str = "exact", files: Sequence[str] = (), **overrides: Any) -> Draw:
    """`amg.Sampler` with a preset, fields overridden by keyword; `files` of "calibration" and "student" are
    the model's own, where it has them. Like the pipeline, a sampler is made once, in the untimed turn."""
    made: dict[int, tuple[Any, Sampler]] = {}  # by the index, which is kept: its id is not given away

    def draw(
        pipe: Any, index: Any, model: Model, prompts: list[str], noise: list[torch.Generator], steps: int
    ) -> Drawing:
        if id(index) not in made:
            own = {name: getattr(model, name) for name in files}
            config = AMGConfig.preset(preset, **{**overrides, **own})
            made[id(index)] = (index, Sampler(pipe, index.with_searcher(searcher), config))
        out = made[id(index)][1](
            prompts,
            num_inference_steps=steps,
            guidance_scale=model.guidance_scale,
            generator=noise,
            output_type="pt",
            progress=False,
        )
        return Drawing(out.images, out.amg)

    return draw


@dataclass(frozen=True)
class Contestant:
    """One row of the waterfall; `says` is what it does, or adds to the row before."""

    name: str
    says: str
    draw: Draw = field(repr=False)


# The paper's method: measured at every step by decoder, embedder and exact search, a term of constant length,
# and nothing after it: no rewinds, nothing run again.
LITERALLY = {
    "form": "paper",
    "check_at": (),
    "rewind_at": (),
    "terms_from": 0.0,
    "step_length": "constant",
    "on_memorized": "flag",
}
PLAIN, LITERAL, OURS = "plain", "literal", "ours"
# A further saving is one more line: an option of the config, a searcher, or another `draw`.
CONTESTANTS = (
    Contestant(PLAIN, "diffusers with classifier-free guidance, nothing measured", plain),
    Contestant(
        LITERAL,
        "the paper's method, gradient through the U-Net",
        guided("main", gradient="full", **LITERALLY),
    ),
    Contestant("frozen gradient", "gradient with the noise prediction held", guided("main", **LITERALLY)),
    Contestant(
        "exact step",
        "the length of the third term is computed",
        guided("main", **{**LITERALLY, "step_length": None}),
    ),
    Contestant("promise", "rewinds, and what is still memorised is run again", guided("main", check_at=())),
    Contestant("check schedule", "measured at a few steps, suspected samples at every step", guided("main")),
    Contestant(
        "calibrated gate",
        "free signals skip checks and raise the alarm",
        guided("main", files=("calibration",)),
    ),
    Contestant(
        OURS,
        "the student looks before the teacher: every saving on",
        guided("main", files=("calibration", "student")),
    ),
    Contestant("final check only", "no guidance, finished images checked and marked", guided("off")),
)


def generators(seeds: Sequence[int], device: str) -> list[torch.Generator]:
    """One generator per image, so that no image depends on its batch-mates."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
