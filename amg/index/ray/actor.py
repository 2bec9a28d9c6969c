"""A shard in a Ray actor of its own."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from typing import Any

import torch

from amg.index.ray.batch import Batcher
from amg.index.ray.served import Served
from amg.index.ray.shard import Shard

BATCHED = ("closest", "member", "alike")


class Actor:
    """Shard number `shard` of what is served, on `threads` threads. It opens its files with the first
    question, so that one it cannot open is an answer and not an actor that is gone."""

    def __init__(self, served: Served, shard: int, threads: int):
        self.served, self.number, self.threads = served, shard, threads
        self.lock = threading.Lock()
        self.batcher = Batcher(self._answer)

    async def record(self) -> Served:
        """What is served."""
        return self.served

    async def process(self) -> int:
        """The process it runs in."""
        return os.getpid()

    async def ask(self, question: str, *arguments: Any) -> Any:
        """What the shard answers; searches that wait are answered together."""
        given = [_tensor(one) for one in arguments]
        if question in BATCHED:
            return [column.numpy() for column in await self.batcher.ask(question, *given)]
        answer = await asyncio.to_thread(self._answer, question, *given)
        return answer.numpy() if isinstance(answer, torch.Tensor) else answer

    def _answer(self, question: str, *arguments: Any) -> Any:
        torch.set_num_threads(self.threads)  # of the thread it is called in
        with self.lock:
            shard = self._shard
        return shard.answer(question, *arguments)

    @functools.cached_property
    def _shard(self) -> Shard:
        served = self.served
        return Shard(served.path, served.manifest, served.parts[self.number])


def _tensor(given: Any) -> Any:
    """Arrays out of Ray's object store cannot be written to: a tensor of their own."""
    return torch.tensor(given) if hasattr(given, "__array__") else given
