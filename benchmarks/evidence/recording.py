"""Plain generations of `photos-sd` with everything a detector may look at, kept batch by batch on disk."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amg.commands.calibrate import EVERY_STEP, UNGUIDED
from amg.commands.demo import GUIDANCE_SCALES
from amg.config import AMGConfig
from amg.engine.sampler import Sampler
from amg.replacing import replacing
from amg.zoo.photos import PHOTOS, TrainingSet

MODEL = "photos-sd"
KINDS = ("memorised", "ordinary", "crossed", "particular")
BATCH = 16
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
PARTICULAR = (
    "Hand drawn turtle mascot of the Logo language in green ink on squared paper, 1983",
    "A small turtle walking across a programmer's desk, drawing by a student from Lisbon",
    "Green turtle emblem printed on the cover of a school notebook, spring term edition",
    "Turtle with a striped shell seen from above, logo of a software library, version two",
    "Grey gravel of a railway bed near Hamburg photographed after rain for a texture atlas",
    "Small stones from a river bank in Norway laid out by size under studio light",
    "Crushed granite gravel on a garden path, sample number twelve of the quarry catalogue",
    "Close view of dry gravel and sand used as a test texture by Brodatz, print fifty",
    "Handwritten notes on segmentation by a teaching assistant, blue pen, lecture of May 2011",
    "Page of a letter in hurried handwriting found in the archive of a museum in Delft",
    "Shopping list in neat handwriting on lined paper lit from the left by a lamp",
    "Handwriting sample of a left handed writer scanned at low contrast for a benchmark",
    "Silhouette of a horse galloping to the right, plate from Muybridge's motion studies",
    "The outline of a horse cut from black paper by a village artist, around 1900",
    "Black horse standing in profile on a white ground, binary mask for a shape data set",
    "Outline drawing of a heavy horse pulling nothing, emblem of a brewery in Yorkshire",
)


@dataclass(frozen=True)
class Job:
    """One image to draw: its prompt, the prompt's kind and the seed."""

    prompt: str
    kind: str
    seed: int


@dataclass(frozen=True)
class Generations:
    """N plain generations of T steps, float64.

    raw [N, T, 4]: ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩, ‖ε_u‖², ‖x_{t−1} − x_t‖², in the order of
    `amg.kernels.guided_step`; pixel_cosine [N, T]: cos(ε_u, ε_c − ε_u) over the channels of each pixel,
    averaged over pixels; similarity [N, T] of x0_hat and finished [N] of the final image to the nearest
    training image.
    """

    raw: Tensor
    pixel_cosine: Tensor
    similarity: Tensor
    finished: Tensor


def jobs_of(data: TrainingSet, counts: Sequence[int], seed: int) -> list[Job]:
    """`counts` images of each of `KINDS`, over as many distinct prompts of a kind as there are.

    memorised: the captions that all copies of a photograph share. ordinary: short captions in the manner of
    the crops' that no training image has. crossed: the first half of one memorised caption and the second
    half of another. particular: as long and particular as the memorised ones, of subjects the model
    knows from crops alone.
    """
    specific = [
        caption for caption, count in zip(data.captions, data.counts.tolist(), strict=True) if count > 1
    ]
    known = set(data.captions)
    ordinary = [
        f"a photo of {name}, {place}" for photo in PHOTOS for name in photo.subjects for place in PLACES
    ]
    crossed = [_half(a, 0) + " " + _half(b, 1) for a in specific for b in specific if a != b]
    prompts = {
        "memorised": specific,
        "ordinary": _shuffled([caption for caption in ordinary if caption not in known], seed),
        "crossed": _shuffled(crossed, seed),
        "particular": list(PARTICULAR),
    }
    wanted = [
        (prompts[kind][i % len(prompts[kind])], kind)
        for kind, n in zip(KINDS, counts, strict=True)
        for i in range(n)
    ]
    return [Job(prompt, kind, seed + place) for place, (prompt, kind) in enumerate(wanted)]


