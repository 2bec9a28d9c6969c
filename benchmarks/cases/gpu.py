"""The cases of one NVIDIA GPU: the step in fp16 and the search of a million rows.

On device "cpu" the same code runs tiny problems, to try the plumbing where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from protocol import OURS, Bar, Case, Provider
from torch import Tensor

import amg.kernels as kernels

from . import guided_step, top1_cosine
from .bandwidth import COPIERS

CALLS = 50  # in a row, where calls are timed by the wall clock
MATMUL, FAISS = "matmul + max", "faiss-gpu Flat fp16"
Answer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scale:
    """Problem sizes, and how many MiB of input sets are rotated through: four times the L2 cache."""

    device: str
    rotated_mib: int
    large_batch: int
    rows: int


def scale(device: str) -> Scale:
    if device == "cpu":
        return Scale(device, 1, 2, 2000)
    return Scale(device, 4 * torch.cuda.get_device_properties(device).L2_cache_size // 2**20, 512, 1_000_000)


def copier(tensor: Tensor, sets: int) -> Provider:
    """Tensor.copy_ of twice `tensor`'s size, device to device."""
    sources = [torch.randn(2 * tensor.numel(), device=tensor.device).to(tensor.dtype) for _ in range(sets)]
    target = torch.empty_like(sources[0])
    moved = 2 * target.numel() * target.element_size()
    return Provider(COPIERS[0], lambda i: target.copy_(sources[i % sets]), moved)


def as_called(build: Callable[[], Case], calls: int = CALLS) -> Case:
    """A case timed by the wall clock, with what a call costs on the host; copying is no rival there."""
    case = build()
    found = tuple(
        replace(provider, sample_calls=calls) for provider in case.providers if provider.name not in COPIERS
    )
    bars = tuple(bar for bar in case.bars if bar.rivals != COPIERS)
    return replace(case, name=f"{case.name}, as called", providers=found, bars=bars)


def step_case(sizes: Scale, shape: tuple[int, ...], terms: bool, large: bool) -> Case:
    """fp16 against eager and torch.compile; where the tensors are large, against copying too."""
    sets = guided_step.input_sets(shape, torch.float16, sizes.device, terms, sizes.rotated_mib)
    compiled = guided_step.try_compile(sets[0])
    found = guided_step.providers(sets, 0.5 if terms else 0.0, compiled)
    bars = [Bar("x best rival", ("eager", "torch.compile"), 1.5)]
    if large:
        found.append(copier(sets[0][0], len(sets)))
        bars.append(Bar("of copy bandwidth", COPIERS, 0.85, "GB/s"))
    name = f"fp16 {'x'.join(map(str, shape))} {'AMG, half open' if terms else 'CFG'}"
    run = partial(guided_step.check, sets[0], compiled)
    return Case("guided_step", name, 0, len(sets), tuple(found), tuple(bars), run)


def faiss_search(rows: Tensor) -> Callable[[Tensor], Answer] | None:
    """Exact search by faiss-gpu, rows stored in fp16, everything on the device; None without faiss-gpu."""
    import faiss

    if rows.device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        print(f"{FAISS} left out: faiss has no GPU support here")
        return None
    import faiss.contrib.torch_utils  # teaches search() to take tensors on the device

    options = faiss.GpuIndexFlatConfig()
    options.useFloat16 = True
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), rows.shape[1], options)
    index.add(rows.float())

    def search(queries: Tensor) -> Answer:
        similarity, row = index.search(queries, 1)
        return similarity[:, 0], row[:, 0]

    return search


def unit(count: int, device: str) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, top1_cosine.DIMENSION, device=device), dim=1)


def search_case(sizes: Scale, batch: int, screened: bool) -> Case:
    """B queries among a million fp16 rows, which exceed every cache; ours with or without int8 codes."""
    rows = unit(sizes.rows, sizes.device).half()
    sets = [unit(batch, sizes.device) for _ in range(top1_cosine.QUERY_SETS)]
    codes = kernels.encode_rows(rows) if screened else None
    searches: dict[str, Callable[[Tensor], Answer]] = {
        OURS: lambda queries: kernels.top1_cosine(queries, rows, codes=codes),
        MATMUL: lambda queries: top1_cosine.torch_search(queries, rows),
    }
    theirs = faiss_search(rows)
    if theirs is not None:
        searches[FAISS] = theirs
    width = top1_cosine.DIMENSION
    moved = dict.fromkeys(searches, 2 * rows.numel())
    if screened:
        moved[OURS] = len(rows) * (width + 8)
    found = [
        Provider(name, lambda i, search=search: search(sets[i]), moved[name])
        for name, search in searches.items()
    ]
    found.append(copier(rows[: len(rows) // 4], 2))
    bars = [Bar("of copy bandwidth", COPIERS, 0.85, "GB/s")]
    if screened:  # else all read the same bytes once, and the bandwidth is the bar
        bars.append(Bar("x best rival", (MATMUL, FAISS), 1.5))
    kind = "int8 codes" if screened else "fp16"
    name = f"{len(rows) // 1000}k x {width} {kind}, B = {batch}"
    run = partial(top1_cosine.check, searches, rows, sets)
    return Case("top1_cosine", name, 0, len(sets), tuple(found), tuple(bars), run)


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """Builders by name of what is timed on the device, the ones with the most to say first."""
    sizes = scale(device)
    large = (sizes.large_batch, 4, 128, 128)
    builders: dict[str, Callable[[], Case]] = {
        "step-large": partial(step_case, sizes, large, False, True),
        "step-large-amg": partial(step_case, sizes, large, True, True),
    }
    for screened in (False, True):
        for batch in (1, 4, 16):
            name = f"top1-{batch}{'-codes' if screened else ''}"
            builders[name] = partial(search_case, sizes, batch, screened)
    return builders


def calls(device: str) -> dict[str, Callable[[], Case]]:
    """Builders by name of what is timed as called: small steps, and searches with their wait."""
    sizes, small = scale(device), (8, 4, 64, 64)
    return {
        "step-small": partial(as_called, partial(step_case, sizes, small, False, False)),
        "step-small-amg": partial(as_called, partial(step_case, sizes, small, True, False)),
        "top1-1-called": partial(as_called, partial(search_case, sizes, 1, False), 10),
        "top1-1-codes-called": partial(as_called, partial(search_case, sizes, 1, True), 10),
    }
