"""prompt -> eps_uncond, eps_cond in one call of the denoiser; a second call for the neighbours' captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amg.guidance.terms import classifier_free


@dataclass(frozen=True, eq=False)
class Same:
    """A value nested beside tensors with one row per sample that is itself the same for all rows."""

    value: Any


@dataclass(frozen=True)
class Conditions:
    """What the denoiser is conditioned on: keyword arguments whose tensors have one row per sample, nested in
    mappings, lists and tuples too; what is the same for all rows there is `Same`.

    `uncond` is None without classifier-free guidance; `shared` holds arguments that are the same for all
    rows.
    """

    cond: Mapping[str, Any]
    uncond: Mapping[str, Any] | None
    shared: Mapping[str, Any]

    def take(self, rows: Tensor) -> Conditions:
        """The conditions of some rows."""
        return self._changed(lambda tensor: tensor[rows.to(tensor.device)])

    def part(self, rows: slice) -> Conditions:
        """The conditions of neighbouring rows, views of these."""
        return self._changed(lambda tensor: tensor[rows])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        cond = {name: mapped(change, value) for name, value in self.cond.items()}
        if self.uncond is None:
            return Conditions(cond, None, self.shared)
        uncond = {name: mapped(change, value) for name, value in self.uncond.items()}
        return Conditions(cond, uncond, self.shared)


@dataclass(frozen=True)
class Denoiser:
    """A network and what surrounds it, free of any pipeline.

    `network(sample, t, **conditions)` returns the raw output [B, C, H, W], t being one timestep or [B];
    `decode(x0)` an image [B, 3, H, W] in [0, 1] (differentiable, unclamped); `encode_captions(captions)` the
    keyword arguments of a condition, or None where the model takes no text; `pixels` says that x0 is the
    picture itself in [-1, 1].
    """

    network: Callable[..., Tensor]
    decode: Callable[[Tensor], Tensor]
    prediction_type: str = "epsilon"
    pixels: bool = True
    encode_captions: Callable[[Sequence[str]], Mapping[str, Any]] | None = None


def replace_captions(
    denoiser: Denoiser, conditions: Conditions, captions: Sequence[str | None]
) -> Conditions:
    """Conditions with the rows that have a caption in `captions` conditioned on it instead of their
    prompt."""
    rows = [row for row, caption in enumerate(captions) if caption is not None]
    if not rows or denoiser.encode_captions is None:
        return conditions
    said = encoded(denoiser, [caption for caption in captions if caption is not None], conditions)
    return captioned(conditions, said, rows)


def captioned(
    conditions: Conditions, said: Mapping[str, Any], rows: Sequence[int] | None = None
) -> Conditions:
    """Conditions with what other captions were encoded to instead of the prompts of `rows`, None: of all."""
    return Conditions(_told(conditions.cond, said, rows), conditions.uncond, conditions.shared)


def encoded(denoiser: Denoiser, captions: Sequence[str], conditions: Conditions) -> Mapping[str, Any]:
    """What captions are encoded to, in as many tokens as the prompts have: cut, or filled up with those of
    the empty caption (people weight long prompts in several chunks of 77)."""
    assert denoiser.encode_captions is not None
    said = denoiser.encode_captions(captions)
    if _fits(conditions.cond, said):
        return said
    return _fitted(conditions.cond, said, denoiser.encode_captions([""]))


def _fits(own: Any, said: Any) -> bool:
    if isinstance(said, Mapping):
        return all(_fits(own.get(name), value) for name, value in said.items())
    return not isinstance(own, Tensor) or own.shape[1:] == said.shape[1:]


def _fitted(own: Any, said: Any, empty: Any) -> Any:
    """`said` with as many tokens, along the second dimension, as `own` has; filled up with `empty`'s."""
    if isinstance(said, Mapping):
        return {name: _fitted(own.get(name), value, empty[name]) for name, value in said.items()}
    if not isinstance(own, Tensor) or own.shape[1:] == said.shape[1:]:
        return said
    if own.shape[2:] != said.shape[2:]:
        raise ValueError(
            "`prompt_embeds` must be as wide as the pipeline's own text encoder makes them, for captions to "
            f"take their place, got {list(own.shape)} where it makes {list(said.shape)}"
        )
    missing = own.shape[1] - said.shape[1]
    if missing <= 0:
        return said[:, : own.shape[1]]
    more = empty.expand(len(said), *empty.shape[1:])
    more = more.repeat(1, -(-missing // more.shape[1]), *[1] * (more.ndim - 2))
    return torch.cat([said, more[:, :missing]], 1)


def predict(
    denoiser: Denoiser, sample: Tensor, t: Any, conditions: Conditions
) -> tuple[Tensor | None, Tensor]:
    """(unconditional, conditional) raw outputs, [B, C, H, W] each, unconditional first in one call of 2B
    rows. `t` is one timestep, or one per row, [B].

    Without classifier-free guidance the first is None and the second the plain output.
    """
    if conditions.uncond is None:
        return None, denoiser.network(sample, t, **plain(conditions.cond), **conditions.shared)
    both = {name: joined([value, conditions.cond[name]]) for name, value in conditions.uncond.items()}
    t = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
    output_uncond, output_cond = denoiser.network(
        torch.cat([sample, sample]), t, **plain(both), **conditions.shared
    ).chunk(2)
    return output_uncond, output_cond


def predict_guided(
    denoiser: Denoiser, sample: Tensor, t: Any, conditions: Conditions, guidance_scale: float | Tensor
) -> Tensor:
    """The raw output [B, C, H, W] with classifier-free guidance, where there are two halves."""
    output_uncond, output_cond = predict(denoiser, sample, t, conditions)
    if output_uncond is None:
        return output_cond
    return classifier_free(output_uncond, output_cond, guidance_scale)


def predict_neighbours(
    denoiser: Denoiser, sample: Tensor, t: Any, conditions: Conditions, captions: Sequence[str]
) -> Tensor:
    """Raw outputs [B, C, H, W] with each row conditioned on its own neighbour's caption instead of its
    prompt."""
    if denoiser.encode_captions is None:
        raise ValueError("`denoiser` takes no captions, so caption de-duplication cannot act (set c2 = 0)")
    told = captioned(conditions, encoded(denoiser, captions, conditions))
    return denoiser.network(sample, t, **plain(told.cond), **conditions.shared)


def like_sequence(value: Any, items: Sequence[Any]) -> Any:
    """`items` as a list or (named) tuple, as `value` is one."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def joined(values: Sequence[Any]) -> Any:
    """The rows of one condition after another, all of one form."""
    return mapped(lambda *tensors: torch.cat(tensors), *values)


def _told(own: Any, said: Any, rows: Sequence[int] | None = None) -> Any:
    """Conditions, nested or not, with what captions were encoded to in place of `rows`, None: of all; in the
    dtypes and on the devices of what is replaced. What captions do not say stays."""
    if isinstance(said, Mapping):
        return {**own, **{name: _told(own.get(name), value, rows) for name, value in said.items()}}
    said = said.to(own) if isinstance(own, Tensor) else said
    if rows is None:
        return said
    changed = own.clone()
    changed[rows] = said
    return changed


def plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the network takes them."""
    return {name: mapped(None, value) for name, value in mapping.items()}


def mapped(change: Callable[..., Tensor] | None, value: Any, *others: Any) -> Any:
    """`change` of every tensor with rows nested in `value` (and of its counterparts in `others`, which have
    the same form); None: they stay, and `Same` gives way to its value."""
    if isinstance(value, Mapping):
        parts = {name: (inner, *(other[name] for other in others)) for name, inner in value.items()}
        return {name: mapped(change, *part) for name, part in parts.items()}
    if isinstance(value, (list, tuple)):
        return like_sequence(value, [mapped(change, *part) for part in zip(value, *others, strict=True)])
    if isinstance(value, Same):
        return value.value if change is None else value
    return change(value, *others) if change is not None and isinstance(value, Tensor) else value
