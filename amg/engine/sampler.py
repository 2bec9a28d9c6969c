"""`Sampler`: the same promise in our own engine, over the components of a diffusers pipeline."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from amg.config import AMGConfig
from amg.engine.arguments import require_request, require_seed
from amg.engine.output import SamplerOutput
from amg.engine.prepare import Source, prepare
from amg.engine.queue import Queue
from amg.extras import needed
from amg.guidance.ordinary import warn_without_captions
from amg.index.coverage import warn_of_gaps

__all__ = ["Request", "Sampler", "SamplerOutput"]


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
    num_inference_steps: int | None = 50
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    eta: float = 0.0
    num_images_per_prompt: int = 1
    latents: Tensor | None = None
    output_type: str = "pil"
    seed: int | Sequence[int] | None = None
    deadline: float | None = None
    height: int | None = None
    width: int | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    clip_skip: int | None = None
    max_sequence_length: int | None = None
    true_cfg_scale: float | None = None
    use_resolution_binning: bool | None = None
    image: Any = None
    mask_image: Any = None
    strength: float | None = None


ASKED = {field.name for field in fields(Request)} - {"seed", "deadline"}


class Sampler:
    """Guided and checked sampling from a pipeline's components.

    pipe: a DDPM, DDIM, Stable Diffusion 1, 2, XL or 3, FLUX.1 or PixArt text-to-image pipeline, or Stable
    Diffusion 1 or 2's image to image or inpainting (unprotected; it is not changed), or a subclass that does
    not change the loop, with any scheduler whose steps are linear. index, config, also: as in `amg.protect`.
    Calling it never touches the pipeline's scheduler, so one pipeline may serve many samplers. What is
    replaced, loaded or moved on the pipeline is used from the next request on, once those that run are done;
    `with sampler.paused():` changes what they share. max_batch, max_pending: how many images run at the same
    time and how many requests may wait. cuda_graphs: replay the network from CUDA graphs, one for each number
    of rows in a call, captured at its third: faster where launching its kernels takes longer than running
    them (docs/engine.md); for a network whose forward only computes. Errors: TypeError, ValueError for a
    pipeline that is not supported.
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
        cuda_graphs: bool = False,
    ):
        self._queue = Queue(max_batch, max_pending)
        weakref.finalize(self, self._queue.abandon).atexit = False
        self.source = Source(pipe, index, config, also, cuda_graphs)
        self._preparing = threading.Lock()
        warn_of_gaps((self.index, *self.also))
        if self.source.unwarned:
            warn_without_captions(self.index, self.source.ordinary.bank, self.config)

    @property
    def pipe(self) -> Any:
        return self.source.pipe

    @property
    def index(self) -> Any:
        return self.source.index

    @property
    def config(self) -> AMGConfig:
        """The config, resolved for the index's metric."""
        return self.source.config

    @property
    def also(self) -> tuple[Any, ...]:
        return self.source.also

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int | None = None,
        true_cfg_scale: float | None = None,
        use_resolution_binning: bool | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        progress: bool = True,
    ) -> SamplerOutput:
        """Sample. `prompt` for Stable Diffusion; `class_labels` (int [B]) or `batch_size` for pixel models.

        The same arguments and the same generator give the pictures of the plain pipeline wherever no gate
        opens. `generator`: one, or a list with one per image (then an image never depends on its
        batch-mates); a sample that goes back draws from one of its own, made of its first noise.
        `output_type`: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent". `height`,
        `width`: of the picture in pixels, for text to image; `timesteps` or `sigmas` instead of
        `num_inference_steps`, `prompt_embeds`, `negative_prompt_embeds`, `clip_skip`, `max_sequence_length`,
        `use_resolution_binning` (PixArt): as the pipeline takes them. `guidance_scale`: s0, None: the
        config's; for FLUX.1 s0 is `true_cfg_scale`, which counts with a `negative_prompt` alone, as there,
        and `guidance_scale` what its distilled network is told (None: 3.5). `image`, `mask_image` and
        `strength`: for pipelines that paint into a picture, as they take them. Errors: ValueError naming the
        argument, one that this pipeline does not take among them; `Refused`, a ValueError, for a scheduler
        that cannot be run here.
        """
        given = {name: value for name, value in locals().items() if name in ASKED}
        request = Request(**given)
        with self._preparing:
            job = prepare(self.source, request, generator, math.inf)
        self.config.warn_without_guidance(job.scale, self.source.scale_name)
        job.called = True
        with _bar(job.steps, progress) as job.bar:
            self._queue.submit(job)
            try:
                return job.future.result()
            except BaseException:
                job.future.cancel()
                raise

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
        if not isinstance(request, Request):
            raise TypeError(f"`request` must be an amg.Request, got {request!r:.100}")
        require_request(request)
        require_seed(request.seed)
        start, deadline = time.monotonic(), request.deadline
        if deadline is not None and not deadline > 0:
            raise ValueError(f"`deadline` must be > 0 seconds or None, got {deadline}")
        late_at = math.inf if deadline is None else start + deadline
        with self._preparing:
            job = prepare(self.source, request, self.source.generator(request.seed), late_at)
        self.config.warn_without_guidance(job.scale, self.source.scale_name)
        self._queue.submit(job, block, timeout)
        return job.future

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no request runs: those that do are finished first, others wait until after. For changes of
        what requests share: LoRA weights, adapters, a network's own weights."""
        with self._queue.paused():
            yield

    def close(self, cancel: bool = False) -> None:
        """Take no more submissions and return when all are done; with `cancel`, they are cancelled first."""
        self._queue.close(cancel)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        self.close(cancel=kind is not None)


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield None
        return
    tqdm = needed("tqdm.auto", "progress=True", "diffusers").tqdm
    with tqdm(total=total) as bar:
        yield bar
