"""Pictures that the user puts in: image to image starts late on their noised latents, inpainting paints into
them. What is made of them is made by the pipeline's own methods, in the order in which its call draws."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from amg.guidance.predict import Conditions
from amg.pipelines.denoiser import CHANNELS, weights_of
from amg.pipelines.supported import IMG2IMG, INPAINT

if TYPE_CHECKING:
    from amg.engine.sampler import Request

TAKES: Mapping[str, tuple[str, ...]] = {
    IMG2IMG: ("image", "strength"),
    INPAINT: ("image", "mask_image", "strength"),
}
STRENGTH = {IMG2IMG: 0.8, INPAINT: 1.0}
ITS_OWN = ("height", "width", "latents")  # image to image has these of its picture


class Kept(NamedTuple):
    """What is kept of a picture outside a mask: mask [n, 1, h, w], 1 where it is painted; picture and noise
    [n, C, h, w], latents."""

    mask: Tensor
    picture: Tensor
    noise: Tensor

    def row(self, place: int) -> Kept:
        """Of one image."""
        return Kept(*(part[place : place + 1] for part in self))


class Begun(NamedTuple):
    """sample [n, C, h, w]: what a run starts from; channels [n, C + 1, h, w]: mask and masked picture that
    the network is given beside it, None: nothing; kept: what is not painted, None: all is."""

    sample: Tensor
    channels: Tensor | None = None
    kept: Kept | None = None


def kind_of(pipe: Any) -> str | None:
    """Which of the pipelines that a picture is put into, None: none of them."""
    return next((base.__name__ for base in type(pipe).__mro__ if base.__name__ in TAKES), None)


def keeps(pipe: Any) -> bool:
    """Whether an inpainting network is told nothing of the picture, which is kept by the loop instead."""
    return kind_of(pipe) == INPAINT and pipe.unet.config.in_channels == pipe.vae.config.latent_channels


def pictured(pipe: Any, request: Request) -> Request:
    """The request with its pictures [m, 3, H, W] in [-1, 1] and masks [m, 1, H, W] as its pipeline prepares
    them, and their size. ValueError naming the argument."""
    kind = kind_of(pipe)
    if kind is None:
        return request
    if kind == IMG2IMG:
        for name in ITS_OWN:
            if getattr(request, name) is not None:
                raise ValueError(f"`{name}` must be None for {kind}, which has it of its `image`, got one")
    strength = STRENGTH[kind] if request.strength is None else float(request.strength)
    if not 0 <= strength <= 1:
        raise ValueError(f"`strength` must be in [0, 1], got {strength}")
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    size = {} if kind == IMG2IMG else {"height": request.height or own, "width": request.width or own}
    image = _prepared(pipe.image_processor, "image", request.image, size).float()
    if image.shape[1] != 3:
        raise ValueError(f"`image` must be a picture of 3 channels, not latents, got {list(image.shape)}")
    mask = None
    if kind == INPAINT:
        mask = _prepared(pipe.mask_processor, "mask_image", request.mask_image, size)
    height, width = image.shape[2:]
    found: dict[str, Any] = {
        "image": image,
        "mask_image": mask,
        "strength": strength,
        "height": height,
        "width": width,
    }
    return replace(request, **found)


def _prepared(processor: Any, name: str, given: Any, size: Mapping[str, int]) -> Tensor:
    if given is None:
        raise ValueError(f"`{name}` must be given for a pipeline that paints into a picture, got None")
    try:
        found: Tensor = processor.preprocess(given, **size)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"`{name}` must be pictures that the pipeline takes, got {type(given).__name__}: {error}"
        ) from error
    return found


def require_shared_out(request: Request, batch: int) -> None:
    """ValueError where pictures and masks are not as many as can be shared out among the images."""
    for name in ("image", "mask_image"):
        given = getattr(request, name)
        if given is not None and batch % len(given):
            raise ValueError(
                f"`{name}` must be one picture, or as many as divide {batch} images, got {len(given)}"
            )


def first_step(request: Request, scheduler: Any) -> int:
    """The step of a scheduler with its timesteps set that a request begins with; ValueError where `strength`
    leaves none."""
    listed = request.timesteps is not None or request.sigmas is not None
    steps = len(scheduler.timesteps) if listed else request.num_inference_steps
    assert request.strength is not None and steps is not None
    made = min(int(steps * request.strength), steps)
    if made < 1:
        raise ValueError(f"`strength` must leave one of {steps} steps, got {request.strength}")
    return (steps - made) * int(getattr(scheduler, "order", 1))


def begin(pipe: Any, request: Request, scheduler: Any, first: int, generator: Any, batch: int) -> Begun:
    """Draw what a run of `batch` images starts from. scheduler: a copy that makes step `first` first."""
    own = copy.copy(pipe)
    vars(own)["scheduler"] = scheduler
    dtype, device = weights_of(pipe.unet)[0], pipe._execution_device
    t = scheduler.timesteps[first : first + 1].to(device).repeat(batch)
    if request.mask_image is None:
        return Begun(own.prepare_latents(request.image, t, batch, 1, dtype, device, generator))
    channels, size = pipe.vae.config.latent_channels, (request.height, request.width)
    drawn = own.prepare_latents(
        *(batch, channels, *size, dtype, device, generator, request.latents),
        image=request.image,
        timestep=t,
        is_strength_max=request.strength == 1,
        return_noise=True,
        return_image_latents=keeps(pipe),
    )
    masked = request.image * (request.mask_image < 0.5)
    mask, masked = own.prepare_mask_latents(
        request.mask_image, masked, batch, *size, dtype, device, generator, False
    )
    if keeps(pipe):
        return Begun(drawn[0], kept=Kept(mask.float(), drawn[2].float(), drawn[1].float()))
    return Begun(drawn[0], torch.cat([mask, masked], 1))


def begin_again(pipe: Any, request: Request, scheduler: Any, first: int, generator: Any, place: int) -> Begun:
    """What a later try of the image `place` starts from: fresh noise on its own picture."""
    parts = {
        name: given[place % len(given)][None]
        for name in ("image", "mask_image")
        if (given := getattr(request, name)) is not None
    }
    one = replace(request, latents=None, **parts)
    return begin(pipe, one, scheduler, first, generator, 1)


def beside(conditions: Conditions, channels: Tensor | None) -> Conditions:
    """The conditions, with what the network is given beside its sample."""
    if channels is None:
        return conditions
    own = {**conditions.cond, CHANNELS: channels}
    other = None if conditions.uncond is None else {**conditions.uncond, CHANNELS: channels}
    return Conditions(own, other, conditions.shared)
