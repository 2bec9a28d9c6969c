"""Questions to the actors of a served index, with an answer of every one or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from amg.extras import needed
from amg.index.errors import IndexUnavailable
from amg.index.ray.served import Served
from amg.index.ray.shard import Ranked

INLINE_BYTES = 100 << 10  # of an argument that is sent with each call instead of being stored once
SEARCHES = ("closest", "member", "alike")


def import_ray() -> Any:
    """ray, or an error that names the extra to install."""
    return needed("ray", "an index over several processes")


class Calls:
    """served.Shards by Ray: a shard that dies is started again and asked again; whoever waits for longer than
    `timeout` seconds gets IndexUnavailable."""

    def __init__(self, served: Served, actors: Sequence[Any], timeout: float):
        self.served, self.actors, self.timeout = served, actors, timeout

    def ask(self, question: str, arguments: Mapping[int, tuple]) -> dict[int, Any]:
        """{shard: its answer}. Raises what a shard raised."""
        ray, stored = import_ray(), {}
        for given in {id(one): one for each in arguments.values() for one in each}.values():
            if isinstance(given, torch.Tensor):
                array = given.contiguous().numpy()
                stored[id(given)] = ray.put(array) if array.nbytes > INLINE_BYTES else array
        calls = {
            shard: self.actors[shard].ask.remote(question, *(stored.get(id(one), one) for one in each))
            for shard, each in arguments.items()
        }
        _, waiting = ray.wait([*calls.values()], num_returns=len(calls), timeout=self.timeout)
        late = [shard for shard, call in calls.items() if call in waiting]
        if late:
            for call in waiting:
                ray.cancel(call)
            raise self._unavailable(late, f"did not answer {question!r} within {self.timeout:g} s")
        return {shard: _back(question, self._answer(shard, call)) for shard, call in calls.items()}

    def _answer(self, shard: int, call: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            return import_ray().get(call)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise self._unavailable([shard], f"cannot be asked any more ({reason})") from error

    def _unavailable(self, shards: Sequence[int], what: str) -> IndexUnavailable:
        parts = [self.served.parts[shard].rows for shard in shards]
        rows = ", ".join(f"{start} to {stop - 1}" for start, stop in parts)
        numbers = ", ".join(map(str, shards))
        return IndexUnavailable(
            f"shard {numbers} of {len(self.served.parts)} (rows {rows}) of the index served as "
            f"{self.served.name!r} {what}: nothing is answered without it"
        )


def _back(question: str, answer: Any) -> Any:
    if question in SEARCHES:
        return Ranked(*(torch.tensor(column) for column in answer))
    return torch.tensor(answer) if hasattr(answer, "__array__") else answer
