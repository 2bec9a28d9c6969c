"""Bundled demo models that really memorise: `photos-ddpm`, `photos-sd`, `photos-flow`, and the networks that
measure and judge them.

Trained by benchmarks/zoo/, described in amg/zoo/README.md. Needs the extra `demo`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MODELS = ("photos-ddpm", "photos-sd", "photos-flow")


def load(name: str, device: str = "cpu") -> Any:
    """A bundled pipeline in float32: "photos-ddpm" (DDPMPipeline, 32x32), "photos-sd" (Stable Diffusion,
    64x64) or "photos-flow" (Stable Diffusion 3 on the decoder and text encoder of photos-sd, 64x64; its T5
    tokens are empty, `max_sequence_length=1` spares most of them)."""
    import torch

    if name not in MODELS:
        raise ValueError(f"`name` must be one of {MODELS}, got {name!r}")
    if name == "photos-flow":
        from amg.zoo.flow import assembled

        return assembled(FOLDER / name, load("photos-sd")).to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # `dtype` in later diffusers alone
        pipe = _pipeline_class(name).from_pretrained(
            FOLDER / name, local_files_only=True, torch_dtype=torch.float32
        )
    return pipe.to(device)


def student_path(name: str) -> Path:
    """The bundled file of `amg distill` for a model, for `AMGConfig.student`: there is one for photos-sd."""
    if name != "photos-sd":
        raise ValueError(f'`name` must be "photos-sd", got {name!r}')
    return FOLDER / "photos-sd-student" / "model.safetensors"


def _pipeline_class(name: str) -> Any:
    from amg.extras import needed, require

    if name != "photos-ddpm":
        require(["transformers"], f"the bundled model {name}", "demo")
    diffusers = needed("diffusers", f"the bundled model {name}", "demo")
    return diffusers.DDPMPipeline if name == "photos-ddpm" else diffusers.StableDiffusionPipeline


def build_index(name: str, path: str | Path, metric: str | None = None, progress: bool = True) -> Any:
    """Build the index of a bundled model's training set at `path`.

    metric: "nl2" (pixels) or "cosine" (photos-embedder); None: nl2 for photos-ddpm, cosine for the others.
    """
    from amg.embed.photos import load_photos
    from amg.index import Index
    from amg.zoo.photos import training_set

    if name not in MODELS:
        raise ValueError(f"`name` must be one of {MODELS}, got {name!r}")
    data = training_set(32 if name == "photos-ddpm" else 64)
    metric = metric or ("nl2" if name == "photos-ddpm" else "cosine")
    embedder = None if metric == "nl2" else load_photos()
    copies = [(row, copy) for row, count in enumerate(data.counts.tolist()) for copy in range(count)]
    rows = [row for row, _ in copies]
    ids = [data.ids[row] + (f"#{copy}" if copy else "") for row, copy in copies]
    captions = [data.captions[row] for row in rows]
    return Index.build(data.images[rows], captions, embedder, path, ids=ids, progress=progress)
