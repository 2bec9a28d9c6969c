"""Counts the host's reads of tensor values: what a device would have to be waited for."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

METHODS = (
    *("tolist", "item", "cpu", "numpy", "nonzero", "equal"),
    *("__bool__", "__int__", "__float__", "__index__"),
)
FUNCTIONS = ("equal", "nonzero")


class Reads:
    """The reads so far, by name, of all threads; `paused()` leaves this thread's out meanwhile."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self._lock, self._local = threading.Lock(), threading.local()

    @property
    def total(self) -> int:
        """All reads so far."""
        return sum(self.counted.values())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Reads of this thread do not count meanwhile."""
        before, self._local.paused = getattr(self._local, "paused", False), True
        try:
            yield
        finally:
            self._local.paused = before

    def counting(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        """`read` that counts its calls; what it reads by other means inside does not count again."""

        def counted(*arguments: Any, **options: Any) -> Any:
            if getattr(self._local, "paused", False):
                return read(*arguments, **options)
            with self._lock:
                self.counted[name] += 1
            with self.paused():
                return read(*arguments, **options)

        return counted


@contextlib.contextmanager
def counted_reads() -> Iterator[Reads]:
    """Every read of a tensor's values meanwhile, on any thread.

    Counted are calls of `METHODS` of a tensor and of torch's `FUNCTIONS`. Not seen: what torch reads inside
    its own operators (a boolean mask as an index).
    """
    reads = Reads()
    owners = [(torch.Tensor, name) for name in METHODS] + [(torch, name) for name in FUNCTIONS]
    kept = [(owner, name, vars(owner).get(name), getattr(owner, name)) for owner, name in owners]
    for owner, name, _, read in kept:
        setattr(owner, name, reads.counting(name, read))
    try:
        yield reads
    finally:
        for owner, name, own, _ in kept:
            setattr(owner, name, own) if own is not None else delattr(owner, name)


@contextlib.contextmanager
def unread(reads: Reads, owner: Any, name: str) -> Iterator[None]:
    """Reads inside `owner.name` do not count meanwhile."""
    inner = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        with reads.paused():
            return inner(*arguments, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)
