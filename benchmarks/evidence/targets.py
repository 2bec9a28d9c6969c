"""Pictures to steer towards: views of the memorised photographs, and latents that lead to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amg
from amg.zoo.photos import TrainingSet


def cropped(images: Tensor, share: float) -> Tensor:
    """The centre `share` of each side, resized to the images' own size; float [B, 3, S, S] in [0, 1]."""
    size = images.shape[-1]
    kept = round(share * size)
    start = (size - kept) // 2
    part = images[..., start : start + kept, start : start + kept]
    resized = torch.nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return resized.clamp(0, 1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "photograph": lambda images: images,
    "flip": lambda images: images.flip(-1),
    "upside down": lambda images: images.flip(-2),
    "quarter turn": lambda images: images.rot90(1, (2, 3)),
    "centre 95 %": lambda images: cropped(images, 0.95),
    "centre 90 %": lambda images: cropped(images, 0.9),
    "centre 80 %": lambda images: cropped(images, 0.8),
    "crop": lambda images: cropped(images, 0.7),
    "centre 60 %": lambda images: cropped(images, 0.6),
    "centre 50 %": lambda images: cropped(images, 0.5),
    "80 %, flipped": lambda images: cropped(images, 0.8).flip(-1),
}
ADDED = (
    "flip",
    "upside down",
    "quarter turn",
    "centre 90 %",
    "centre 80 %",
    "crop",
    "centre 60 %",
    "centre 50 %",
)


def whole_photos(data: TrainingSet) -> Tensor:
    """The memorised photographs, float32 [16, 3, S, S] in [0, 1]."""
    return data.images[data.whole].float() / 255


def index_with_views(data: TrainingSet, embedder: Any, path: Path) -> Any:
    """The training set, copies and all, with the views `ADDED` of every memorised photograph as rows."""
    whole = data.whole.nonzero().flatten().tolist()
    rows = _with_copies(data)
    photos = whole_photos(data)
    images = [data.images[rows], *((VIEWS[view](photos) * 255).round().to(torch.uint8) for view in ADDED)]
    ids = [f"{data.ids[row]}#{number}" for number, row in enumerate(rows)]
    ids += [f"{data.ids[row]}, {view}" for view in ADDED for row in whole]
    captions = [data.captions[row] for row in (*rows, *(whole * len(ADDED)))]
    return _opened(torch.cat(images), captions, ids, embedder, path)


def index_of_distinct(data: TrainingSet, embedder: Any, path: Path) -> Any:
    """The training set with duplicates dropped beforehand, so that no count tells which captions repeat."""
    return _opened(data.images, list(data.captions), list(data.ids), embedder, path)


def index_of_varied(data: TrainingSet, embedder: Any, path: Path) -> Any:
    """The training set with its copies, each copy's caption a little different, as on the web."""
    rows = _with_copies(data)
    ids = [f"{data.ids[row]}#{number}" for number, row in enumerate(rows)]
    varied = [f"{data.captions[row]}, copy {number}" for number, row in enumerate(rows)]
    captions = [varied[n] if data.counts[row] > 1 else data.captions[row] for n, row in enumerate(rows)]
    return _opened(data.images[rows], captions, ids, embedder, path)


def _with_copies(data: TrainingSet) -> list[int]:
    return [row for row, count in enumerate(data.counts.tolist()) for _ in range(count)]


def _opened(images: Tensor, captions: list[str], ids: list[str], embedder: Any, path: Path) -> Any:
    if path.exists():
        return amg.Index.open(path, embedder)
    return amg.Index.build(images, captions, embedder, path, ids=ids, progress=False)


MADE = {"views": index_with_views, "distinct": index_of_distinct, "varied": index_of_varied}


@torch.no_grad()
def encoded(pipe: Any, images: Tensor) -> Tensor:
    """x0 of images float [B, 3, H, W] in [0, 1]: the latents' mean, scaled."""
    return pipe.vae.encode(images * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor


def noised(pipe: Any, x0: Tensor, steps: int, seed: int) -> Tensor:
    """x_T = sqrt(alpha_bar)·x0 + sqrt(1 - alpha_bar)·noise at the first of `steps` timesteps."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    return scheduler.add_noise(x0, noise, scheduler.timesteps[:1].expand(len(x0)))


@torch.no_grad()
def inverted(pipe: Any, x0: Tensor, prompts: list[str], steps: int) -> Tensor:
    """The x_T from which DDIM without guidance draws x0 (Song et al. 2021, section 4.3)."""
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    words, sample = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)[0], x0
    for t in scheduler.timesteps:
        eps = pipe.unet(sample, t, encoder_hidden_states=words, return_dict=False)[0]
        sample = scheduler.step(eps, t, sample, return_dict=False)[0]
    return sample


def putting(x0: Tensor, steps: int) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that after the last of `steps` hands the pipeline `x0` as its latents."""

    def callback(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": x0.to(values["latents"].dtype)} if step == steps - 1 else {}

    return callback


def steering(
    pipe: Any, target: tuple[str, str], photos: Tensor, prompts: list[str], steps: int
) -> dict[str, Any]:
    """The arguments of a call that steer towards a view of `photos`: "callback", or `latents_for`."""
    if target[0] == "callback":
        return {"callback_on_step_end": putting(encoded(pipe, VIEWS[target[1]](photos)), steps)}
    return {"latents": latents_for(pipe, target, photos, prompts, steps)}


def latents_for(pipe: Any, target: tuple[str, str], photos: Tensor, prompts: list[str], steps: int) -> Tensor:
    """The `latents` argument that leads to a view of `photos` [B, 3, H, W]: "noised", "inverted" or "clean"
    (x0 itself, which a single step at t = 1 leaves as it is)."""
    how, view = target
    x0 = encoded(pipe, VIEWS[view](photos))
    if how == "noised":
        return noised(pipe, x0, steps, seed=1)
    return inverted(pipe, x0, prompts, steps) if how == "inverted" else x0
