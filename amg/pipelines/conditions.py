"""What a request is conditioned on, encoded by the pipeline as its own call would."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amg.guidance.predict import Conditions
from amg.pipelines.denoiser import class_conditions
from amg.pipelines.families import FAMILIES, Family, Size, family_of
from amg.pipelines.given import TAKES, kind_of, pictured
from amg.pipelines.supported import INPAINT, network_of

if TYPE_CHECKING:
    from amg.engine.sampler import Request

OF_TEXT = ("prompt_embeds", "negative_prompt_embeds", "height", "width")
OF_PIXELS = ("class_labels", "batch_size", "timesteps")


def asked_of(pipe: Any, request: Request) -> tuple[Request, Size | None]:
    """The request as its family is run: prompts in lists, of the size that is drawn for it; and the size that
    its pictures are brought to then, None: they are of that size. Errors: ValueError naming the argument,
    also one that this pipeline does not take."""
    family = family_of(pipe)
    _require_taken(pipe, family, request)
    if family is None:
        return request, None
    if family.drawn is None:
        size_of(pipe, request.height, request.width)  # what was asked for: pictures are brought to a multiple
    request = pictured(pipe, _listed(pipe, family, request))
    own = (pipe.vae_scale_factor * side for side in size_of(pipe, None, None))
    height, width = (asked or side for asked, side in zip((request.height, request.width), own, strict=True))
    drawn = height, width
    if family.drawn is not None:
        drawn = family.drawn(pipe, request)
        request = replace(request, height=drawn[0], width=drawn[1])
    size_of(pipe, request.height, request.width)
    return request, None if drawn == (height, width) else (height, width)


def count_of(request: Request) -> int:
    """How many images a request has whose prompts are lists; ValueError for none."""
    texts = request.prompt if request.prompt_embeds is None else request.prompt_embeds
    if texts is not None:
        return len(texts) * request.num_images_per_prompt
    labels, batch = request.class_labels, request.batch_size
    count = len(labels) if labels is not None else (1 if batch is None else batch)
    if count < 1:
        raise ValueError(f"`batch_size` must be >= 1, got {batch}")
    return count


def of_request(pipe: Any, request: Request, null_class: int | None, scale: float, device: Any) -> Conditions:
    """What a request is conditioned on that is as its family is run."""
    if (family := family_of(pipe)) is not None:
        return family.condition(pipe, request, scale > 1, device)
    if getattr(pipe.unet.config, "num_class_embeds", None) is None:
        return Conditions({}, None, {})
    return class_conditions(pipe.unet, request.class_labels, count_of(request), null_class, scale)


def _require_taken(pipe: Any, family: Family | None, request: Request) -> None:
    """ValueError for an argument that is another pipeline's."""
    if family is None and request.prompt is not None:
        raise ValueError(
            "`prompt` is for text-to-image pipelines; this one takes `class_labels` or `batch_size`"
        )
    takers = {name: [one.name for one in FAMILIES if name in one.takes] for name in _limited()}
    takers |= {name: [kind for kind, taken in TAKES.items() if name in taken] for name in TAKES[INPAINT]}
    taken = OF_PIXELS if family is None else (*OF_TEXT, *family.takes, *TAKES.get(kind_of(pipe) or "", ()))
    for name, names in takers.items():
        value = getattr(request, name)
        if name in taken or value is None:
            continue
        if family is None and name not in TAKES[INPAINT]:
            names = ["text-to-image pipelines"]
        raise ValueError(f"`{name}` is for {', '.join(names) or 'pixel models'}, got {value!r:.100}")


def _limited() -> list[str]:
    """The arguments that not every pipeline takes."""
    return list(dict.fromkeys([*OF_TEXT, *OF_PIXELS, *(name for one in FAMILIES for name in one.takes)]))


def _listed(pipe: Any, family: Family, request: Request) -> Request:
    """The request with its prompts as lists; ValueError unless it says what is wanted, once."""
    prompt, embeds, negative = request.prompt, request.prompt_embeds, request.negative_prompt
    if (prompt is None) == (embeds is None):
        got = "neither" if prompt is None else "both"
        raise ValueError(
            "`prompt` must be a text or a list of texts for a text-to-image pipeline, or `prompt_embeds` be "
            f"given instead, got {got}"
        )
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if len(family.said) > 1 and getattr(request, name) is not None:
            raise ValueError(
                f"`{name}` must be None for {family.name}, whose network is told more of a text than these: "
                "give the text"
            )
    missing = [name for name in family.encoders if getattr(pipe, name, None) is None]
    if missing and not (prompt is None and negative is None):
        raise ValueError(f"`pipe.{missing[0]}` must not be None where a text is to be encoded")
    if prompt is not None:
        prompt = [prompt] if isinstance(prompt, str) else [*prompt]
    texts: Any = prompt if embeds is None else embeds
    if isinstance(negative, str):
        negative = [negative] * len(texts)
    return replace(request, prompt=prompt, negative_prompt=negative)


def scale_of(pipe: Any, request: Request, default: float) -> float:
    """s0 of a request; 1 for FLUX.1 without a negative prompt, which is guided by its own distillation."""
    family = family_of(pipe)
    name = "guidance_scale" if family is None else family.scale
    if name == "true_cfg_scale" and request.negative_prompt is None:
        return 1.0
    asked = getattr(request, name)
    return default if asked is None else float(asked)


def size_of(pipe: Any, height: int | None, width: int | None) -> Size:
    """Height and width of what the network denoises, for a picture of a size in pixels (of latents before
    they are packed); ValueError where the decoder cannot make that size."""
    config = network_of(pipe).config
    own = getattr(config, "sample_size", None) or pipe.default_sample_size
    size = [own, own] if isinstance(own, int) else list(own)
    if (family := family_of(pipe)) is not None:
        least = family.token(pipe)
        for at, (name, asked) in enumerate((("height", height), ("width", width))):
            if asked is None:
                continue
            if asked < 1 or asked % least:
                raise ValueError(f"`{name}` must be a multiple of {least}, got {asked}")
            size[at] = asked // pipe.vae_scale_factor
    return size[0], size[1]


def shift_of(pipe: Any, height: int | None, width: int | None) -> float | None:
    """mu of a flow-matching scheduler whose levels depend on the size of the picture, linear in the number of
    tokens as Stable Diffusion 3's and FLUX.1's pipelines have it; None for any other."""
    config, family = pipe.scheduler.config, family_of(pipe)
    if family is None or not family.flow or not config.get("use_dynamic_shifting", False):
        return None
    patch = family.token(pipe) // pipe.vae_scale_factor
    rows, columns = (side // patch for side in size_of(pipe, height, width))
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", family.max_shift)
    return float(low + (high - low) * (rows * columns - least) / (most - least))
