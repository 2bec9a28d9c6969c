"""`photos-flow`: a small Stable Diffusion 3 on the decoder and text encoder of photos-sd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amg.extras import needed


def projected(text_encoder: Any) -> Any:
    """photos-sd's CLIP text encoder as Stable Diffusion 3 wants it: pooled text through a projection, here
    the identity."""
    transformers = needed("transformers", "the bundled model photos-flow", "demo")
    encoder = transformers.CLIPTextModelWithProjection(text_encoder.config)
    encoder.text_model.load_state_dict(text_encoder.state_dict())
    with torch.no_grad():
        encoder.text_projection.weight.copy_(torch.eye(len(encoder.text_projection.weight)))
    return encoder.eval().requires_grad_(False)


def assembled(folder: Path, sd: Any) -> Any:
    """The pipeline, in float32: the transformer in `folder`, the rest out of photos-sd's pipeline `sd`."""
    diffusers = needed("diffusers", "the bundled model photos-flow", "demo")
    encoder = projected(sd.text_encoder)
    sd.vae.register_to_config(shift_factor=0.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer").float().eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=sd.vae,
        text_encoder=encoder,
        tokenizer=sd.tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=sd.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
