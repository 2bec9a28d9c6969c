"""The arguments of a pipeline's own call, cut to one of its pictures: what it takes to draw that one again.

Arguments are cut by name, never by length: `original_size=(1024, 1024)` of two prompts is not one each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

PROMPTS = ("prompt", "prompt_2", "prompt_3", "prompt_4")
NEGATIVE = tuple(f"negative_{name}" for name in PROMPTS)
# a row a prompt
EMBEDDED = (
    "prompt_embeds",
    "prompt_embeds_2",
    "pooled_prompt_embeds",
    "prompt_attention_mask",
    "prompt_attention_mask_2",
    "prompt_embeds_mask",
    "negative_prompt_embeds",
    "negative_prompt_embeds_2",
    "negative_pooled_prompt_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_attention_mask_2",
    "negative_prompt_embeds_mask",
)
OF_ROWS = (*PROMPTS, *NEGATIVE, *EMBEDDED, "class_labels")
# lists and tables that all pictures of a call share
SHARED = (
    "timesteps",
    "sigmas",
    "original_size",
    "target_size",
    "crops_coords_top_left",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
    "cross_attention_kwargs",
    "attention_kwargs",
    "joint_attention_kwargs",
    "callback_on_step_end_tensor_inputs",
)
DROPPED = ("latents",)  # the noise that made the copy


@dataclass(frozen=True)
class Asked:
    """What a call was asked for: its `arguments` by name, how many pictures it gave, and whether there were
    arguments without a name."""

    arguments: Mapping[str, Any]
    count: int
    unnamed: bool = False

    @property
    def per_prompt(self) -> int:
        """How many pictures of each prompt."""
        return self.arguments.get("num_images_per_prompt") or 1

    @property
    def by_rows(self) -> bool:
        """Whether one picture can be drawn alone: every argument is known to be a row each, or shared."""
        rows = [self.arguments[name] for name in OF_ROWS if _is_rows(self.arguments.get(name))]
        if self.unnamed or any(len(value) * self.per_prompt != self.count for value in rows):
            return False
        named = (*OF_ROWS, *SHARED, *DROPPED, "generator")
        return all(name in named or _is_shared(value) for name, value in self.arguments.items())

    def prompt_of(self, place: int) -> str | None:
        """The text that a picture was asked for, where it is known."""
        prompt = self.arguments.get("prompt")
        if isinstance(prompt, (list, tuple)) and len(prompt) * self.per_prompt != self.count:
            return None
        return prompt if isinstance(prompt, str) else self.texts.get(place)

    @property
    def texts(self) -> dict[int, str]:
        """The texts that pictures were asked for, as far as they are known: by their places, in diffusers'
        order."""
        prompt = self.arguments.get("prompt")
        texts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        repeated = [text for text in texts for _ in range(self.per_prompt)]
        return {place: text for place, text in enumerate(repeated) if isinstance(text, str)}

    @property
    def expected(self) -> int | None:
        """How many pictures a call will give, where its prompts or classes tell."""
        for name in ("prompt", "prompt_embeds", "class_labels"):
            value = self.arguments.get(name)
            if value is not None:
                return (len(value) if _is_rows(value) else 1) * self.per_prompt
        return None

    def alone(self, place: int, attempt: int, caption: str | None) -> dict[str, Any]:
        """The arguments that draw one picture again, alone; with `caption` in place of its prompts."""
        again = {name: value for name, value in self.arguments.items() if name not in DROPPED}
        for name in OF_ROWS:
            value = again.get(name)
            if value is not None and _is_rows(value):
                row = place // self.per_prompt
                again[name] = value[row : row + 1]
        for name, one in (("num_images_per_prompt", 1), ("batch_size", 1)):
            if again.get(name) is not None:
                again[name] = one
        if again.get("generator") is not None:
            again["generator"] = self._generator(place, attempt)
        for name in PROMPTS if caption is not None else ():
            if again.get(name) is not None:
                again[name] = caption if isinstance(again[name], str) else [caption]
        return again

    def whole(self, attempt: int, captions: Mapping[int, str]) -> dict[str, Any]:
        """The arguments that draw the whole batch again, `captions` in place of some pictures' prompts."""
        again = {name: value for name, value in self.arguments.items() if name not in DROPPED}
        generator = again.get("generator")
        if isinstance(generator, (list, tuple)):
            again["generator"] = [self._generator(place, attempt) for place in range(len(generator))]
        elif generator is not None:
            again["generator"] = self._generator(0, attempt)
        for name in PROMPTS if captions else ():
            value = again.get(name)
            if isinstance(value, (list, tuple)):
                told = {place // self.per_prompt: caption for place, caption in captions.items()}
                again[name] = [told.get(at, text) for at, text in enumerate(value)]
            elif value is not None and len(captions) == self.count:
                again[name] = next(iter(captions.values()))
        return again

    def _generator(self, place: int, attempt: int) -> torch.Generator:
        """A source of noise that belongs to one picture and one try: made of its own generator's seed, so
        that it does not depend on the other pictures where each has one."""
        given = self.arguments["generator"]
        own = isinstance(given, (list, tuple))
        generator = given[place] if own else given
        text = f"{generator.initial_seed()} {0 if own else place} {attempt}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        return torch.Generator(generator.device).manual_seed(seed)


def _is_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple, torch.Tensor))


def _is_shared(value: Any) -> bool:
    """A value that cannot be one for each picture: nothing, a number, a text, a switch, a function, or one
    PIL image."""
    if value is None or isinstance(value, (bool, int, float, str)) or callable(value):
        return True
    return any(kind.__module__ == "PIL.Image" for kind in type(value).__mro__)
