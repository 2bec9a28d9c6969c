"""Searches and the step as an engine has them: captured once, replayed with other values, nobody waits.

On a GPU in a CUDA graph and under the mode in which torch refuses to wait: not run on one yet. On a CPU,
which has neither, the same calls are made again and their reads are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import amg.kernels as kernels

from .. import reads
from .whole_step import make_step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEARCHES = ["top1", "top1 codes", "top5", "top5 codes", "nl2", "nl2 k=1"]
Outputs = tuple[Tensor, ...]


def captured(function: Callable[[], Outputs], device: str) -> Callable[[], Outputs]:
    """What runs `function` again on the tensors it was captured with."""
    if device == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles and loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


@contextmanager
def nobody_waits(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the host may not read a value."""
    if device == "cpu":
        with monkeypatch.context() as patch:
            found = reads.watch(patch)
            yield
        assert found == []
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_search(name: str, device: str) -> tuple[Tensor, Callable[[], Outputs]]:
    """Queries, in whose place others may be written, and their search."""
    queries = torch.rand(3, 96, device=device)
    if name.startswith("nl2"):
        rows = torch.randint(0, 256, (900, 96), device=device, dtype=torch.uint8)
        k = 1 if name.endswith("1") else 50
        return queries, lambda: kernels.nl2(queries, rows, k=k)
    rows = torch.nn.functional.normalize(torch.randn(900, 96, device=device), dim=1)
    codes = kernels.encode_rows(rows) if name.endswith("codes") else None
    if name.startswith("top1"):
        return queries, lambda: kernels.top1_cosine(queries, rows, codes=codes)
    return queries, lambda: kernels.topk_cosine(queries, rows, 5, codes=codes)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_search_is_replayed_with_other_queries_bad_ones_too(device, name, monkeypatch):
    queries, search = make_search(name, device)
    replay = captured(search, device)
    for bad in (None, 1, 2):
        fresh = torch.rand(3, 96)
        if bad is not None:
            fresh[bad, 7] = torch.nan
        queries.copy_(fresh)
        eager = [part.clone() for part in search()]
        with nobody_waits(device, monkeypatch):
            replayed = replay()
        for part, expected in zip(replayed, eager, strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=0, equal_nan=True)
        usable = replayed[0].flatten(1).isfinite().all(1) if replayed[0].ndim > 1 else replayed[0].isfinite()
        assert usable.tolist() == [query != bad for query in range(3)]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("device", DEVICES)
def test_nobody_waits_in_a_search(device, name, monkeypatch):
    _, search = make_search(name, device)
    search()
    with nobody_waits(device, monkeypatch):
        search()


@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_step_replayed_advances_as_eager(device, monkeypatch):
    step = make_step(torch.float32, of_sample=(4, 16, 16))
    step = replace(step, **{name: part.to(device) for name, part in vars(step).items() if part is not None})
    tensors, keywords = step.arguments()
    signals, flags = torch.zeros(5, 4, device=device), torch.zeros(5, dtype=torch.int32, device=device)
    buffers = {"state": step.state, "prev_sample": step.sample, "signals": signals, "flags": flags}
    start = [buffer.clone() for buffer in buffers.values()]

    def advance() -> Outputs:
        kernels.guided_step_into(*tensors, **keywords, **buffers)
        return ()

    outcomes = []
    for run in (captured(advance, device), advance):
        for buffer, value in zip(buffers.values(), start, strict=True):
            buffer.copy_(value)
        with nobody_waits(device, monkeypatch):
            run()
            run()
        outcomes.append([buffer.clone() for buffer in buffers.values()])
    for replayed, eager in zip(*outcomes, strict=True):
        assert torch.equal(replayed, eager)
    assert not torch.equal(outcomes[0][1], start[1])
