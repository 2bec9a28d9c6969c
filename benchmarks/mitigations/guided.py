"""Anti-memorization guidance: ours by preset, the paper's form and its ablations, the released code's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from amg.config import AMGConfig
from amg.engine.sampler import Sampler
from mitigations.interface import Drawn

# The paper's form: measured at every step, a third term of constant length, nothing sent back or run again.
# The constants the paper leaves open are written out, so that a change of our presets does not reach it.
PAPER = {
    "check_at": (),
    "rewind_at": (),
    "step_length": "constant",
    "on_memorized": "flag",
    "terms_from": 0.0,
    "lambda_min": 0.3,
    "lambda_max": 0.45,
    "c1": 10.0,
    "c2": 3.0,
}
TERMS = {"spe": "c1", "dup": "c2", "sim": "c3"}


@dataclass(frozen=True)
class Guided:
    """`amg.Sampler` with a preset and overrides; `index` is what it guides and checks by."""

    index: Any = field(repr=False)
    preset: str = "main"
    overrides: tuple[tuple[str, Any], ...] = ()

    def draw(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance_scale: float,
    ) -> Drawn:
        config = AMGConfig.preset(self.preset, **dict(self.overrides))
        out = Sampler(pipe, self.index, config)(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=list(generators),
            output_type="pt",
            progress=False,
        )
        late = [bool(verdict.retries) or verdict.memorized for verdict in out.amg]
        evaluations = sum(verdict.evaluations for verdict in out.amg) / len(out.amg)
        blocked = torch.tensor([verdict.blocked for verdict in out.amg])
        return Drawn(out.images.float(), evaluations, torch.tensor(late), blocked)


def paper(index: Any, terms: Sequence[str], **overrides: Any) -> Guided:
    """The paper's form with some of its terms ("spe", "dup", "sim"), the others' constants zero."""
    unknown = set(terms) - set(TERMS)
    if unknown:
        raise ValueError(f"`terms` must be of {tuple(TERMS)}, got {sorted(unknown)}")
    without = {constant: 0.0 for name, constant in TERMS.items() if name not in terms}
    return Guided(index, "main", tuple({**PAPER, **overrides, **without}.items()))


def released(index: Any) -> Guided:
    """The authors' code as it is: nothing is run again after it."""
    return Guided(index, "released", (("on_memorized", "flag"),))
