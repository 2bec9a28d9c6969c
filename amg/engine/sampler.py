"""`Sampler`: the same promise in our own loop, over the components of a diffusers pipeline."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.batching import Batcher
from amg.engine.drive import pristine
from amg.guidance.flight import Flight, texts_of
from amg.guidance.guide import Guide
from amg.guidance.ordinary import warn_without_captions
from amg.guidance.predict import Conditions, Denoiser
from amg.pipelines.denoiser import CaptionCache, class_conditions, denoiser_for, is_latent
from amg.pipelines.identity import asked, gate_of, key_for, refit, require_indexes, screen_of
from amg.pipelines.safety import SafetyCheck, safety_of
from amg.pipelines.supported import require_sampled
from amg.promise import decode, deliver
from amg.protection.group import Group
from amg.protection.loop import Run, denoise
from amg.protection.protect import to_pil
from amg.similarity import judges_for, similarity_for
from amg.similarity.student import Screen
from amg.verdict import Verdict


@dataclass
class SamplerOutput:
    """`images` as asked for by `output_type`, and `amg`, one `Verdict` per image. `nsfw_content_detected`:
    what the pipeline's safety checker said of each image; None without one, or of latents."""

    images: Any
    amg: list[Verdict]
    nsfw_content_detected: list[bool] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """What `Sampler.submit` takes: the arguments of a call, see there, and in place of its generator

    seed: of the request's own generator, or a list with one per image; None: one that nobody chose.
    deadline: seconds from `submit` after which it is not wanted any more; None: never.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    class_labels: Sequence[int] | Tensor | None = None
    batch_size: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    eta: float = 0.0
    num_images_per_prompt: int = 1
    latents: Tensor | None = None
    output_type: str = "pil"
    seed: int | Sequence[int] | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A request that was found to be in order, ready to run."""

    run: Run
    sample: Tensor
    conditions: Conditions
    flights: list[Flight]
    generator: Any
    output_type: str
    safety: SafetyCheck | None


