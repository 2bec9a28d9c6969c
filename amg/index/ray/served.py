"""An index whose rows lie with the shards: everything that is asked of an Index, asked of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from amg.index.exact import NL2_NEIGHBOURS, Nearest
from amg.index.guard import Alike, most_alike
from amg.index.index import Index
from amg.index.members import closer
from amg.index.ray.answers import best_of, nl2_of, pixel_similarities
from amg.index.ray.shard import COLUMNS, Part, Ranked
from amg.index.store import DTYPES, Manifest
from amg.kernels.top1_cosine.contract import check_k

REMEMBERED = 1 << 14  # rows whose id and caption a client keeps


class Served(NamedTuple):
    """What is served: its name, the index's directory (on the shards' machines), the manifest of the
    generation, the sha256 of that file, and who holds what."""

    name: str
    path: Path
    manifest: Manifest
    sha256: str
    parts: tuple[Part, ...]


class Shards(Protocol):
    """ask(question, {shard: arguments}) → {shard: answer} of the method of Shard of that name. Raises
    IndexUnavailable unless every one of them answers."""

    def ask(self, question: str, arguments: Mapping[int, tuple]) -> dict[int, Any]: ...


class Everyone:
    """Questions to all shards of what is served, tensors on any device."""

    def __init__(self, served: Served, shards: Shards):
        self.served, self.shards = served, shards
        self.starts = torch.tensor([part.rows[0] for part in served.parts])
        self.remember = functools.lru_cache(REMEMBERED)(self._about)

    def best(self, question: str, queries: Tensor, k: int, *rest: int) -> Ranked:
        """The k best of all shards' answers, on the queries' device."""
        found = best_of(self.all(question, _portable(queries), *rest), k)
        return Ranked(*(column.to(queries.device) for column in found))

    def all(self, question: str, *arguments: Any) -> list[Any]:
        """Every shard's answer, in their order."""
        answers = self.shards.ask(question, {shard: arguments for shard in range(len(self.served.parts))})
        return [answers[shard] for shard in sorted(answers)]

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows [n, D] by their numbers [n], on their device."""
        count, numbers = self.served.manifest.count, rows.flatten().cpu()
        if bool(((numbers < 0) | (numbers >= count)).any()):
            raise IndexError(f"`rows` must be in [0, {count}), got {numbers.min()} to {numbers.max()}")
        owners = self._owners(numbers)
        chosen = {shard: (owners == shard).nonzero().flatten() for shard in owners.unique().tolist()}
        answers = self.shards.ask("vectors", {shard: (numbers[at],) for shard, at in chosen.items()})
        manifest = self.served.manifest
        found = torch.empty(len(numbers), manifest.dimension, dtype=DTYPES[manifest.dtype])
        for shard, at in chosen.items():
            found[at] = answers[shard]
        return found.to(rows.device)

    def _about(self, row: int) -> tuple:
        shard = int(self._owners(torch.tensor([row]))[0])
        return self.shards.ask("about", {shard: ([row],)})[shard][0]

    def _owners(self, numbers: Tensor) -> Tensor:
        return torch.searchsorted(self.starts, numbers, right=True) - 1


def _portable(queries: Tensor) -> Tensor:
    """Queries as they travel: on the CPU, fp32 or fp64."""
    queries = queries.detach().cpu()
    return queries if queries.dtype == torch.float64 else queries.float()


class RemoteRows:
    """Index.rows by number alone: rows[numbers [n]] → [n, D] on `device`."""

    def __init__(self, everyone: Everyone, device: torch.device):
        self.everyone, self.device = everyone, device
        manifest = everyone.served.manifest
        self.shape, self.dtype = torch.Size([manifest.count, manifest.dimension]), DTYPES[manifest.dtype]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: Tensor) -> Tensor:
        if not isinstance(numbers, Tensor) or numbers.ndim != 1 or numbers.dtype != torch.int64:
            raise TypeError(
                f"`numbers` must be int64 [n]: the rows lie with the shards, got {numbers!r:.100}"
            )
        return self.everyone.vectors(numbers.to(self.device))


class RemoteSearcher:
    """amg.index.exact's searchers over all shards."""

    def __init__(self, everyone: Everyone):
        self.everyone, self.manifest = everyone, everyone.served.manifest

    def nearest(self, queries: Tensor) -> Nearest:
        if self.manifest.metric == "cosine":
            found = self.everyone.best("closest", queries, 1, 1)
            return Nearest(found.closeness[:, 0].clamp(-1, 1), found.row[:, 0].contiguous(), None)
        pixels = nl2_of(self.everyone.best("closest", queries, NL2_NEIGHBOURS, NL2_NEIGHBOURS))
        return Nearest(-pixels.value, pixels.row, pixels)

    def top(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.manifest.metric == "cosine":
            check_k(k, self.manifest.count)
            found = self.everyone.best("closest", queries, k, k)
            return found.closeness.clamp(-1, 1), found.row
        wanted = max(k, NL2_NEIGHBOURS)
        found = self.everyone.best("closest", queries, wanted, wanted)
        return pixel_similarities(found)[:, :k], found.row[:, :k]


class RemoteMembers:
    """members.Members over all shards."""

    def __init__(self, everyone: Everyone):
        self.everyone = everyone

    def nearer(self, queries: Tensor, found: Nearest) -> Nearest:
        member = self.everyone.best("member", queries, 1)
        return closer(found, member.closeness[:, 0], member.row[:, 0])


class RemoteGuard:
    """guard.Guard over all shards."""

    def __init__(self, everyone: Everyone):
        self.everyone = everyone

    def nearest(self, images: Tensor) -> Alike:
        return most_alike(images, self._search)

    def _search(self, directions: Tensor) -> Alike:
        found = self.everyone.best("alike", directions, 1)
        return Alike(found.closeness[:, 0], found.row[:, 0])


class RemoteSeal:
    """seal.Seal over all shards, each of which looks at its own machine's files."""

    trust = "hashes"

    def __init__(self, everyone: Everyone):
        self.everyone = everyone

    def check(self) -> None:
        self.everyone.all("check")

    def require_whole(self, *names: str) -> None:
        """Nothing: every answer of a shard is of files that it has just found whole."""


class RemoteColumn(Sequence):
    """One of the texts of every row: a row's when it is asked for, all of them shard by shard."""

    def __init__(self, everyone: Everyone, name: str):
        self.everyone, self.name = everyone, name

    def __len__(self) -> int:
        return self.everyone.served.manifest.count

    def __getitem__(self, row: Any) -> Any:
        count = len(self)
        if not -count <= row < count:
            raise IndexError(f"`row` must be in [0, {count}) (rows of the index), got {row}")
        return self.everyone.remember(int(row) % count)[COLUMNS.index(self.name)]

    def __iter__(self) -> Iterator[Any]:
        for shard in range(len(self.everyone.served.parts)):
            yield from self.everyone.shards.ask("column", {shard: (self.name,)})[shard]


class ServedIndex(Index):
    """An index that others hold in memory (`amg.index.ray.serve`): an Index wherever pictures are sampled,
    searched for or checked. It is searched exactly; every answer is of all its shards.

    rows: rows[numbers] alone. `device`: where queries and answers are. Raises IndexUnavailable, within the
    timeout it was connected with, where a shard does not answer; IndexCorrupt where its files changed.
    """

    def __init__(self, everyone: Everyone, again: Callable[..., Index], device: torch.device | str = "cpu"):
        served = everyone.served
        self.everyone, self.again = everyone, again
        self.path, self.manifest = served.path, served.manifest
        self.data = served.path / served.manifest.folder
        self.codes, self.embedder, self.searcher_spec = None, None, "exact"
        self.searcher = RemoteSearcher(everyone)
        parts: dict[str, Any] = {  # what an Index has of its own, by the same calls
            "rows": RemoteRows(everyone, torch.device(device)),
            "members": RemoteMembers(everyone) if served.manifest.members else None,
            "guard": RemoteGuard(everyone) if served.manifest.guard is not None else None,
            "seal": RemoteSeal(everyone),
        }
        self.__dict__.update(parts)

    def to(self, device: str | torch.device) -> ServedIndex:
        """This index with queries and answers on another device; the shards stay where they are."""
        moved = ServedIndex(self.everyone, self.again, device)
        moved.embedder = self.embedder
        return moved

    def with_searcher(self, searcher: str) -> ServedIndex:
        """This index. Raises ValueError for another searcher than "exact"."""
        if searcher != "exact":
            raise ValueError(f'`searcher` must be "exact" for a served index, got {searcher!r}')
        return self

    def verify(self) -> None:
        """Every shard reads every file of its machine again. Raises IndexCorrupt naming the file."""
        self.everyone.all("verify")

    @property
    def manifest_sha256(self) -> str:
        """Of the manifest that is served."""
        return self.everyone.served.sha256

    @functools.cached_property
    def _meta(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: RemoteColumn(self.everyone, name) for name in COLUMNS}

    @functools.cached_property
    def captioned(self) -> int:
        """Rows that have a caption with a word in it."""
        return sum(self.everyone.all("captioned"))

    @functools.cached_property
    def counts(self) -> Tensor:
        """Training images folded into each row, int64 [count]."""
        return torch.tensor([*self._meta["count"]], dtype=torch.int64)

    @functools.cached_property
    def _caption_counts(self) -> Tensor:
        return torch.tensor([*self._meta["caption_count"]], dtype=torch.int64)

    def extend(self, images: Any, captions: Any = None, **options: Any) -> NoReturn:
        self._stays("extend")

    def remove(self, **options: Any) -> NoReturn:
        self._stays("remove")

    def verify_embeddings(self, pictures: Any, least: float = 0.0) -> NoReturn:
        self._stays("verify_embeddings")

    def _stays(self, change: str) -> NoReturn:
        raise ValueError(
            f"`{change}` must be of the index at {self.path}, opened there: what is served as "
            f"{self.everyone.served.name!r} stays what it is until it is served anew"
        )

    def __reduce__(self) -> Any:
        """Pickled by its name: connected again where it is unpickled."""
        return _again, (self.again, self.embedder, str(self.device))

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {len(self.everyone.served.parts)} shards)"


def _again(connect: Callable[..., Index], embedder: Any, device: str) -> Index:
    return connect(embedder).to(device)
