"""What a family is: the data that tells the halves of classifier-free guidance in somebody else's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amg.guidance.predict import Conditions

if TYPE_CHECKING:
    from amg.engine.sampler import Request

Encode = Callable[[Any, list[str], Mapping[str, Any]], tuple[Tensor, ...]]
Condition = Callable[[Any, "Request", bool, Any], Conditions]
Size = tuple[int, int]  # height and width in pixels


def pixels_of_token(pipe: Any) -> int:
    """How many pixels wide and high the latents are that a transformer makes one token of."""
    return int(pipe.vae_scale_factor * pipe.transformer.config.patch_size)


def scheduler_s_own(pipe: Any, steps: int) -> None:
    """No sigmas but the scheduler's."""


def eight_pixels(pipe: Any) -> int:
    """Of a latent, which a U-Net takes one by one."""
    return 8


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

    For `Sampler`, which runs `bare` from their components: condition: (pipeline, request with its prompts as
    lists, whether it is guided, device) -> what its call conditions the network on. takes: arguments of a
    request that not every family takes. flow: the network predicts eps − x0; max_shift: mu of 4,096 tokens
    where its scheduler does not say; sigmas: (pipeline, steps) -> those that its call sets where none are
    asked for, None: the scheduler's own. packed: its samples are tokens [N, packed·C], 2 by 2 of a decoder's
    latents of C channels. variances: it may predict a variance beside its output. token: pixels on a side of
    one, which a picture's sides are multiples of. drawn: (pipeline, request) -> the size that is drawn for
    the one asked for, to which it is brought afterwards; None: they are the same.
    """

    name: str
    classes: tuple[str, ...]
    encode: Encode
    said: tuple[str, ...]
    condition: Condition
    bare: tuple[str, ...] = ()
    network: str = "transformer"
    sample: str = "hidden_states"
    divisor: float = 1.0
    separate: bool = False
    scale: str = "guidance_scale"
    shared: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    takes: tuple[str, ...] = ("clip_skip", "timesteps")
    flow: bool = False
    max_shift: float = 1.15
    sigmas: Callable[[Any, int], list[float] | None] = scheduler_s_own
    packed: int = 1
    variances: bool = False
    token: Callable[[Any], int] = eight_pixels
    drawn: Callable[[Any, Request], Size] | None = None

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
