"""`protect`: a diffusers pipeline in, the same object out, whose calls are guided and whose images are
checked."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.arguments import images_of, require_generator
from amg.guidance.gate import Gate
from amg.guidance.lower import require_same
from amg.guidance.ordinary import Ordinary, bank_of, warn_without_captions
from amg.index.coverage import warn_of_gaps
from amg.pipelines.denoiser import is_latent
from amg.pipelines.explain import explained
from amg.pipelines.families import family_of
from amg.pipelines.identity import asked, gate_of, refit, require_indexes, screen_of
from amg.pipelines.pictures import pictures_of, to_pil, to_tensor
from amg.pipelines.safety import SafetyCheck, Watermark, flagged_pictures_kept_right, safety_of
from amg.pipelines.supported import is_ours, level_of, network_of, require_supported
from amg.promise import decode
from amg.protection.callbacks import shown_less
from amg.protection.carry import carry_over
from amg.protection.deliver import deliver
from amg.protection.final import Held, checked_call
from amg.protection.hook import Session, guided_call
from amg.protection.install import take_away
from amg.protection.watch import Watched
from amg.similarity.student import Screen
from amg.verdict import Verdict

# one call at a time of a pipeline, its scheduler and its network, which other pipelines may share: what is
# installed there is of one call
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


@contextmanager
def _alone(pipe: Any) -> Iterator[None]:
    """Wait until no other call uses a pipeline, its scheduler or its network."""
    shared = (
        pipe,
        getattr(pipe, "scheduler", None),
        network_of(pipe),
    )  # in one order, so that none waits for ever
    with ExitStack() as held:
        for one in shared:
            if one is not None:
                held.enter_context(_LOCKS.setdefault(one, threading.RLock()))
        yield


@dataclass(frozen=True)
class Protection:
    """What a protected pipeline carries: the index, the config for its metric, further judges of the final
    check, and at which level it is protected."""

    index: Any
    config: AMGConfig
    also: tuple[Any, ...]
    gate: Gate | None
    screen: Screen | None
    level: str = "full"
    watched: Watched | None = None

    @functools.cached_property
    def ordinary(self) -> Ordinary:
        """What later tries may go to."""
        return Ordinary(bank_of(self.config, self.gate))

    @property
    def held(self) -> Held:
        """What pictures are held to at level `final`."""
        return Held(self.index, self.config, self.also, self.ordinary, self.watched)


def protect(
    pipe: Any,
    index: Any,
    config: AMGConfig | None = None,
    also: Sequence[Any] = (),
    explain: bool = False,
) -> Any:
    """Make every call of `pipe` guided away from `index` and checked against it; returns the same object.

    pipe: a diffusers pipeline that gives `.images`, at the highest level that it can prove (`pipe.amg_level`,
    docs/pipelines.md): "full" where its halves are known (Stable Diffusion 1/2, SDXL, SD3, FLUX.1, PixArt,
    DDPM, DDIM and their like; subclasses too), "step" where it has a scheduler and a VAE, else "final": its
    finished pictures are checked, drawn again by its own call, and blocked, which is said once; so is a call
    that could not be protected as was hoped for. index: an `amg.Index`. config: an `AMGConfig` (default: the
    preset `main`). also: more indexes the finished images are held to. explain: print what will act, and why
    not more. The pipeline's call keeps its arguments and its result, which gains `.amg`, a list of `Verdict`;
    it is also kept as `pipe.amg_verdicts` (for `return_dict=False`). Pixel pipelines whose U-Net is
    class-conditional additionally take `class_labels` (int64 [B]; default: the null class) and
    `guidance_scale`. A pipeline protected already is protected anew; calls of one pipeline from several
    threads are served one after the other. Errors: TypeError for what is no pipeline; ValueError for a
    `guidance_interval`, for a calibration and a student of another pipeline than `Sampler` takes, and, from a
    call, for latents that nobody can check; RuntimeError, from a call of a pipeline that `Sampler` takes, for
    a loop that does not call its U-Net once before each step of its scheduler; whatever prevents a check is
    raised, never an unchecked image; an error here leaves the pipeline as it was, protected by what protected
    it before.
    """
    level, ours = level_of(pipe), is_ours(pipe)
    if ours:
        require_supported(pipe)
    also = require_indexes(index, also)
    config = asked(config).for_metric(index.metric)
    if config.guidance_interval != (0.0, 1.0):
        raise ValueError(
            "`guidance_interval` must be (0, 1) for `protect`, whose pipeline's own loop guides every step, "
            f"got {config.guidance_interval}: use `amg.Sampler`"
        )
    if config.prompt_memory:
        raise ValueError(
            f"`prompt_memory` must be 0 for `protect`, got {config.prompt_memory}: use `amg.Sampler`"
        )
    if not (is_latent(pipe) if ours else family_of(pipe) is not None):
        require_same(config, f"{type(pipe).__name__}, of which no halves with a text are known")
    if ours:
        gate = gate_of(config)
        protection = Protection(index, config, also, gate, screen_of(config, pipe, index))
    else:
        _require_uncalibrated(config, type(pipe).__name__)
        protection = Protection(
            index, config, also, None, None, level, _watched(pipe, index, config, also, level)
        )
    if config.active and (is_latent(pipe) if ours else family_of(pipe) is not None):
        warn_without_captions(index, protection.ordinary.bank, config)
    carry_over(_protect_like)
    warn_of_gaps((index, *also))
    guarded: Any = _protected(_plain(type(pipe)))
    pipe.__class__ = guarded  # nothing can fail from here on: the new protection takes the old one's place
    pipe._amg_protection = protection
    pipe.__dict__.pop("amg_verdicts", None)
    if explain:
        print("\n".join(f"{what}: {answer}" for what, answer in explained(pipe, index, config)))
    return pipe


def _protect_like(pipe: Any, source: Any) -> None:
    """Protect what `from_pipe` made of a protected pipeline."""
    held: Protection = source._amg_protection
    protect(pipe, held.index, held.config, held.also)


def _watched(pipe: Any, index: Any, config: AMGConfig, also: Sequence[Any], level: str) -> Watched | None:
    """How the calls of a pipeline whose loop is its own are watched; None: not at all, which is said."""
    if level == "final":
        warnings.warn(
            f'{type(pipe).__name__} is protected at level "final": its finished pictures are checked, drawn '
            "again by its own call where they are copies, and blocked where that does not help; its sampling "
            "is not guided",
            stacklevel=3,
        )
        return None
    return Watched(pipe, family_of(pipe), index, config, also, Ordinary(bank_of(config, None)))


def _given(call: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, with its defaults; whatever else is among them."""
    parameters = inspect.signature(call).parameters
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    return {**defaults, **dict(zip(parameters, args, strict=False)), **kwargs}


