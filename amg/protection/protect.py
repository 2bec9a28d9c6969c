"""`protect`: a diffusers pipeline in, the same object out, whose calls are guided and whose images are
checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from amg.config import AMGConfig
from amg.guidance.gate import Gate
from amg.guidance.ordinary import warn_without_captions
from amg.pipelines.denoiser import is_latent
from amg.pipelines.identity import asked, gate_of, refit, require_indexes, screen_of
from amg.pipelines.pictures import to_pil, to_tensor
from amg.pipelines.safety import SafetyCheck, flagged_pictures_kept_right, safety_of
from amg.pipelines.supported import require_supported
from amg.promise import decode
from amg.protection.deliver import deliver
from amg.protection.hook import Session, guided_call
from amg.similarity.student import Screen
from amg.verdict import Verdict


@dataclass(frozen=True)
class Protection:
    """What a protected pipeline carries: the index, the config for its metric, and further judges of the
    final check."""

    index: Any
    config: AMGConfig
    also: tuple[Any, ...]
    gate: Gate | None
    screen: Screen | None


def protect(pipe: Any, index: Any, config: AMGConfig | None = None, also: Sequence[Any] = ()) -> Any:
    """Make every call of `pipe` guided away from `index` and checked against it; returns the same object.

    pipe: a DDPMPipeline, DDIMPipeline or StableDiffusionPipeline (a subclass too), with any scheduler.
    index: an `amg.Index`. config: an `AMGConfig` (default: the preset `main`). also: more indexes the
    finished images are held to. The pipeline's call keeps its arguments and its result, which gains `.amg`, a
    list of `Verdict`; it is also kept as `pipe.amg_verdicts` (for `return_dict=False`). Pixel pipelines whose
    U-Net is class-conditional additionally take `class_labels` (int64 [B]; default: the null class) and
    `guidance_scale`. A pipeline protected already is protected anew. Errors: TypeError for another pipeline;
    ValueError for a `guidance_interval`; RuntimeError, from a call, for a loop that does not call its U-Net
    once before each step of its scheduler; whatever prevents a check is raised, never an unchecked image; an
    error here leaves the pipeline as it was, protected by what protected it before.
    """
    require_supported(pipe)
    also = require_indexes(index, also)
    config = asked(config).for_metric(index.metric)
    if config.guidance_interval != (0.0, 1.0):
        raise ValueError(
            "`guidance_interval` must be (0, 1) for `protect`, whose pipeline's own loop guides every step, "
            f"got {config.guidance_interval}: use `amg.Sampler`"
        )
    protection = Protection(index, config, also, gate_of(config), screen_of(config, pipe, index))
    if is_latent(pipe) and config.active:
        warn_without_captions(index)
    guarded: Any = _protected(_plain(type(pipe)))
    pipe.__class__ = guarded  # nothing can fail from here on: the new protection takes the old one's place
    pipe._amg_protection = protection
    pipe.__dict__.pop("amg_verdicts", None)
    return pipe


def unprotect(pipe: Any) -> Any:
    """Restore a protected pipeline to what it was; returns the same object."""
    plain = _plain(type(pipe))
    if plain is type(pipe):
        raise ValueError("`pipe` must be a protected pipeline, got one that `amg.protect` has not seen")
    pipe.__class__ = plain
    del pipe._amg_protection
    pipe.__dict__.pop("amg_verdicts", None)
    return pipe


def _plain(kind: type) -> Any:
    """The pipeline's own class, whether `kind` is that or the protected one made of it."""
    return vars(kind).get("_amg_plain", kind)


@functools.cache
def _protected(kind: type) -> type:
    """A subclass of the pipeline's class, of the same name, whose call is guided and checked."""
    call = kind.__call__  # type: ignore[operator]

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, call, args, kwargs)

    if not issubclass_by_name(kind, "StableDiffusionPipeline"):
        __call__.__signature__ = _with_classes(call)  # type: ignore[attr-defined]
    return type(
        kind.__name__,
        (kind,),
        {
            "__call__": __call__,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
            "_amg_plain": kind,
        },
    )


