"""What is known of the bundled models: their training images, and photos-judge in the place of CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from amg import zoo
from amg.commands.audit.references import References

COPY = 0.5  # photos-judge and photos-judge-2 call a picture a copy above this


def bundled_name(model: str, pipe: object) -> str | None:
    """The bundled model that `MODEL` names, itself or by its folder; None for anybody else's."""
    path = Path(model)
    if model in zoo.MODELS:
        return model
    inside = path.resolve().parent == zoo.FOLDER.resolve() and path.name in zoo.MODELS
    return path.name if inside else None


def bundled_references(name: str) -> References:
    """The distinct training images of a bundled model, by the ids its index has."""
    from amg.zoo.photos import training_set

    def read() -> Iterator[tuple[str, Tensor]]:
        data = training_set(32 if name == "photos-ddpm" else 64)
        yield from zip(data.ids, data.images, strict=True)

    return References(f"the distinct training images of {name}", read)


class SubjectAlignment:
    """photos-judge as a scorer of text alignment: the probability of the subject that the prompt names.

    Call: images float32 [B, 3, H, W] in [0, 1] and B prompts (captions, or class numbers) to float32 [B] in
    [0, 1]; NaN where a prompt names no subject that photos-judge knows.
    """

    name = "photos-judge, probability of the prompt's subject"

    def __init__(self, device: str):
        from amg.zoo.judge import load_judge

        self.judge = load_judge(device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        labels = torch.tensor([subject_of(prompt) for prompt in prompts], device=images.device)
        scores = self.judge.subject_probability(images, labels.clamp_min(0))
        return torch.where(labels < 0, torch.nan, scores)


def subject_of(prompt: str) -> int:
    """The subject a prompt of the bundled models asks for, as its number in `PHOTOS`; -1 if none is known.

    A class number, a caption that whole photographs have, or a caption of a crop: "… a cat, top left".
    """
    from amg.zoo.photos import PHOTOS

    if prompt.isdecimal() and int(prompt) < len(PHOTOS):
        return int(prompt)
    phrase = prompt.split(",")[0].lower()
    for label, photo in enumerate(PHOTOS):
        if prompt == photo.specific:
            return label
        if any(f" {subject} " in f" {phrase} " for subject in photo.subjects):
            return label
    return -1


def copy_judges(device: str) -> tuple[tuple[str, Callable[[Tensor], Tensor]], ...]:
    """By name each bundled judge's probability that a picture copies a whole training photograph, float32
    [B]."""
    from amg.zoo.judge import load_judge
    from amg.zoo.judge_2 import load_judge_2

    judges = (("photos-judge", load_judge(device=device)), ("photos-judge-2", load_judge_2(device=device)))
    return tuple((name, judge.copy_probability) for name, judge in judges)


def fid_features(device: str) -> Callable[[Tensor], Tensor]:
    """photos-judge's 96 features, [B, 96]."""
    from amg.zoo.judge import load_judge

    return load_judge(device=device).features
