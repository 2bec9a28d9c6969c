"""What is seen of a watched call's latents: the decoder, held to the pipeline's own pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amg.pipelines.denoiser import decoder_of
from amg.pipelines.pictures import to_tensor
from amg.protection.halves import Unknown

ALIKE = 0.02  # mean difference of pictures that are the same, of 1


def decoder(pipe: Any, arguments: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Latents of a call -> pictures [B, 3, H, W], of the size that was asked for."""
    factor, own = getattr(pipe, "vae_scale_factor", 8), getattr(pipe, "default_sample_size", None)
    default = own * factor if isinstance(own, int) else 0
    height, width = (int(arguments.get(name) or default) for name in ("height", "width"))
    return decoder_of(pipe, (height, width))


@torch.no_grad()
def tried(decode: Callable[[Tensor], Tensor], sample: Tensor) -> None:
    """Ask a decoder once; `Unknown` where it gives no pictures."""
    try:
        picture = decode(sample[:1])
    except Exception as error:
        raise Unknown(f"its latents {list(sample.shape)} cannot be decoded here: {error}") from error
    if picture.ndim != 4 or picture.shape[:2] != (1, 3):
        raise Unknown(f"its latents decode to {list(picture.shape)}, which is no picture")


@torch.no_grad()
def require_alike(decode: Callable[[Tensor], Tensor], last: Tensor, images: Any) -> None:
    """`Unknown` where a call's last latents, decoded here, are not the pictures that it gave."""
    shown = to_tensor(images).float()
    own = decode(last)[: len(shown)].clamp(0, 1).to(shown)
    if own.shape != shown.shape:  # a size that was rounded for the network
        own = functional.interpolate(own, shown.shape[2:], mode="bilinear", antialias=True)
    if float((own - shown).abs().mean()) > ALIKE:
        raise Unknown("its pictures are not what its last step's latents decode to here")
