"""Questions that wait for a shard while it is busy are answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from amg.index.ray.shard import Ranked

MOST_QUERIES = 1024  # in one call, unless one question alone has more


class Waiting(NamedTuple):
    """A question of its kind: the name of a method of Shard, its arguments after the queries, their dtype."""

    kind: tuple
    queries: Tensor
    answer: asyncio.Future[Ranked]


class Batcher:
    """Calls `search(question, queries, *rest)` for one batch at a time, off the event loop's thread: the
    oldest question and all later ones of its kind. A search says of each query what it says of it alone."""

    def __init__(self, search: Callable[..., Ranked]):
        self.search = search
        self.waiting: list[Waiting] = []
        self.running: asyncio.Task | None = None

    async def ask(self, question: str, queries: Tensor, *rest: int) -> Ranked:
        """The answer to `queries` [B, D]. Raises what the search of its batch raised."""
        kind = (question, rest, queries.dtype, queries.shape[1])
        mine = Waiting(kind, queries, asyncio.get_running_loop().create_future())
        self.waiting.append(mine)
        if self.running is None or self.running.done():
            self.running = asyncio.create_task(self._run())
        return await mine.answer

    async def _run(self) -> None:
        while self.waiting:
            batch = self._next()
            question, rest, *_ = batch[0].kind
            queries = torch.cat([one.queries for one in batch])
            try:
                found = await asyncio.to_thread(self.search, question, queries, *rest)
            except Exception as error:
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            columns = [column.split([len(one.queries) for one in batch]) for column in found]
            for one, *answer in zip(batch, *columns, strict=True):
                if not one.answer.done():  # who asked may have given up
                    one.answer.set_result(Ranked(*answer))

    def _next(self) -> list[Waiting]:
        kind, total = self.waiting[0].kind, 0
        batch: list[Waiting] = []
        for one in self.waiting:
            if one.kind == kind and (not batch or total + len(one.queries) <= MOST_QUERIES):
                batch.append(one)
                total += len(one.queries)
        taken = {id(one) for one in batch}
        self.waiting = [one for one in self.waiting if id(one) not in taken]
        return batch
