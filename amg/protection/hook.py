"""How guidance reaches into a pipeline's own loop: a hook on its U-Net and a wrapper around its scheduler's
step.

The hook only records what the U-Net was given and gave. The wrapped step guides it and puts the guided output
in place of the pipeline's own in the rows that it changes; all others, the update and the noise are the
pipeline's, bit for bit. There rewound rows are replaced, too. Both exist only during one call of the
pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.drive import pristine
from amg.extras import needed
from amg.guidance.flight import Flight, texts_of
from amg.guidance.gate import Gate
from amg.guidance.lower import later
from amg.guidance.ordinary import Ordinary
from amg.guidance.predict import Conditions, joined, plain, predict
from amg.guidance.terms import classifier_free
from amg.pipelines.denoiser import class_conditions, denoiser_for, is_latent, split_call
from amg.pipelines.identity import key_for
from amg.protection.catch_up import Run, advance
from amg.protection.group import Group
from amg.protection.guide import Guide, note_moves
from amg.protection.install import CallHook, installed
from amg.protection.rewind import merge_history, rewound
from amg.similarity import judges_for, similarity_for
from amg.similarity.student import Screen

UNETS = needed("diffusers.models.unets.unet_2d", "`amg.protect`")


class Call(NamedTuple):
    """One call of the U-Net: its input and its raw output's halves of each of B samples, [B, C, H, W],
    `uncond` None without classifier-free guidance, and what they were conditioned on."""

    model_input: Tensor
    uncond: Tensor | None
    cond: Tensor
    conditions: Conditions


class Session:
    """One call of a protected pipeline: what the hook and the step wrapper share."""

    def __init__(
        self,
        pipe: Any,
        index: Any,
        config: AMGConfig,
        also: Sequence[Any] = (),
        gate: Gate | None = None,
        screen: Screen | None = None,
        ordinary: Ordinary | None = None,
    ):
        self.pipe, self.index, self.config, self.also = pipe, index, config, also
        self.gate, self.screen = gate, screen
        self.ordinary = Ordinary() if ordinary is None else ordinary
        self.run: Run | None = None
        self.flights: list[Flight] = []
        self.conditions: Conditions | None = None
        self.step_arguments: dict[str, Any] = {}
        self.index_of_step = 0
        self.call: Call | None = None  # of the U-Net, whose step is still to come
        self.before: Tensor | None = None  # the U-Net's input at the step before
        self.forward: Any = None
        self.class_labels: Tensor | None = None
        self.class_scale: float | None = None
        self.prompt: Any = None  # the call's own, and how many images of each
        self.images_per_prompt = 1
        self.asked_images: int | None = None  # of the call, where its arguments tell
        self.asked_scale: float | None = None
        self.blank = torch.empty(0)  # one row per sample, in the shape of what the scheduler steps

    @torch.compiler.disable
    def begin(self, model_input: Tensor, guided: bool, arguments: dict[str, Any]) -> Run:
        """At the first step: the conditions, a flight per sample, and an unstepped copy of the scheduler."""
        batch = len(model_input) // 2 if guided else len(model_input)
        if guided and self._told_scale is None:
            raise RuntimeError(
                "`pipe` must tell the scale of its guidance, as `pipe.guidance_scale` or by the argument "
                f"`guidance_scale` of its call, got {type(self.pipe).__name__}, whose loop tells none"
            )
        self.conditions = split_call(arguments, batch, guided)
        if self.class_conditional:
            self.conditions = class_conditions(
                self.pipe.unet, self.class_labels, batch, self.config.null_class, self.scale
            )
        self.blank = torch.zeros_like(model_input[:batch])
        texts = texts_of(self.prompt, self.images_per_prompt, batch)
        if len(texts) != batch:
            raise _unpaired(f"one for {batch} samples where {len(texts)} were asked for, at step 0")
        self.flights = [
            Flight.from_noise(row, text) for row, text in zip(model_input[:batch], texts, strict=True)
        ]
        denoiser = denoiser_for(self.pipe, self.forward)
        rescale = float(getattr(self.pipe, "_guidance_rescale", None) or 0.0)
        similarity = similarity_for(self.index, denoiser)
        judges = judges_for(self.also, denoiser)
        if self.gate is not None:
            scheduler = self.pipe.scheduler
            self.gate.require(key_for(self.pipe, self.index, scheduler, self.scale, self.config))
        parts = (self.index, similarity, denoiser, self.scale, rescale, judges, self.gate, self.screen)
        guide = Guide(self.config, *parts, self.ordinary)
        self.run = Run(guide, pristine(self.pipe.scheduler), self.step_arguments)
        return self.run

    @torch.compiler.disable
    def require_turn(self, rows: int, guided: bool) -> None:
        """RuntimeError for a call of the U-Net that is not the one, of all rows, before the next step."""
        if self.call is not None:
            raise _unpaired(f"a second call before step {self.index_of_step}")
        each = 2 if guided else 1
        if rows % each or (self.flights and rows != each * len(self.flights)):
            wanted = each * len(self.flights) or "an even number of"
            raise _unpaired(f"one of {rows} rows where {wanted} were due, at step {self.index_of_step}")

    @torch.compiler.disable
    def told(self, arguments: dict[str, Any], guided: bool) -> tuple[dict[str, Any], Conditions]:
        """The U-Net's arguments with what later tries were given in place of their prompts, and
        the conditions in them."""
        assert self.run is not None
        conditions = split_call(arguments, len(self.flights), guided)
        told = later(self.run.guide.denoiser, conditions, self.flights)
        own = {name: value for name, value in told.cond.items() if value is not conditions.cond[name]}
        if told.uncond is not None:
            own = {name: joined([told.uncond[name], value]) for name, value in own.items()}
        return {**arguments, **plain(own)}, told

    def predict_classes(self, sample: Tensor, t: Any) -> Tensor:
        """Record both halves of a class-conditional U-Net, which a pixel pipeline does not ask for: plain
        classifier-free guidance of them."""
        assert self.run is not None and self.conditions is not None
        uncond, cond = predict(self.run.guide.denoiser, sample, t, self.conditions)
        self.call = Call(sample, uncond, cond, self.conditions)
        return cond if uncond is None else classifier_free(uncond, cond, self.run.guide.guidance_scale)

    def guided(self, model_output: Tensor, timestep: Any) -> Tensor:
        """What the scheduler is to step with: the loop's own `model_output`, [B, C, H, W], but in the rows
        that guidance changes. RuntimeError where the last call of the U-Net does not belong to this step."""
        call, run, index = self.call, self.run, self.index_of_step
        if call is None or run is None:
            raise _unpaired(f"none before step {index}")
        if model_output.shape != call.cond.shape:
            shapes = f"{list(call.cond.shape)} where the scheduler is given {list(model_output.shape)}"
            raise _unpaired(f"one of {shapes}, at step {index}")
        if index >= run.count or float(timestep) != float(run.scheduler.timesteps[index]):
            raise _unpaired(f"timestep {float(timestep):g} for step {index} of {run.count}")
        step = run.guide.at(run.scheduler, run.levels, index)
        if run.guide.gate is not None and self.before is not None:
            note_moves(self.flights, self.before, call.model_input, index)
        found = run.guide(step, *call, self.flights)
        self.call, self.before = None, call.model_input
        changed = found.changed.view(-1, *[1] * (model_output.ndim - 1)).to(model_output.device)
        chosen = torch.where(changed, found.output.to(model_output), model_output)
        return torch.empty_like(model_output).copy_(chosen)  # strides choose kernels: they stay, too

    @property
    def class_conditional(self) -> bool:
        """Whether classes are this package's business: a pixel pipeline passes none to its U-Net."""
        return (
            not is_latent(self.pipe) and getattr(self.pipe.unet.config, "num_class_embeds", None) is not None
        )

    @property
    def scale(self) -> float:
        """s0 of this call."""
        told = self._told_scale if is_latent(self.pipe) else self.class_scale
        return self.config.guidance_scale if told is None else float(told)

    @property
    def _told_scale(self) -> float | None:
        """Of the loop's classifier-free guidance; loops of somebody's own tell it by their argument alone."""
        return getattr(self.pipe, "guidance_scale", self.asked_scale)

    def joins_halves(self, rows: int) -> bool:
        """Whether a U-Net call of `rows` rows is of both halves: as the loop says, else where they are twice
        as many as the images that were asked for."""
        said = getattr(self.pipe, "do_classifier_free_guidance", None)
        if said is None and is_latent(self.pipe) and self.asked_images is not None:
            return rows == 2 * self.asked_images
        return bool(said)


