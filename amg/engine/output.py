"""What a request gets: its images in the type it asked for, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amg.engine.job import Job
from amg.pipelines.pictures import to_pil
from amg.verdict import Verdict


@dataclass
class SamplerOutput:
    """`images` as asked for by `output_type`, and `amg`, one `Verdict` per image. `nsfw_content_detected`:
    what the pipeline's safety checker said of each image; None without one, or of latents."""

    images: Any
    amg: list[Verdict]
    nsfw_content_detected: list[bool] | None = None


def output_of(job: Job, verdicts: Sequence[Verdict]) -> SamplerOutput:
    """The output of a request whose images are all finished."""
    finished = job.samples if job.output_type == "latent" else job.images
    images: Any = torch.cat([finished[place] for place in range(len(job))])
    if job.output_type == "latent":
        images = images.to(job.sample.dtype)
    elif job.output_type == "pil":
        images = to_pil(images)
    elif job.output_type == "np":
        images = images.permute(0, 2, 3, 1).cpu().numpy()
    return SamplerOutput(images, list(verdicts), None if job.safety is None else job.safety.flags)