def _with_classes(call: Any) -> inspect.Signature:
    signature, word = inspect.signature(call), inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter("class_labels", word, default=None),
        inspect.Parameter("guidance_scale", word, default=None),
    ]
    return signature.replace(parameters=[*signature.parameters.values(), *more])


def issubclass_by_name(kind: type, name: str) -> bool:
    """Whether a class of that name is among the bases; pipelines are told apart without importing them."""
    return any(base.__name__ == name for base in kind.__mro__)


def _call(pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    protection: Protection = pipe._amg_protection
    for index in (protection.index, *protection.also):
        index.seal.check()  # before any work, and before a truncated map is touched
    require_supported(pipe)
    refit(protection.screen, pipe)
    session = Session(pipe, *vars(protection).values())
    if not is_latent(pipe):
        session.class_labels, session.class_scale = (
            kwargs.pop("class_labels", None),
            kwargs.pop("guidance_scale", None),
        )
    bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    steps = bound.arguments.get("num_inference_steps")
    if steps is not None and steps < 1:
        raise ValueError(f"`num_inference_steps` must be >= 1, got {steps}")
    scale = session.scale if session.class_conditional else bound.arguments.get("guidance_scale")
    protection.config.warn_without_guidance(scale, stacklevel=4)
    session.prompt = bound.arguments.get("prompt")
    session.images_per_prompt = bound.arguments.get("num_images_per_prompt") or 1
    with guided_call(session), flagged_pictures_kept_right(pipe):
        result = call(pipe, *args, **kwargs)
    images = result[0] if isinstance(result, tuple) else result.images
    safety = _safety(session, result)
    images, verdicts = _deliver(session, images, bound.arguments["output_type"], protection.also, safety)
    pipe.amg_verdicts = verdicts
    if isinstance(result, tuple):
        return (images, *(result[1:] if safety is None else (safety.flags, *result[2:])))
    result.images = images
    result.amg = verdicts
    if safety is not None:
        result.nsfw_content_detected = safety.flags
    return result


def _safety(session: Session, result: Any) -> SafetyCheck | None:
    """The pipeline's safety checker, which replacements are shown to, with its flags of the images so far."""
    flags = None
    if is_latent(session.pipe):
        flags = result[1] if isinstance(result, tuple) else result.nsfw_content_detected
    if flags is None or session.conditions is None:  # there is none, or latents were asked for
        return None
    return safety_of(session.pipe, flags, session.conditions.cond["encoder_hidden_states"].dtype)


def _deliver(
    session: Session, images: Any, output_type: str, also: Sequence[Any], safety: SafetyCheck | None
) -> tuple[Any, list[Verdict]]:
    """Check what the pipeline would hand out, and replace what breaks the promise in the pipeline's own
    output type."""
    run, conditions = session.run, session.conditions
    if run is None or conditions is None:
        raise RuntimeError(
            "the pipeline finished without one call of its U-Net: its images cannot be checked"
        )
    if output_type == "latent":
        sample = images
        pictures = decode(run.guide.denoiser, sample)
    else:
        pictures = to_tensor(images)
        sample = session.blank
    delivery = deliver(pictures, sample, run, conditions, session.flights, also, safety)
    if not delivery.replaced:
        return images, delivery.verdicts
    if output_type == "latent":
        return delivery.sample, delivery.verdicts
    return _replace(images, delivery.images, delivery.replaced), delivery.verdicts


def _replace(images: Any, new: Tensor, rows: list[int]) -> Any:
    if isinstance(images, Tensor):
        images = images.clone()
        images[rows] = new[rows].to(images.device, images.dtype)
    elif isinstance(images, np.ndarray):
        images = images.copy()
        images[rows] = new[rows].permute(0, 2, 3, 1).cpu().numpy()
    else:
        images = list(images)
        for row, picture in zip(rows, to_pil(new[rows]), strict=True):
            images[row] = picture
    return images
