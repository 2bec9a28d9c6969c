"""Pictures as pipelines hand them out, and as they are checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amg.extras import needed

ORIENTATION = 0x0112  # the EXIF tag


def to_tensor(images: Any) -> Tensor:
    """Pipeline output of any type (list of PIL, [B, H, W, 3] array, [B, 3, H, W] tensor) as float [B, 3, H,
    W] in [0, 1]; a tensor in its own dtype, so that what replaces its images is checked as delivered."""
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"`images` must be [B, H, W, 3] to be checked, got {list(images.shape)}")
        return torch.from_numpy(images).permute(0, 3, 1, 2).float()
    if not isinstance(images, (list, tuple)) or not images:
        got = type(images).__name__
        raise TypeError(f"`images` must be PIL images, an array or a tensor to be checked, got {got}")
    arrays = [_pixels_of(image) for image in images]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"`images` must be of one size, got {sorted({array.shape for array in arrays})}")
    return torch.stack(arrays).permute(0, 3, 1, 2).float() / 255


def _pixels_of(image: Any) -> Tensor:
    """uint8 [H, W, 3] of a PIL image that every viewer shows alike; ValueError for any other."""
    Image = needed("PIL.Image", "a picture", "diffusers")
    if not isinstance(image, Image.Image):
        raise TypeError(f"`images` must hold PIL images to be checked, got {type(image).__name__}")
    turned = image.getexif().get(ORIENTATION, 1)
    clear = "transparency" in image.info
    if image.mode not in ("RGB", "L") or clear or turned != 1:
        got = f"mode {image.mode}{', transparency' if clear else ''}, EXIF orientation {turned}"
        raise ValueError(f"`images` must be opaque, upright, of mode RGB or L to be checked, got {got}")
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy())


def pictures_of(result: Any) -> Any:
    """The pictures that a pipeline's call gave. TypeError where it gave none, or others elsewhere."""
    images = result[0] if isinstance(result, tuple) and result else getattr(result, "images", None)
    if not isinstance(images, (Tensor, np.ndarray, Sequence)) or len(images) == 0:
        raise TypeError(
            "`pipe` must give pictures as `.images` to be checked, "
            f"got {type(result).__name__}: nothing of it is handed out"
        )
    require_no_others(result)
    return images


def require_no_others(result: Any) -> None:
    """TypeError for a pipeline's result that holds pictures in another place than the first: these would be
    handed out unchecked."""
    if isinstance(result, tuple):
        others = {f"place {place}": value for place, value in enumerate(result) if place}
    else:
        fields = result if isinstance(result, Mapping) else getattr(result, "__dict__", {})
        others = {f"`.{name}`": value for name, value in fields.items() if name != "images"}
    for where, value in others.items():
        if _shows(value):
            raise TypeError(
                f"`pipe` must give its pictures as `.images` alone to be checked, got more in {where} of "
                f"{type(result).__name__}: nothing of it is handed out"
            )


def _shows(value: Any) -> bool:
    """Whether a value holds pictures: PIL images, an array or tensor of three channels, or four of bytes."""
    if isinstance(value, Mapping):
        return any(_shows(one) for one in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_shows(one) for one in value)
    if isinstance(value, (Tensor, np.ndarray)):
        four = str(value.dtype).endswith("uint8") and value.shape[-1:] == (4,)
        return value.ndim in (3, 4, 5) and (3 in (value.shape[-1], *value.shape[-4:-2]) or four)
    return any(kind.__module__ == "PIL.Image" for kind in type(value).__mro__)


def to_pil(images: Tensor) -> list[Any]:
    """float [B, 3, H, W] in [0, 1] as 8-bit PIL images."""
    Image = needed("PIL.Image", "a picture", "diffusers")
    array = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def put(images: Any, place: int, others: Any, at: int) -> Any:
    """Pipeline output with picture `at` of `others`, output of any type, in one place; itself unchanged."""
    if isinstance(images, Tensor):
        images = images.clone()
        images[place] = to_tensor(others)[at].to(images.device, images.dtype)
    elif isinstance(images, np.ndarray):
        images = images.copy()
        images[place] = to_tensor(others)[at].permute(1, 2, 0).cpu().numpy()
    else:
        images = list(images)
        pictures = others if isinstance(others, list) else to_pil(to_tensor(others))
        images[place] = pictures[at]
    return images
