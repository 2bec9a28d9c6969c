"""Image towers of open_clip (extra `clip`) from a local checkpoint; the network is never asked.

The preprocessing (size, mean, standard deviation, interpolation, resize mode) is the model's own. open_clip
publishes it per set of weights, not per architecture: ViT-L-14 has two normalisations, ViT-B-32 two
activations. Where the published sets disagree, the caller names one.
"""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amg.embed.network import NetworkEmbedder, Preprocess, file_sha256
from amg.extras import needed

MODES = {"shortest": "short_crop", "longest": "long_pad", "squash": "square"}
PER_WEIGHTS = ("mean", "std", "interpolation", "resize_mode", "quick_gelu")


class ImageTower(nn.Module):
    """The visual part of a CLIP or CoCa model; the text part is dropped."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        output = self.visual(images)
        return output[0] if isinstance(output, tuple) else output


def import_open_clip() -> Any:
    """The open_clip package, or an ImportError that names the extra."""
    return needed("open_clip", "an embedder of open_clip")


@contextlib.contextmanager
def _float32_by_default() -> Iterator[None]:
    """open_clip makes its networks in the default dtype: in another one of the host's, weights would be
    rounded to it as they are loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def published_settings(open_clip: Any, model: str, tag: str | None) -> dict[str, Any]:
    """Preprocessing and activation published with the weights `tag`, or those that all tags share."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag is not None and tag not in tags:
        raise ValueError(
            f"`tag` must be one of {', '.join(tags) or '(none published)'} for {model}, got {tag!r}"
        )
    settings = []
    for published in [tag] if tag is not None else tags:
        found = open_clip.get_pretrained_cfg(model, published)
        settings.append({key: found[key] for key in PER_WEIGHTS if found.get(key) is not None})
    if any(other != settings[0] for other in settings):
        raise ValueError(
            f"`tag` must name the weights, as in open_clip:{model}@TAG:PATH: those published for {model} "
            f"differ in preprocessing or activation; got none of {', '.join(tags)}"
        )
    return settings[0] if settings else {}


def preprocess_of(config: dict[str, Any]) -> Preprocess:
    """An open_clip preprocessing configuration in plain torch."""
    if config["resize_mode"] not in MODES:
        raise ValueError(f"`resize_mode` must be one of {', '.join(MODES)}, got {config['resize_mode']!r}")
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode, interpolation = MODES[config["resize_mode"]], config["interpolation"]
    if interpolation == "random" or (mode == "short_crop" and height != width):
        interpolation = "bicubic"  # what open_clip itself does in these two cases
    return Preprocess(
        (height, width),
        mode=mode,
        interpolation=interpolation,
        mean=config["mean"],
        std=config["std"],
        fill=config["fill_color"] / 255,
    )


def load_open_clip(model: str, path: str | Path, *, tag: str | None = None) -> NetworkEmbedder:
    """An open_clip image tower from a local checkpoint.

    model: an architecture known to open_clip ("ViT-B-32"; one's own after `open_clip.add_model_config`).
    path: a safetensors or .pt state dict of the whole model, read with `weights_only=True`.
    tag: which published weights these are ("laion2b_s34b_b79k"), for their preprocessing; needed only where
    the published weights of `model` disagree. Output: [B, dimension], not normalised. `sha` is the file's.
    Errors: ImportError (extra missing), FileNotFoundError, ValueError (unknown model or tag, wrong weights).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be a checkpoint file, got {path}")
    open_clip = import_open_clip()
    config = open_clip.get_model_config(model) if ":" not in model else None
    if config is None:
        raise ValueError(
            f"`model` must be a model that open_clip knows (open_clip.list_models()), got {model!r}"
        )
    if "hf_model_name" in config.get("text_cfg", {}):
        raise ValueError(f"`model` must not need files from a hub, got {model!r}, whose text part does")
    settings = published_settings(open_clip, model, tag)
    quick_gelu = bool(settings.pop("quick_gelu", False))
    try:
        with _float32_by_default():
            whole = open_clip.create_model(
                model,
                str(path),
                force_quick_gelu=quick_gelu,
                force_preprocess_cfg=settings,
                require_pretrained=True,
            )
    except (RuntimeError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"`path` must hold weights of {model}, got {path}: {str(error)[:300]}") from error
    preprocess = preprocess_of(open_clip.get_model_preprocess_cfg(whole))
    tower = ImageTower(whole.visual).float().eval()
    with torch.no_grad():
        dimension = tower(torch.zeros(1, 3, *preprocess.size, dtype=torch.float32)).shape[1]
    name = f"open_clip:{model}" + (f"@{tag}" if tag else "")
    return NetworkEmbedder(preprocess, tower, name=name, dimension=dimension, sha=file_sha256(path))
