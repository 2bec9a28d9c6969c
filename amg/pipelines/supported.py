"""Which pipelines are taken: one list and one check, for `protect`, `Sampler` and every command."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amg.pipelines.families import FAMILIES, family_of

SUPPORTED = ("DDPMPipeline", "DDIMPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
XL = "StableDiffusionXLPipeline"
TEXT_TO_IMAGE = tuple(name for family in FAMILIES for name in family.bare)
SAMPLED = ("DDPMPipeline", "DDIMPipeline", *TEXT_TO_IMAGE)  # by `Sampler`, and by commands
IMG2IMG, INPAINT = "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"
PICTURED = (IMG2IMG, INPAINT)  # by `Sampler`, into a picture
# what a subclass may not change of a pipeline that `Sampler` samples from, as it runs none of it
LOOP = (
    "__call__",
    "prepare_latents",
    "prepare_extra_step_kwargs",
    "do_classifier_free_guidance",
    "guidance_scale",
    "guidance_rescale",
)
# options of a U-Net whose inputs a text-to-image pipeline does not make, upscalers' and others', and the one
# value that its own may have
FOREIGN = {"num_class_embeds": None, "class_embed_type": None, "addition_embed_type": None}
FOREIGN_XL = {**FOREIGN, "addition_embed_type": "text_time"}
FOREIGN_OF: dict[str, dict[str, Any]] = {
    XL: FOREIGN_XL,
    **dict.fromkeys(("StableDiffusionPipeline", IMG2IMG, INPAINT), FOREIGN),
}
# and those whose inputs it makes, in a part of its call that `Sampler` has no counterpart of
UNSAMPLED = {
    "time_cond_proj_dim": "a distilled U-Net's embedded guidance scale",
    "encoder_hid_dim_type": "IP-Adapters' image embeddings",
}


def require_class(names: Iterable[str], argument: str = "pipe", among: tuple[str, ...] = SAMPLED) -> str:
    """The class that is taken among `names`, a pipeline's class and its bases; TypeError naming the first if
    there is none."""
    names = [*names]
    for name in names:
        if name in among:
            return name
    raise TypeError(f"`{argument}` must be one of {among}, got {names[0]}")


def network_of(pipe: Any) -> Any:
    """What denoises in a pipeline: its U-Net or its transformer."""
    unet = getattr(pipe, "unet", None)
    return getattr(pipe, "transformer", None) if unet is None else unet


def level_of(pipe: Any) -> str:
    """The highest level at which a pipeline may be protected: "full", its halves are known; "step", it has a
    scheduler that makes its steps and a decoder of latents; "final", any other diffusers pipeline. TypeError
    for what is none."""
    if is_ours(pipe):
        return "full"
    names = [base.__name__ for base in type(pipe).__mro__]
    if "DiffusionPipeline" not in names:
        raise TypeError(f"`pipe` must be a diffusers pipeline, got {names[0]}")
    steps = callable(getattr(getattr(pipe, "scheduler", None), "step", None))
    decodes = callable(getattr(getattr(pipe, "vae", None), "decode", None))
    if not (steps and decodes):
        return "final"
    family = family_of(pipe)
    return "step" if family is None or getattr(pipe, family.network, None) is None else "full"


def is_ours(pipe: Any) -> bool:
    """Whether the loop of a pipeline is one that `protect` knows to the bit, with calibrations, too."""
    return any(base.__name__ in SUPPORTED for base in type(pipe).__mro__)


def read_model_index(folder: Path) -> dict[str, Any]:
    """What a diffusers folder says that it holds; no weights are read. ValueError where it says nothing."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`MODEL`: {path} is no JSON that can be read ({error})") from error
    if not isinstance(index, dict):
        raise ValueError(f"`MODEL`: {path} must hold one object, got {type(index).__name__}")
    return index


def is_xl(pipe: Any) -> bool:
    """Whether a pipeline is SDXL's, with two text encoders and conditions on sizes."""
    return any(base.__name__ == XL for base in type(pipe).__mro__)


def require_supported(pipe: Any) -> None:
    """TypeError for a pipeline of another class, ValueError for one whose components are another kind's
    (inpainting, upscaling, learned variances, pixels of one channel)."""
    kind = require_class((base.__name__ for base in type(pipe).__mro__), among=(*SAMPLED, *PICTURED))
    family = family_of(pipe)
    network = "unet" if family is None else family.network
    for name in (network, "scheduler", *(("vae",) if family is not None else ())):
        if getattr(pipe, name, None) is None:
            raise ValueError(f"`pipe.{name}` must not be None: nothing can be sampled or checked without it")
    config = getattr(pipe, network).config
    channels = {f"pipe.{network}'s out_channels": config.out_channels}
    if family is not None:
        decoded = getattr(pipe.vae.config, "latent_channels", None)
        channels["pipe.vae's latent_channels"] = decoded and family.packed * decoded
        if kind == INPAINT and config.in_channels == 2 * config.out_channels + 1:
            channels = {}  # a mask and the masked picture beside what it denoises
        if family.variances and config.out_channels == 2 * config.in_channels:
            del channels[f"pipe.{network}'s out_channels"]
    for name, found in channels.items():
        if found is not None and found != config.in_channels:
            raise ValueError(
                f"`pipe.{network}` must take as many channels as it denoises (no inpainting, upscaling or "
                f"learned variances), got in_channels={config.in_channels} and {name}={found}"
            )
    if family is None and config.in_channels != 3:
        raise ValueError(
            "`pipe.unet` must make pictures of 3 channels, which an index measures, got "
            f"in_channels={config.in_channels}: hold its pictures, as grey or RGB, to `amg.check`"
        )
    for name, own in FOREIGN_OF.get(kind, {}).items():
        if getattr(config, name, None) != own:
            raise ValueError(
                f"`pipe.unet` must be conditioned on what {kind} makes, with {name}={own}, "
                f"got {name}={getattr(config, name)}; supported are {SAMPLED}"
            )


def require_no_caches(network: Any) -> None:
    """ValueError for a network that keeps what it computed from one step to the next (FirstBlockCache,
    MagCache, FasterCache and their like): `Sampler`'s rows come, go and start again."""
    for module in network.modules():
        names = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        kept = [name for name in names if "cache" in name or name.startswith(("fbc", "pyramid"))]
        if kept:
            raise ValueError(
                "`pipe.unet` must not reuse what it computed at an earlier step, as `Sampler`'s rows change, "
                f"got the hook {kept[0]!r}: disable it, or use `amg.protect`"
            )


def require_sampled(pipe: Any) -> None:
    """`require_supported`, and refuse what `Sampler`'s own loop would leave out: TypeError for a subclass
    with a loop of its own, ValueError for a U-Net with further inputs."""
    require_supported(pipe)
    kind = type(pipe).__mro__[1] if hasattr(pipe, "_amg_protection") else type(pipe)
    base = next(base for base in kind.__mro__ if base.__name__ in (*SAMPLED, *PICTURED))
    for name in LOOP:
        if getattr(kind, name, None) is not getattr(base, name, None):
            raise TypeError(
                f"`pipe` must be sampled as {base.__name__} does it, got {kind.__name__}, whose `{name}` is "
                "its own and which `Sampler` does not run: use `amg.protect`, or give the Sampler "
                f"{base.__name__}(**pipe.components)"
            )
    for name, what in UNSAMPLED.items() if family_of(pipe) is not None else ():
        if getattr(network_of(pipe).config, name, None) is not None:
            raise ValueError(
                f"`pipe.unet` must not need {what} for `Sampler`, got {name}="
                f"{getattr(network_of(pipe).config, name)!r}: use `amg.protect`"
            )
