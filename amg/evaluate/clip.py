"""Text alignment with CLIP: 100 times the cosine of a picture and its prompt (Hessel et al. 2021).

Weights come from local files only. Scores of different CLIP models are not comparable with one another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amg.embed.network import Preprocess
from amg.extras import needed

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipAlignment:
    """A CLIP model as a scorer: call(images float32 [B, 3, H, W] in [0, 1], B prompts) -> float32 [B].

    `name` says which model; the score is 100 times the cosine, in [-100, 100]. `encode` maps (preprocessed
    images, prompts) to image and text embeddings [B, D].
    """

    name: str
    preprocess: Preprocess
    encode: Any

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"`prompts` must be one per image, got {len(prompts)} for {len(images)}")
        found = self.encode(self.preprocess(images.float()), list(prompts))
        picture, text = (nn.functional.normalize(vectors.float(), dim=1) for vectors in found)
        return 100 * (picture * text).sum(1)


def load_clip(folder: str | Path, device: str | torch.device = "cpu") -> ClipAlignment:
    """A transformers CLIP model (weights, tokenizer, preprocessor_config.json) from a local folder.

    Errors: FileNotFoundError where the folder has no config.json, ImportError naming the extra.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"`--clip` must be a folder with a transformers CLIP model, got {folder}")
    transformers = needed("transformers", "CLIP alignment")
    model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
    model = model.eval().requires_grad_(False).to(device)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        out = model(**tokens, pixel_values=images.to(model.dtype))
        return out.image_embeds, out.text_embeds

    size = model.config.vision_config.image_size
    return ClipAlignment(f"CLIP {folder.name}", _preprocess(folder, size).to(device), encode)


def load_open_clip_alignment(spec: str, device: str | torch.device = "cpu") -> ClipAlignment:
    """An open_clip model named as MODEL[@TAG]:FILE, FILE a local checkpoint; as `amg.embed.load` takes it.

    Errors: ValueError for another spec, FileNotFoundError, ImportError naming the extra.
    """
    from amg.embed.open_clip import import_open_clip, preprocess_of, published_settings

    named, _, path = spec.partition(":")
    model, _, tag = named.partition("@")
    if not model or not path:
        raise ValueError(f"`--open-clip` must be MODEL:FILE or MODEL@TAG:FILE, got {spec!r}")
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"`--open-clip` must name a checkpoint file, got {path}")
    open_clip = import_open_clip()
    settings = published_settings(open_clip, model, tag or None)
    whole = open_clip.create_model(
        model,
        str(Path(path).expanduser()),
        force_quick_gelu=bool(settings.pop("quick_gelu", False)),
        force_preprocess_cfg=settings,
        require_pretrained=True,
    )
    whole = whole.float().eval().requires_grad_(False).to(device)
    tokenizer = open_clip.get_tokenizer(model)

    def encode(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return whole.encode_image(images), whole.encode_text(tokenizer(prompts).to(device))

    preprocess = preprocess_of(open_clip.get_model_preprocess_cfg(whole))
    return ClipAlignment(f"open_clip {named}", preprocess.to(device), encode)


def _config_of(path: Path) -> dict[str, Any]:
    """A JSON file's object; ValueError naming the file."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(given).__name__}")
    return given


def _preprocess(folder: Path, size: int) -> Preprocess:
    """The model's own mean and deviation where the folder says them, CLIP's otherwise; centre crop."""
    path = folder / "preprocessor_config.json"
    given = _config_of(path) if path.is_file() else {}
    return Preprocess(
        (size, size),
        mode="short_crop",
        interpolation="bicubic",
        mean=given.get("image_mean") or CLIP_MEAN,
        std=given.get("image_std") or CLIP_STD,
    )