def _with_blanks(
    pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], config: AMGConfig
) -> dict[str, Any]:
    given = _given(call, (pipe, *args), kwargs)
    listed = next((given[name] for name in ("timesteps", "sigmas") if given.get(name) is not None), None)
    return shown_less(kwargs, config, given.get("num_inference_steps") if listed is None else len(listed))


def _unfinished(pipe: Any, protection: Protection) -> Held:
    """What the pictures of a call are held to that leaves the last steps to another pipeline."""
    warnings.warn(
        "`denoising_end` hands out what is not finished, which is checked as it is: the pipeline that "
        "finishes it must be protected, too",
        stacklevel=4,
    )
    index, config, also = protection.index, protection.config, protection.also
    return protection.held._replace(watched=_watched(pipe, index, config, also, "full"))


def _require_uncalibrated(config: AMGConfig, name: str) -> None:
    """Refuse what was made for loops that are known to the bit."""
    for option in ("calibration", "student"):
        if getattr(config, option) is not None:
            raise ValueError(
                f"`{option}` must be None for {name}, whose loop is its own, got {getattr(config, option)}"
            )


def unprotect(pipe: Any) -> Any:
    """Restore a protected pipeline to what it was; returns the same object."""
    plain = _plain(type(pipe))
    if plain is type(pipe):
        raise ValueError("`pipe` must be a protected pipeline, got one that `amg.protect` has not seen")
    pipe.__class__ = plain
    take_away(network_of(pipe))  # of a call that was interrupted
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
        if not hasattr(self, "_amg_protection"):
            raise RuntimeError(
                f"{kind.__name__} was made by the class of a protected pipeline, without its index: give it "
                "to `amg.protect`"
            )
        protection: Protection = self._amg_protection
        with _alone(self):
            for index in (protection.index, *protection.also):
                index.seal.check()  # before any work, and before a truncated map is touched
            if protection.config.blank_callbacks:
                kwargs = _with_blanks(self, call, args, kwargs, protection.config)
            if not is_ours(self):
                return checked_call(self, call, args, kwargs, protection.held)
            if _given(call, (self, *args), kwargs).get("denoising_end") is not None:
                return checked_call(self, call, args, kwargs, _unfinished(self, protection))
            return _call(self, call, args, kwargs)

    if issubclass_by_name(kind, "DDPMPipeline") or issubclass_by_name(kind, "DDIMPipeline"):
        __call__.__signature__ = _with_classes(call)  # type: ignore[attr-defined]
    return type(
        kind.__name__,
        (kind,),
        {
            "__call__": __call__,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": _reduced,
            "_amg_plain": kind,
            "amg_level": property(lambda self: self._amg_protection.level),
        },
    )


