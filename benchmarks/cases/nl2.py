"""nl2 against torch.cdist + topk, time and extra memory, on CIFAR-10 where its Parquet file is at hand."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from protocol import OURS, ROOT, Bar, Case, Provider
from torch import Tensor

import amg.kernels as kernels

CIFAR10 = ROOT.parent / "shared/data/cifar10/train.parquet"
COUNT, PIXELS, BATCH, K, ALPHA = 50_000, 3072, 64, 50, 0.5
QUERY_SETS = 2
RIVAL = "torch.cdist + topk"


def training_images(path: Path) -> Tensor:
    """uint8 [50000, 3072]: CIFAR-10, or smooth random images where the file is missing."""
    if not path.exists():
        coarse = torch.rand(COUNT, 3, 8, 8)
        return (torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") * 255).byte().flatten(1)
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(path, columns=["img"])
    encoded = (image["bytes"].as_py() for image in table["img"])
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1) for data in encoded]
    return torch.from_numpy(np.stack(pixels)).flatten(1)


def query_images(rows: Tensor) -> Tensor:
    """float [64, 3072] in [0, 1]: half near copies of training images, half blends of two."""
    near = rows[torch.randint(len(rows), (BATCH // 2,))] / 255 + 0.03 * torch.randn(BATCH // 2, PIXELS)
    pairs = rows[torch.randint(len(rows), (2, BATCH - BATCH // 2))].float() / 255
    return torch.cat([near.clamp(0, 1), pairs.mean(0)])


def ours(queries: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    return kernels.nl2(queries, rows, k=K, alpha=ALPHA)


def cdist_topk(queries: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
    """The same from fp32 rows in [0, 1]: value, row, distance, denominator."""
    nearest = torch.cdist(queries, pixels).topk(K, dim=1, largest=False)
    distances = nearest.values / pixels.shape[1] ** 0.5
    denominator = ALPHA * distances.mean(1)
    return distances[:, 0] / denominator, nearest.indices[:, 0], distances[:, 0], denominator


def check(rows: Tensor, pixels: Tensor, sets: list[Tensor]) -> dict[str, str]:
    """Hold ours to float64 direct differences; note the rival's error of the value."""
    lost = 0.0
    for queries in sets:
        exact = kernels.nl2(queries, rows, k=K, alpha=ALPHA, impl="reference")
        value, row, *_ = ours(queries, rows)
        if not torch.equal(row, exact.row) or not torch.allclose(value, exact.value, rtol=1e-6, atol=0):
            raise AssertionError("nl2: not the float64 answer")
        lost = max(lost, float((cdist_topk(queries, pixels)[0] / exact.value - 1).abs().max()))
    return {RIVAL: f"value off by up to {lost:.1e}", OURS: "exact rows"}


def extra_mib(rows: Tensor, queries: Tensor) -> dict[str, float]:
    """Peak memory of one call beyond its inputs, each contestant in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        threads = torch.get_num_threads()
        return {
            name: pool.apply(peak_of_call, (name, rows.numpy(), queries.numpy(), threads))
            for name in (OURS, RIVAL)
        }


def peak_of_call(name: str, rows: np.ndarray, queries: np.ndarray, threads: int) -> float:
    """MiB by which the resident set's high-water mark (VmHWM, reset before) exceeds what was resident."""
    torch.set_num_threads(threads)
    run, index = (
        (ours, torch.from_numpy(rows)) if name == OURS else (cdist_topk, torch.from_numpy(rows) / 255)
    )
    run(torch.from_numpy(queries[:2]), index[:100])  # code and threads are resident from here on
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    run(torch.from_numpy(queries), index)
    return status_mib("VmHWM") - before


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def pixel_case(path: Path, threads: int) -> Case:
    """64 queries among 50,000 images; the rival's rows are converted to fp32 beforehand, untimed."""
    rows = training_images(path)
    pixels, sets = rows / 255, [query_images(rows) for _ in range(QUERY_SETS)]
    providers = (
        Provider(OURS, lambda i: ours(sets[i], rows), rows.numel()),
        Provider(RIVAL, lambda i: cdist_topk(sets[i], pixels), 4 * rows.numel()),
    )
    bars = (Bar("x cdist + topk", (RIVAL,), 3), Bar("x less extra memory", (RIVAL,), 10, "extra MiB"))
    data = "CIFAR-10" if path.exists() else "random images"
    name = f"{COUNT // 1000}k x {PIXELS} uint8 ({data}), B = {BATCH}, k = {K}"
    run, memory = partial(check, rows, pixels, sets), partial(extra_mib, rows, sets[0])
    return Case("nl2", name, threads, QUERY_SETS, providers, bars, run, memory)


def cases() -> dict[str, tuple[int, Callable[[int], Case]]]:
    return {"nl2": (2, partial(pixel_case, CIFAR10))}
