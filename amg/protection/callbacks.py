"""What a call's callbacks are shown: from the first checkpoint on no latents, where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from amg.config import AMGConfig

STEP_END, INPUTS, EARLIER = "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback"
LATENTS = "latents"


def shown_less(arguments: Mapping[str, Any], config: AMGConfig, steps: int | None) -> dict[str, Any]:
    """A call's named arguments, with callbacks that are shown zeros for latents from the first checkpoint of
    `steps` on (of the first step, where their number is not known); what they put in then is not taken."""
    found = dict(arguments)
    first = 0 if steps is None else round(min(config.rewind_at or (0.5,)) * (steps - 1))
    callback, earlier = found.get(STEP_END), found.get(EARLIER)
    if callback is not None:
        found[STEP_END] = _at_step_end(callback, first)
        if hasattr(callback, "tensor_inputs"):  # diffusers' own kind, which says what it wants
            found[INPUTS] = callback.tensor_inputs
    if callable(earlier):
        found[EARLIER] = lambda step, t, latents: earlier(
            step, t, latents if step < first else _blank(latents)
        )
    return found


def _at_step_end(callback: Any, first: int) -> Any:
    def shown(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step < first or LATENTS not in given:
            return callback(pipe, step, t, given)
        answer = callback(pipe, step, t, {**given, LATENTS: _blank(given[LATENTS])}) or {}
        return {**answer, LATENTS: given[LATENTS]}

    return shown


def _blank(latents: Any) -> Any:
    return latents * 0 if isinstance(latents, Tensor) else None