class RecordingHook(CallHook):
    """Records each U-Net call of a pipeline's loop, and gives later tries their captions."""

    def __init__(self, session: Session):
        super().__init__()
        self.session = session

    @functools.partial(torch.compiler.disable, recursive=False)  # what it wraps may be compiled, it is not
    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        session, original = self.session, cast(Any, self.fn_ref).original_forward
        if self.elsewhere:
            return original(*args, **kwargs)
        sample, t, kwargs = _arguments(args, kwargs)
        guided = session.joins_halves(len(sample))
        session.require_turn(len(sample), guided)
        if session.run is None:
            session.forward = original
            session.begin(sample, guided, kwargs)
        if session.class_conditional:
            return UNETS.UNet2DOutput(session.predict_classes(sample, t))
        kwargs, conditions = session.told(kwargs, guided)
        result = original(sample, t, **kwargs)
        # a copy: a loop may combine the halves in place, a compiled U-Net write its next output there
        output = (result[0] if isinstance(result, tuple) else result.sample).clone()
        uncond, cond = output.chunk(2) if guided else (None, output)
        session.call = Call(sample[: len(cond)], uncond, cond, conditions)
        return result


def send_back(
    run: Run, scheduler: Any, index: int, sample: Tensor, conditions: Conditions, flights: Sequence[Flight]
) -> Tensor:
    """After the loop's `scheduler` made step `index`: run the rows that a checkpoint marked up to and
    including that step again, and merge them into `sample` [B, C, H, W].

    The scheduler's multistep history is merged row by row. Rows whose history cannot be merged exactly are
    left as they were, for the re-run at the end.
    """
    here = Group(scheduler, sample, [*range(len(flights))], index + 1)
    back = rewound([here], run, flights)
    if back is None:
        return sample
    for done in advance(run, back, index + 1, conditions, flights):
        if merge_history(scheduler, done.scheduler, done.rows, len(flights)):
            sample = sample.clone()
            sample[done.rows] = done.sample[done.rows]
    return sample


