"""`Sampler`: the same promise in our own loop, over the components of a diffusers pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from amg.config import AMGConfig
from amg.flight import Flight
from amg.guide import Guide
from amg.integrations.denoiser import class_conditions, denoiser_for, is_latent
from amg.integrations.identity import gate_of, key_for
from amg.integrations.protect import to_pil
from amg.predict import Conditions
from amg.promise import decode, deliver
from amg.rewind import pristine
from amg.sampler import Run, denoise
from amg.similarity import judges_for, similarity_for
from amg.verdict import Verdict


@dataclass
class SamplerOutput:
    """`images` as asked for by `output_type`, and `amg`, one `Verdict` per image."""

    images: Any
    amg: list[Verdict]


class Sampler:
    """Guided and checked sampling from a pipeline's components.

    pipe: a DDPM, DDIM or Stable Diffusion pipeline (unprotected; it is not changed). index, config, also: as
    in `amg.protect`. Calling it never touches the pipeline's scheduler, so one pipeline may serve many
    samplers.
    """

    def __init__(self, pipe: Any, index: Any, config: AMGConfig | None = None, also: Sequence[Any] = ()):
        self.pipe, self.index, self.also = pipe, index, tuple(also)
        self.config = (config or AMGConfig.preset("main")).for_metric(index.metric)
        self.denoiser = denoiser_for(pipe)
        self.similarity = similarity_for(index, self.denoiser, lazy=self.config.lazy_search)
        self.judges = judges_for(self.also, self.denoiser)
        self.gate = gate_of(self.config)

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
        batch-mates). `output_type`: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent".
        Errors: ValueError naming the argument.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be >= 1, got {num_inference_steps}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}')
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        conditions, batch = self._conditions(
            prompt, negative_prompt, class_labels, batch_size, scale, num_images_per_prompt
        )
        self.config.warn_without_guidance(scale if conditions.cond else None)
        guide = Guide(
            self.config,
            self.index,
            self.similarity,
            self.denoiser,
            scale,
            guidance_rescale,
            self.judges,
            self.gate,
        )
        scheduler = pristine(self.pipe.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=self.pipe._execution_device)
        if self.gate is not None:
            self.gate.require(key_for(self.pipe, self.index, scheduler, scale, self.config))
        run = Run(guide, pristine(scheduler), {"eta": eta})
        sample = self._noise(batch, generator, latents) * scheduler.init_noise_sigma
        flights = [
            Flight.from_noise(row) for row in scheduler.scale_model_input(sample, scheduler.timesteps[0])
        ]
        scheduler = pristine(run.scheduler)
        with _bar(run.count, progress) as bar:
            sample = denoise(run, scheduler, sample, conditions, flights, generator=generator, progress=bar)
        delivery = deliver(decode(run, sample), sample, run, conditions, flights, self.also)
        return SamplerOutput(_as(delivery.images, delivery.sample, output_type), delivery.verdicts)

    def _conditions(
        self, prompt: Any, negative: Any, labels: Any, batch: int | None, scale: float, repeats: int
    ) -> tuple[Conditions, int]:
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
        cond, uncond = self.pipe.encode_prompt(prompt, self.pipe._execution_device, repeats, guided, negative)
        own = {"encoder_hidden_states": cond}
        return Conditions(own, {"encoder_hidden_states": uncond} if guided else None, {}), len(cond)

    def _noise(self, batch: int, generator: Any, latents: Tensor | None) -> Tensor:
        unet = self.pipe.unet
        size = unet.config.sample_size
        shape = (batch, unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is None:
            return randn_tensor(
                shape, generator=generator, device=self.pipe._execution_device, dtype=unet.dtype
            )
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must be {list(shape)}, got {list(latents.shape)}")
        return latents.to(self.pipe._execution_device, unet.dtype)


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
