"""Exact counts of a sampling call's work, and its peak memory; the library knows of neither."""

from __future__ import annotations

import copy
import ctypes
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amg.index.index import Index

# Rows, so a batch of four with classifier-free guidance is eight U-Net evaluations. "gradients" are those of
# the similarity, through embedder and decoder; "unet_gradients" pass the U-Net as well.
COUNTED = ("unet_evaluations", "vae_decodes", "embeddings", "searches", "gradients", "unet_gradients")


class CountedIndex(Index):
    """An index that counts its queries, those of the copies made by `with_searcher` included."""

    counter: Counter[str]

    def nearest(self, vectors: Tensor) -> Any:
        self.counter["searches"] += len(vectors)
        return super().nearest(vectors)

    def closest(self, images: Tensor) -> Any:
        self.counter["searches"] += len(images)
        return super().closest(images)

    def search(self, queries: Any, k: int = 1) -> Any:
        self.counter["searches"] += len(queries)
        return super().search(queries, k)


class CountedEmbedder:
    """An embedder that counts the images it is given, and those whose gradient is wanted."""

    def __init__(self, embedder: Any, counts: Counter[str]):
        self.embedder, self.counts = embedder, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.embedder, name)

    def __call__(self, images: Tensor) -> Tensor:
        self.counts["embeddings"] += len(images)
        if images.requires_grad and torch.is_grad_enabled():
            self.counts["gradients"] += len(images)
        return self.embedder(images)


def counted_index(index: Index, counts: Counter[str]) -> CountedIndex:
    """A copy of `index` that shares its rows and counts into `counts`."""
    counted: Any = copy.copy(index)
    counted.__class__, counted.counter = CountedIndex, counts
    if index.embedder is not None:
        counted.embedder = CountedEmbedder(index.embedder, counts)
    return counted


def count_pipeline(pipe: Any, counts: Counter[str]) -> None:
    """Count the U-Net's and the decoder's rows from now on, whoever calls them."""

    def after_unet(module: Any, inputs: Any, output: Any) -> None:
        counts["unet_evaluations"] += len(output[0])
        if output[0].requires_grad:
            counts["unet_gradients"] += len(output[0])

    pipe.unet.register_forward_hook(after_unet)
    decode = pipe.vae.decode

    def counted(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        counts["vae_decodes"] += len(latents)
        return decode(latents, *arguments, **options)

    pipe.vae.decode = counted


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call; on a GPU until it has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_mib(call: Callable[[], object], device: str) -> float:
    """MiB one call needs at its peak beyond what was held before.

    CPU: the resident set's high-water mark (VmHWM, reset before) less what was resident (VmRSS), after glibc
    has given back what it kept of freed memory. GPU: the allocator's own high-water mark.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = status_mib("VmRSS")
    call()
    return status_mib("VmHWM") - resident


def status_mib(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
