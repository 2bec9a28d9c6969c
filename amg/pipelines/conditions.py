"""What a request is conditioned on, encoded by the pipeline as its own call would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from amg.guidance.predict import Conditions
from amg.pipelines.denoiser import class_conditions, is_latent
from amg.pipelines.families import family_of
from amg.pipelines.supported import is_sd3, network_of

if TYPE_CHECKING:
    from amg.engine.sampler import Request

TEXT_ONLY = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "clip_skip",
    "height",
    "width",
    "max_sequence_length",
)


def of_request(
    pipe: Any, request: Request, null_class: int | None, scale: float, device: Any
) -> tuple[Conditions, int]:
    """The conditions of a request, and how many images it has. Errors: ValueError naming the argument."""
    if is_latent(pipe):
        return _of_text(pipe, request, scale, device)
    if request.prompt is not None:
        raise ValueError(
            "`prompt` is for text-to-image pipelines; this one takes `class_labels` or `batch_size`"
        )
    for name in TEXT_ONLY:
        if getattr(request, name) is not None:
            raise ValueError(f"`{name}` is for text-to-image pipelines, got {getattr(request, name)!r}")
    labels, batch = request.class_labels, request.batch_size
    count = len(labels) if labels is not None else (1 if batch is None else batch)
    if count < 1:
        raise ValueError(f"`batch_size` must be >= 1, got {batch}")
    if getattr(pipe.unet.config, "num_class_embeds", None) is None:
        return Conditions({}, None, {}), count
    return class_conditions(pipe.unet, labels, count, null_class, scale), count


def _of_text(pipe: Any, request: Request, scale: float, device: Any) -> tuple[Conditions, int]:
    prompt, negative, guided = request.prompt, request.negative_prompt, scale > 1
    embeds = request.prompt_embeds
    if (prompt is None) == (embeds is None):
        got = "neither" if prompt is None else "both"
        raise ValueError(
            "`prompt` must be a text or a list of texts for a text-to-image pipeline, or `prompt_embeds` be "
            f"given instead, got {got}"
        )
    family = family_of(pipe)
    if family is not None and len(family.said) > 1 and embeds is not None:
        raise ValueError(
            f"`prompt_embeds` must be None for {family.name}, which needs pooled ones too: give the `prompt`"
        )
    length = request.max_sequence_length
    if length is not None and not is_sd3(pipe):
        raise ValueError(f"`max_sequence_length` is for Stable Diffusion 3, got {length}")
    prompt = prompt if prompt is None or isinstance(prompt, str) else list(prompt)
    count = len(embeds) if embeds is not None else (1 if isinstance(prompt, str) else len(prompt or ()))
    if isinstance(negative, str):
        negative = [negative] * count
    more: dict[str, Any] = {}
    if is_sd3(pipe):
        more = {"prompt_2": None, "prompt_3": None, "max_sequence_length": length or 256}
    cond, uncond, *pooled = pipe.encode_prompt(
        [prompt] if isinstance(prompt, str) else prompt,
        **more,
        device=device,
        num_images_per_prompt=request.num_images_per_prompt,
        do_classifier_free_guidance=guided,
        negative_prompt=negative,
        prompt_embeds=embeds,
        negative_prompt_embeds=request.negative_prompt_embeds,
        clip_skip=request.clip_skip,
    )
    own, other = {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}
    if is_sd3(pipe):
        for half, text in zip((own, other), pooled, strict=True):
            half["pooled_projections"] = text
    elif pooled:
        sizes = _sizes(pipe, request, cond)
        for half, text in zip((own, other), pooled, strict=True):
            half["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
    return Conditions(own, other if guided else None, {}), len(cond)


def _sizes(pipe: Any, request: Request, cond: Tensor) -> Tensor:
    """What SDXL is told of sizes [B, 6]: a picture as large as asked for, not cut."""
    own = pipe.default_sample_size * pipe.vae_scale_factor
    size = (request.height or own, request.width or own)
    width = pipe.text_encoder_2.config.projection_dim
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=cond.dtype, text_encoder_projection_dim=width)
    sizes: Tensor = ids.to(cond.device).repeat(len(cond), 1)
    return sizes


def size_of(pipe: Any, height: int | None, width: int | None) -> Sequence[int]:
    """Height and width of what the network denoises, for a picture of a size in pixels; ValueError where the
    decoder cannot make that size."""
    own = network_of(pipe).config.sample_size
    size = [own, own] if isinstance(own, int) else list(own)
    if not is_latent(pipe):
        return size
    factor = pipe.vae_scale_factor
    least = factor * pipe.patch_size if is_sd3(pipe) else 8
    for at, (name, asked) in enumerate((("height", height), ("width", width))):
        if asked is None:
            continue
        if asked < 1 or asked % least:
            raise ValueError(f"`{name}` must be a multiple of {least}, got {asked}")
        size[at] = asked // factor
    return size


def shift_of(pipe: Any, height: int | None, width: int | None) -> float | None:
    """mu of a flow-matching scheduler whose levels depend on the size of the picture, linear in the number of
    tokens as Stable Diffusion 3's pipeline has it; None for any other."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    rows, columns = (side // pipe.patch_size for side in size_of(pipe, height, width))
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
    return float(low + (high - low) * (rows * columns - least) / (most - least))
