"""Drawing what the plan says, batch by batch, going on where an earlier run stopped."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from amg.commands.audit.environment import environment
from amg.commands.audit.folder import complete, hold_guidance, keep
from amg.commands.audit.plan import Job, Plan, condition
from amg.commands.progress import bar


@torch.no_grad()
def draw(pipe: Any, index: Any, also: Sequence[Any], plan: Plan, out: Path, device: str) -> None:
    """Draw every job that has no complete picture yet; shows progress per guidance.

    Each guidance gets a folder of its own under `out`. One generator per picture, seeded by its job, so a
    picture is the same in any batch. Interrupting loses at most the batch being drawn.
    """
    from amg.engine.sampler import Sampler

    where = environment(device)
    for guidance in plan.guidances:
        folder = hold_guidance(out, guidance)
        waiting = [job for job in plan.jobs if not complete(folder, job)]
        if not waiting:
            continue
        sampler = Sampler(pipe, index, guidance.config, also)
        done, total = len(plan.jobs) - len(waiting), len(plan.jobs)
        with bar(total, guidance.name, done) as shown:
            for start in range(0, len(waiting), plan.batch_size):
                batch = waiting[start : start + plan.batch_size]
                _draw_batch(sampler, batch, plan.steps, folder, device, where)
                shown.update(len(batch))


def rehearse_all(pipe: Any, index: Any, also: Sequence[Any], plan: Plan) -> None:
    """Find every guidance's requests to be in order before the first picture is drawn."""
    from amg.commands.sample import rehearse
    from amg.engine.sampler import Sampler

    condition(pipe, plan.jobs)
    for guidance in plan.guidances:
        sampler = Sampler(pipe, index, guidance.config, also)
        rehearse(sampler, condition(pipe, plan.jobs[:1]), plan.steps)


def _draw_batch(
    sampler: Any, batch: Sequence[Job], steps: int, folder: Path, device: str, where: dict[str, str]
) -> None:
    generators = [torch.Generator().manual_seed(job.seed) for job in batch]
    out, seconds, peak = measured(
        lambda: sampler(
            **condition(sampler.pipe, batch),
            generator=generators,
            num_inference_steps=steps,
            output_type="pt",
            progress=False,
        ),
        device,
    )
    config = asdict(sampler.config)
    config["calibration"] = None if config["calibration"] is None else str(config["calibration"])
    flags: Sequence[bool | None] = out.nsfw_content_detected or [None] * len(batch)
    for job, image, verdict, nsfw in zip(batch, out.images, out.amg, flags, strict=True):
        record = {
            "seconds": seconds / len(batch),
            "batch": len(batch),
            "peak_mib": peak,
            "config": config,
            "environment": where,
            "nsfw": nsfw,
            "verdict": verdict.as_dict(),
        }
        keep(folder, job, image, record)


def measured(call: Callable[[], Any], device: str) -> tuple[Any, float, float | None]:
    """(result, seconds, peak MiB) of one call.

    Peak: on CUDA the allocator's high-water mark; on CPU the resident set's (VmHWM, reset before, after
    glibc has given back what it kept of freed memory), None where the system cannot tell.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    resettable = cuda or _reset_high_water()
    began = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    if cuda:
        return result, seconds, torch.cuda.max_memory_allocated(device) / 2**20
    return result, seconds, _high_water_mib() if resettable else None


def _reset_high_water() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:  # a sandbox that mounts /proc read-only
        return False
    return True


def _high_water_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
