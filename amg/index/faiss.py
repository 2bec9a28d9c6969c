"""Search through any faiss index, re-ranked exactly on the stored rows.

Approximate: a neighbour that faiss does not return among its candidates is missed. The final check of a
delivered image must search exactly; this is for the steps in between and for looking around.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

import amg.kernels
from amg.extras import install
from amg.index.exact import NL2_ALPHA, NL2_NEIGHBOURS, ExactCosine, ExactPixels, Nearest, Searcher
from amg.index.usable import finite_rows, where_rows
from amg.kernels import NL2

TRAINING_ROWS = 200_000
BLOCK_VALUES = 1 << 24
OVERFETCH = 4
FEWEST_CANDIDATES = 64


def parse_spec(spec: str) -> tuple[str, str]:
    """ "faiss:IVF256,Flat;nprobe=16" → (factory string, search parameters). Raises ValueError."""
    factory, _, parameters = spec.removeprefix("faiss:").partition(";")
    if not spec.startswith("faiss:") or not factory:
        raise ValueError(
            f'`searcher` must be "exact" or "faiss:<index factory string>[;name=value]", got {spec!r}'
        )
    return factory, parameters


def import_faiss() -> Any:
    """faiss, or an error that names the extra to install."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"this searcher needs faiss: {install('faiss')} or {install('faiss-gpu')}"
        ) from error
    return faiss


class FaissSearcher:
    """A faiss index over the rows [N, D] proposes, the rows decide.

    Per query max(64, 4 k) candidates are fetched (k = 50 at least for pixels) and measured on the stored
    rows. A query for which faiss returns fewer than it needs (empty cells) is searched exactly.
    """

    def __init__(self, rows: torch.Tensor, metric: str, spec: str):
        self.rows, self.metric = rows, metric
        self.exact: Searcher = ExactCosine(rows) if metric == "cosine" else ExactPixels(rows)
        self.lock = threading.Lock()  # a GPU index answers one thread at a time
        self.index = self._fill(*parse_spec(spec))

    def _fill(self, factory: str, parameters: str) -> Any:
        faiss = import_faiss()
        measure = faiss.METRIC_INNER_PRODUCT if self.metric == "cosine" else faiss.METRIC_L2
        try:
            index = faiss.index_factory(self.rows.shape[1], factory, measure)
        except RuntimeError as error:
            raise ValueError(f"`searcher`: faiss does not take {factory!r} ({error})") from error
        if self.rows.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            self.resources = faiss.StandardGpuResources()
            index = faiss.index_cpu_to_gpu(self.resources, self.rows.device.index or 0, index)
        if not index.is_trained:
            stride = -(-len(self.rows) // TRAINING_ROWS)
            index.train(self._values(self.rows[::stride]))
        step = max(1, BLOCK_VALUES // self.rows.shape[1])
        for block in self.rows.split(step):
            index.add(self._values(block))
        if parameters:
            space = faiss.GpuParameterSpace() if hasattr(self, "resources") else faiss.ParameterSpace()
            space.set_index_parameters(index, parameters)
        return index

    def _values(self, rows: torch.Tensor) -> Any:
        values = rows.detach().float().cpu()
        return (values / 255 if rows.dtype == torch.uint8 else values).contiguous().numpy()

    def nearest(self, queries: torch.Tensor) -> Nearest:
        if self.metric == "cosine":
            similarity, row = self.top(queries, 1)
            return Nearest(similarity[:, 0], row[:, 0], None)
        candidates, usable = self._candidates(queries, NL2_NEIGHBOURS)
        parts = [
            _nl2_among(query, self.rows, some) if good else self._nl2_exactly(query)
            for query, some, good in zip(queries, candidates, usable, strict=True)
        ]
        found = NL2(*(torch.cat(column) for column in zip(*parts, strict=True)))
        found = found._replace(row=where_rows(~found.value.isnan(), found.row, 0))
        return Nearest(-found.value, found.row, found)

    def top(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        candidates, usable = self._candidates(queries, k)
        similarity = torch.empty(len(queries), k, dtype=torch.float32, device=self.rows.device)
        row = torch.empty(len(queries), k, dtype=torch.int64, device=self.rows.device)
        for at, (some, good) in enumerate(zip(candidates, usable, strict=True)):
            query = queries[at : at + 1]
            chosen = some[some >= 0].sort().values if good else None
            exact = self.exact if chosen is None else _exact_over(self.rows[chosen], self.metric)
            similarity[at], found = (part[0] for part in exact.top(query, k))
            row[at] = found if chosen is None else chosen[found]
        return similarity, where_rows(~similarity[:, 0].isnan(), row, 0)

    def _nl2_exactly(self, query: torch.Tensor) -> NL2:
        found = self.exact.nearest(query[None]).extras
        assert found is not None
        return found

    def _candidates(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, list[bool]]:
        """Candidate rows [B, m] (−1 where faiss has none) and whether each query has enough.

        Zeros are what faiss gets of a query that is not finite.
        """
        needed = min(max(k, NL2_NEIGHBOURS) if self.metric == "nl2" else k, len(self.rows))
        fetch = min(max(FEWEST_CANDIDATES, OVERFETCH * needed), len(self.rows))
        values = where_rows(finite_rows(queries), queries.detach().float(), 0.0).cpu().contiguous().numpy()
        with self.lock:
            row = torch.from_numpy(self.index.search(values, fetch)[1]).to(self.rows.device)
        return row, ((row >= 0).sum(1) >= needed).tolist()


def _exact_over(rows: torch.Tensor, metric: str) -> Searcher:
    return ExactCosine(rows) if metric == "cosine" else ExactPixels(rows)


def _nl2_among(query: torch.Tensor, rows: torch.Tensor, candidates: torch.Tensor) -> NL2:
    """nL2 of one query [P] among candidate rows [m], −1 where there is none."""
    chosen = candidates[candidates >= 0].sort().values
    found = amg.kernels.nl2(query[None], rows[chosen], k=NL2_NEIGHBOURS, alpha=NL2_ALPHA)
    return found._replace(row=chosen[found.row])
