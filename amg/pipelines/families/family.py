"""What a family is: the data that tells the halves of classifier-free guidance in somebody else's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Encode = Callable[[Any, list[str], Mapping[str, Any]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Family:
    """Pipelines of one kind.

    classes: their names in diffusers, subclasses too; `bare`: those among them whose loop is network and
    scheduler alone, so that a sample may go back inside it. network: the component that denoises; sample: its
    argument that is denoised; divisor: what the scheduler's t is divided by for it. separate: the halves are
    two calls of it, conditional first; else one call of twice the rows, unconditional first. scale: the
    call's argument that is s0. shared: arguments of the network without a row per sample, whatever their
    length. encode: (pipeline, captions, the call's arguments) -> tensors [R, ...], which the network takes as
    `said` (a dot leads into a mapping); encoders: what it needs.
    """

    name: str
    classes: tuple[str, ...]
    encode: Encode
    said: tuple[str, ...]
    bare: tuple[str, ...] = ()
    network: str = "transformer"
    sample: str = "hidden_states"
    divisor: float = 1.0
    separate: bool = False
    scale: str = "guidance_scale"
    shared: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")

    def of(self, pipe: Any) -> bool:
        """Whether a pipeline is of this family."""
        return any(base.__name__ in self.classes for base in type(pipe).__mro__)

    def is_bare(self, pipe: Any) -> bool:
        """Whether a sample may go back inside a pipeline's loop."""
        return any(base.__name__ in self.bare for base in type(pipe).__mro__)

    def scale_of(self, pipe: Any, arguments: Mapping[str, Any]) -> float:
        """s0 at this moment: a callback may change it, where the pipeline keeps it."""
        kept = getattr(pipe, f"_{self.scale}", None)
        return float((arguments.get(self.scale) if kept is None else kept) or 1.0)