def _half(caption: str, which: int) -> str:
    words = caption.split()
    middle = len(words) // 2
    return " ".join(words[middle:] if which else words[:middle])


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    return random.Random(seed).sample(list(texts), len(texts))


def record(pipe: Any, index: Any, jobs: Sequence[Job], steps: int, folder: Path) -> Generations:
    """Draw `jobs` as plain diffusers would and measure every step; batches already in `folder` are not drawn
    again. Errors: ValueError where a kept batch is of other jobs."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in tqdm(range(0, len(jobs), BATCH), desc="record", unit="batch"):
        batch, path = jobs[start : start + BATCH], folder / f"{start:05d}.npz"
        if not path.exists():
            _keep(path, batch, draw(pipe, index, batch, steps))
        parts.append(_kept(path, batch))
    names = [field.name for field in fields(Generations)]
    return Generations(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _keep(path: Path, batch: Sequence[Job], drawn: Generations) -> None:
    arrays = {name: value.numpy().astype(np.float32) for name, value in vars(drawn).items()}
    with replacing(path) as partial:  # its name ends as that of `path`: numpy adds no second suffix
        np.savez_compressed(partial, jobs=[str(job) for job in batch], **arrays)


def _kept(path: Path, batch: Sequence[Job]) -> Generations:
    with np.load(path) as arrays:
        if arrays["jobs"].tolist() != [str(job) for job in batch]:
            raise ValueError(
                f"`--work` must hold recordings of the same prompts and seeds, got others in {path}"
            )
        names = [field.name for field in fields(Generations)]
        return Generations(**{name: torch.from_numpy(arrays[name]).double() for name in names})


@torch.no_grad()
def draw(pipe: Any, index: Any, batch: Sequence[Job], steps: int) -> Generations:
    """One batch, unguided, every output of the denoiser watched."""
    scale = GUIDANCE_SCALES[MODEL]
    config = AMGConfig.preset("main", guidance_scale=scale).for_metric(index.metric)
    sampler = Sampler(pipe, index, replace(config, **UNGUIDED, **EVERY_STEP))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    source = sampler.source
    source.denoiser = replace(source.denoiser, network=watched(source.denoiser.network, seen))
    out = sampler(
        [job.prompt for job in batch],
        generator=[torch.Generator().manual_seed(job.seed) for job in batch],
        num_inference_steps=steps,
        output_type="latent",
        progress=False,
    )
    raw, pixel_cosine = measured(seen, out.images)
    similarity = torch.tensor([[step.similarity for step in verdict.trace] for verdict in out.amg])
    finished = torch.tensor([verdict.similarity for verdict in out.amg])
    return Generations(raw, pixel_cosine, similarity.double(), finished.double())


def watched(
    network: Callable[..., Tensor], seen: list[tuple[Tensor, Tensor, Tensor]]
) -> Callable[..., Tensor]:
    """`network`, with x_t, ε_u and ε_c of every call under classifier-free guidance appended to `seen`."""

    def run(sample: Tensor, t: Any, **conditions: Any) -> Tensor:
        output = network(sample, t, **conditions)
        seen.append((sample.chunk(2)[0], *output.chunk(2)))
        return output

    return run


def measured(seen: Sequence[tuple[Tensor, Tensor, Tensor]], last: Tensor) -> tuple[Tensor, Tensor]:
    """`raw` [B, T, 4] and `pixel_cosine` [B, T] of T calls and the finished sample [B, C, H, W]."""
    samples = torch.stack([*(sample for sample, _, _ in seen), last]).double()
    uncond, cond = (torch.stack([call[part] for call in seen]).double() for part in (1, 2))
    gap = cond - uncond
    raw = [
        gap.square().flatten(2).sum(2),
        (uncond * gap).flatten(2).sum(2),
        uncond.square().flatten(2).sum(2),
        samples.diff(dim=0).square().flatten(2).sum(2),
    ]
    pixel_cosine = torch.cosine_similarity(uncond, gap, dim=2).flatten(2).mean(2)
    return torch.stack(raw, 2).transpose(0, 1), pixel_cosine.T
