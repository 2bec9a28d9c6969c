"""Several calls of one function made as one: rows of tensors concatenated, the result handed back by rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amg.guidance.predict import like_sequence


@dataclass(frozen=True, eq=False)
class Call:
    """`function(*arguments, **keywords)`, to be made alone or together with others of the same `key`.

    The first argument is a tensor with one row per sample, and so is the result. Other tensors either have as
    many rows or are numbers (0-d: a timestep), which become one per row when calls meet.
    What else is among the arguments (or nested in mappings, lists and tuples) must be equal for calls to be
    joined.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Samples in this call."""
        return len(self.arguments[0])

    def key(self) -> Hashable:
        """What two calls have in common that can be joined."""
        parts = (*enumerate(self.arguments), *sorted(self.keywords.items()))
        return (id(self.function), tuple((name, _key(value, self.rows)) for name, value in parts))

    def alone(self) -> Tensor:
        """The call as it was asked for."""
        return self.function(*self.arguments, **self.keywords)


@torch.no_grad()
def together(calls: Sequence[Call]) -> list[Tensor]:
    """The results of `calls`, which share one key, from a single call; a lone one is made as it is."""
    if len(calls) == 1:
        return [calls[0].alone()]
    rows = [call.rows for call in calls]
    arguments = [_join(values, rows) for values in zip(*(call.arguments for call in calls), strict=True)]
    keywords = {name: _join([call.keywords[name] for call in calls], rows) for name in calls[0].keywords}
    output = calls[0].function(*arguments, **keywords)
    if not isinstance(output, Tensor) or len(output) != sum(rows):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"a joined call must return one row per sample, {sum(rows)} in all, got {got}")
    return list(output.split(rows))


def _key(value: Any, rows: int) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((name, _key(inner, rows)) for name, inner in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_key(inner, rows) for inner in value))
    if not isinstance(value, Tensor):
        return (type(value), value) if isinstance(value, Hashable) else id(value)
    if value.ndim == 0:
        return ("rows", value.shape, value.dtype, value.device)
    if len(value) == rows:
        return ("rows", value.shape[1:], value.dtype, value.device)
    return id(value)


def _join(values: Sequence[Any], rows: Sequence[int]) -> Any:
    """`values` of one kind, as `_key` tells kinds apart, as one."""
    first = values[0]
    if isinstance(first, Mapping):
        return {name: _join([value[name] for value in values], rows) for name in first}
    if isinstance(first, (list, tuple)):
        return like_sequence(first, [_join(parts, rows) for parts in zip(*values, strict=True)])
    if not isinstance(first, Tensor):
        return first
    if first.ndim and len(first) != rows[0]:
        return first
    return torch.cat(
        [value if value.ndim else value.expand(n) for value, n in zip(values, rows, strict=True)]
    )