class Sampler:
    """Guided and checked sampling from a pipeline's components.

    pipe: a DDPM, DDIM or Stable Diffusion pipeline (unprotected; it is not changed), or a subclass that does
    not change the loop. index, config, also: as in `amg.protect`. Calling it never touches the pipeline's
    scheduler, so one pipeline may serve many samplers. What is replaced, loaded or moved on the pipeline is
    used from the next request on. max_batch, max_pending: of `submit`, how many images run at the same time
    and how many requests may wait. Errors: TypeError, ValueError for a pipeline that is not supported.
    """

    def __init__(
        self,
        pipe: Any,
        index: Any,
        config: AMGConfig | None = None,
        also: Sequence[Any] = (),
        *,
        max_batch: int = 16,
        max_pending: int = 64,
    ):
        require_sampled(pipe)
        also = require_indexes(index, also)
        self._batcher, self._texts = Batcher(max_batch, max_pending), threading.Lock()
        self.pipe, self.index = pipe, self._shared_index(index)
        self.also = tuple(self._shared_index(judge) for judge in also)
        self.config = asked(config).for_metric(index.metric)
        if is_latent(pipe) and self.config.active:
            warn_without_captions(index)
        self.gate = gate_of(self.config)
        self.screen = self._shared_screen(screen_of(self.config, pipe, index))
        self._renewing = threading.Lock()
        self._made_of: tuple[Any, ...] = ()
        self._renew()

    def _renew(self) -> None:
        """Read the pipeline's components anew: what was replaced since the last request serves the next one,
        and what does not fit it any more is refused as at first."""
        pipe = self.pipe
        require_sampled(pipe)
        refit(self.screen, pipe)
        denoiser = denoiser_for(pipe)
        made_of = (pipe.unet, getattr(pipe, "vae", None), denoiser.prediction_type)
        with self._renewing:
            if made_of == self._made_of:
                return
            self.denoiser = self._shared_denoiser(denoiser)
            self.similarity = similarity_for(self.index, self.denoiser)
            self.judges = judges_for(self.also, self.denoiser)
            self._made_of = made_of

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        progress: bool = True,
    ) -> SamplerOutput:
        """Sample. `prompt` for Stable Diffusion; `class_labels` (int [B]) or `batch_size` for pixel models.

        The same arguments and the same generator give the pictures of the plain pipeline wherever no gate
        opens. `generator`: one, or a list with one per image (then an image never depends on its
        batch-mates); a sample that goes back draws from one of its own, made of its first noise.
        `output_type`: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent".
        Errors: ValueError naming the argument.
        """
        request = Request(
            *(prompt, negative_prompt, class_labels, batch_size, num_inference_steps, guidance_scale),
            *(guidance_rescale, eta, num_images_per_prompt, latents, output_type),
        )
        prepared = self._prepare(request, generator)
        self.config.warn_without_guidance(_scale_of(prepared))
        with _bar(prepared.run.count, progress) as bar:
            return self._finish(prepared, bar)

    @torch.no_grad()
    def submit(
        self, request: Request, *, block: bool = True, timeout: float | None = None
    ) -> Future[SamplerOutput]:
        """Queue a request -> the future of what calling the sampler would return.

        Requests that run at the same time share calls of the networks; they join and leave between steps.
        Bad input is refused here, as by a call. Where `max_pending` requests wait already: waits for room, at
        most `timeout` seconds, then `queue.Full`; with block=False at once. `future.cancel()` succeeds until
        the result is there (`running()` stays False), and a request that is cancelled or past its `deadline`
        (TimeoutError) leaves at the next step. What fails in a request is its own future's exception.
        RuntimeError after `close`. See docs/serving.md.
        """
        start, deadline = time.monotonic(), request.deadline
        if deadline is not None and not deadline > 0:
            raise ValueError(f"`deadline` must be > 0 seconds or None, got {deadline}")
        prepared = self._prepare(request, self._generator(request.seed))
        self.config.warn_without_guidance(_scale_of(prepared))
        late_at = math.inf if deadline is None else start + deadline
        work = functools.partial(self._finish, prepared)
        return self._batcher.submit(work, len(prepared.sample), late_at, block, timeout)

    def close(self, cancel: bool = False) -> None:
        """Take no more requests and return when all are done; with `cancel`, they are cancelled first."""
        self._batcher.close(cancel)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        self.close(cancel=kind is not None)

    def _prepare(self, request: Request, generator: Any) -> Prepared:
        steps, output_type = request.num_inference_steps, request.output_type
        if steps < 1:
            raise ValueError(f"`num_inference_steps` must be >= 1, got {steps}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}')
        self._renew()
        for index in (self.index, *self.also):
            index.seal.check()  # before any work, and before a truncated map is touched
        scale = self.config.guidance_scale if request.guidance_scale is None else request.guidance_scale
        device = self.pipe._execution_device  # once: the pipeline walks through all its modules for it
        conditions, batch = self._conditions(request, scale, device)
        guide = Guide(
            self.config,
            self.index,
            self.similarity,
            replace(self.denoiser, encode_captions=self._captions()),
            scale,
            request.guidance_rescale,
            self.judges,
            self.gate,
            self.screen,
        )
        scheduler = pristine(self.pipe.scheduler)
        scheduler.set_timesteps(steps, device=device)
        if self.gate is not None:
            self.gate.require(key_for(self.pipe, self.index, scheduler, scale, self.config))
        run = Run(guide, pristine(scheduler), {"eta": request.eta})
        sample = self._noise(batch, generator, request.latents, device) * scheduler.init_noise_sigma
        noise = scheduler.scale_model_input(sample, scheduler.timesteps[0])
        texts = texts_of(request.prompt, request.num_images_per_prompt, batch)
        flights = [Flight.from_noise(row, text) for row, text in zip(noise, texts, strict=True)]
        safety = None
        if output_type != "latent" and is_latent(self.pipe):
            safety = safety_of(self.pipe, [False] * batch, conditions.cond["encoder_hidden_states"].dtype)
        return Prepared(run, sample, conditions, flights, generator, output_type, safety)

    @torch.no_grad()
    def _finish(self, prepared: Prepared, progress: Any = None) -> SamplerOutput:
        run, conditions, flights = prepared.run, prepared.conditions, prepared.flights
        safety = prepared.safety
        rows, generator = [*range(len(flights))], prepared.generator
        group = Group(pristine(run.scheduler), prepared.sample, rows, generator=generator)
        sample = denoise(run, group, conditions, flights, progress)
        images = decode(run, sample)
        if safety is not None:
            images = safety(images, rows)
        delivery = deliver(images, sample, run, conditions, flights, self.also, safety)
        images = _as(delivery.images, delivery.sample, prepared.output_type)
        return SamplerOutput(images, delivery.verdicts, None if safety is None else safety.flags)

    def _generator(self, seed: int | Sequence[int] | None) -> torch.Generator | list[torch.Generator]:
        if isinstance(seed, Sequence):
            return [torch.Generator(self.pipe._execution_device).manual_seed(one) for one in seed]
        generator = torch.Generator(self.pipe._execution_device)
        if seed is None:
            generator.seed()
            return generator
        return generator.manual_seed(seed)

    def _shared_denoiser(self, denoiser: Denoiser) -> Denoiser:
        """Its network joins the calls of `submit`'s requests, a VAE too."""
        share = self._batcher.share
        network = share(denoiser.network, patient=True)
        if denoiser.pixels:
            return replace(denoiser, network=network)
        return replace(denoiser, network=network, decode=share(denoiser.decode))

    def _captions(self) -> Any:
        """A request's own cache of captions, so that none outlives the text encoder that encoded it; by one
        thread at a time, as tokenizers want it."""
        if not is_latent(self.pipe):
            return None
        encode = CaptionCache(self.pipe)

        def encode_captions(captions: Sequence[str]) -> Any:
            with self._texts:
                return encode(captions)

        return encode_captions

    def _shared_index(self, index: Any) -> Any:
        """The index, its embedder joining the calls of `submit`'s requests."""
        if index.embedder is None:
            return index
        shared = copy.copy(index)
        shared.embedder = self._batcher.share(index.embedder)
        return shared

    def _shared_screen(self, screen: Screen | None) -> Screen | None:
        """The student, joining the calls of `submit`'s requests as its teacher's embedder does."""
        if screen is None:
            return None
        return Screen(self._batcher.share(screen.student), self.index)

    def _conditions(self, request: Request, scale: float, device: Any) -> tuple[Conditions, int]:
        prompt, negative = request.prompt, request.negative_prompt
        labels, batch = request.class_labels, request.batch_size
        if not is_latent(self.pipe):
            if prompt is not None:
                raise ValueError(
                    "`prompt` is for text-to-image pipelines; this one takes `class_labels` or `batch_size`"
                )
            count = len(labels) if labels is not None else (batch or 1)
            if getattr(self.pipe.unet.config, "num_class_embeds", None) is None:
                return Conditions({}, None, {}), count
            return class_conditions(self.pipe.unet, labels, count, self.config.null_class, scale), count
        if prompt is None:
            raise ValueError(
                "`prompt` must be a text or a list of texts for a text-to-image pipeline, got None"
            )
        prompt = [prompt] if isinstance(prompt, str) else list(prompt)
        guided = scale > 1
        if isinstance(negative, str):
            negative = [negative] * len(prompt)
        with self._texts:
            cond, uncond = self.pipe.encode_prompt(
                prompt, device, request.num_images_per_prompt, guided, negative
            )
        own = {"encoder_hidden_states": cond}
        return Conditions(own, {"encoder_hidden_states": uncond} if guided else None, {}), len(cond)

    def _noise(self, batch: int, generator: Any, latents: Tensor | None, device: Any) -> Tensor:
        unet = self.pipe.unet
        size = unet.config.sample_size
        shape = (batch, unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=unet.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must be {list(shape)}, got {list(latents.shape)}")
        return latents.to(device, unet.dtype)


def _scale_of(prepared: Prepared) -> float | None:
    """The guidance scale of a request that has something to guide by."""
    return prepared.run.guide.guidance_scale if prepared.conditions.cond else None


def _as(images: Tensor, sample: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return sample
    if output_type == "pt":
        return images
    return to_pil(images) if output_type == "pil" else images.permute(0, 2, 3, 1).cpu().numpy()


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total) as bar:
        yield bar