@contextmanager
def guided_call(session: Session) -> Iterator[Session]:
    """Install hook and wrapper for one call of the pipeline, and take both away again whatever happens."""
    pipe = session.pipe
    wrap = functools.partial(_wrapped_step, session, pipe.scheduler)
    with installed(pipe.unet, RecordingHook(session), pipe.scheduler, wrap):
        yield session
        if session.call is not None:
            raise _unpaired(f"one after step {session.index_of_step - 1} that no step follows")


def _wrapped_step(session: Session, scheduler: Any, original: Any) -> Any:
    @functools.wraps(original)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = {name: value for name, value in kwargs.items() if name not in ("generator", "return_dict")}
        session.step_arguments.update(known)
        result = original(session.guided(model_output, timestep), timestep, sample, *args, **kwargs)
        assert session.run is not None and session.conditions is not None
        index, session.index_of_step = session.index_of_step, session.index_of_step + 1
        previous = result[0] if isinstance(result, tuple) else result.prev_sample
        replaced = send_back(session.run, scheduler, index, previous, session.conditions, session.flights)
        if isinstance(result, tuple):
            return (replaced, *result[1:])
        result.prev_sample = replaced
        return result

    return step


def _unpaired(got: str) -> RuntimeError:
    return RuntimeError(
        "`pipe` must call its U-Net once, with all rows, before each step of its scheduler and make the "
        f"steps of its timesteps in order, got {got}: what a step belongs to is not known"
    )


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """(sample, timestep, the rest by name) of a U-Net call, however it was written."""
    kwargs = dict(kwargs)
    sample = args[0] if args else kwargs.pop("sample")
    t = args[1] if len(args) > 1 else kwargs.pop("timestep")
    if len(args) > 2:
        kwargs["encoder_hidden_states"] = args[2]
    return sample, t, kwargs