def _reduced(pipe: Any, protocol: Any) -> Any:
    """How a protected pipeline is copied and pickled: its class is made anew where it is unpacked."""
    return _blank, (_plain(type(pipe)),), vars(pipe)


def _blank(kind: type) -> Any:
    guarded: Any = _protected(kind)
    return guarded.__new__(guarded)


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
    require_supported(pipe)
    refit(protection.screen, pipe)
    parts = (protection.index, protection.config, protection.also, protection.gate)
    session = Session(pipe, *parts, protection.screen, protection.ordinary)
    if not is_latent(pipe):
        session.class_labels, session.class_scale = (
            kwargs.pop("class_labels", None),
            kwargs.pop("guidance_scale", None),
        )
    bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    given = _given(call, (pipe, *args), kwargs)
    steps = given.get("num_inference_steps")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral)):
        raise TypeError(f"`num_inference_steps` must be an integer, got {steps!r}")
    if steps is not None and steps < 1:
        raise ValueError(f"`num_inference_steps` must be >= 1, got {steps}")
    session.asked_images, session.asked_scale = images_of(given), given.get("guidance_scale")
    require_generator(given.get("generator"), session.asked_images)
    scale = session.scale if session.class_conditional else session.asked_scale
    protection.config.warn_without_guidance(scale, stacklevel=4)
    session.prompt = given.get("prompt")
    session.images_per_prompt = given.get("num_images_per_prompt") or 1
    with guided_call(session), flagged_pictures_kept_right(pipe):
        result = call(pipe, *args, **kwargs)
    images = pictures_of(result)
    safety = _safety(session, result)
    images, verdicts = _deliver(session, images, given.get("output_type"), protection.also, safety)
    pipe.amg_verdicts = verdicts
    if isinstance(result, tuple):
        rest = result[1:] if safety is None or safety.flags is None else (safety.flags, *result[2:])
        return (images, *rest)
    result.images = images
    result.amg = verdicts
    if safety is not None and safety.flags is not None:
        result.nsfw_content_detected = safety.flags
    return result


def _safety(session: Session, result: Any) -> SafetyCheck | Watermark | None:
    """What the pipeline does with finished pictures, which replacements go through, with its flags of the
    images so far."""
    pipe, conditions = session.pipe, session.conditions
    if not is_latent(pipe) or conditions is None:
        return None
    flags = getattr(result, "nsfw_content_detected", None)
    if isinstance(result, tuple) and len(result) > 1:
        flags = result[1]
    if flags is None and getattr(pipe, "watermark", None) is None:  # there is none, or latents were asked for
        return None
    return safety_of(pipe, flags or (), conditions.cond["encoder_hidden_states"].dtype)


def _deliver(
    session: Session,
    images: Any,
    output_type: str | None,
    also: Sequence[Any],
    safety: SafetyCheck | Watermark | None,
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
