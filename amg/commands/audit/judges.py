"""Who looks at an audit's pictures, and what each of them says picture by picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from amg.commands.audit.folder import Record, read_picture
from amg.commands.audit.references import References, structure_size
from amg.commands.progress import bar


class Scorer(Protocol):
    """Text alignment: images float32 [B, 3, H, W] in [0, 1] and B prompts to float32 [B], NaN where it cannot
    tell."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor, prompts: Sequence[str], /) -> Tensor: ...


@dataclass(frozen=True)
class Judges:
    """`index` guided, `also` bound the final check; all else guidance never saw.

    `further`: indexes of other embedders by name; `copies`: by name who knows copies of the bundled models'
    photographs; `network`: name and FID features. What is None or empty has its reason in `missing`.
    """

    index: Any
    also: tuple[tuple[str, Any], ...] = ()
    further: tuple[tuple[str, Any], ...] = ()
    copies: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()
    alignment: Scorer | None = None
    network: tuple[str, Callable[[Tensor], Tensor]] | None = None
    references: References | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Looked:
    """What one guidance's N pictures look like to each judge, on the CPU.

    `similarity` and those of `by_index` (sigma, float32 [N]) are measured again on the pictures kept;
    `copies` are a judge's probabilities [N], `vectors` [N, D] the guiding index's embeddings, `small`
    [N, 3, h, w] float32 what the structural judge compares, `size` that of the pictures.
    """

    records: list[Record]
    similarity: Tensor
    vectors: Tensor
    small: Tensor
    size: tuple[int, int]
    by_index: dict[str, Tensor]
    copies: dict[str, Tensor]
    alignment: Tensor | None = None
    features: Tensor | None = None

    @property
    def blocked(self) -> Tensor:
        """bool [N]: a blank image was delivered."""
        return torch.tensor([record.verdict.blocked for record in self.records])


def named_index(path: Path, spec: str | None, device: str) -> tuple[str, Any]:
    """A further index and its judge's name, its embedder's or "pixels"."""
    from amg.commands.indexes import open_index

    index = open_index(path, spec, device, "--judge-embedder")
    return judge_name(index), index


def judge_name(index: Any) -> str:
    """What measures under an index: its embedder's name, or "pixels"."""
    return index.manifest.embedder.name if index.manifest.embedder else "pixels"


def require_unseen(further: Sequence[tuple[str, Any]], guided: Sequence[Any]) -> None:
    """Refuse a judge that guidance or the final check uses: that one proves nothing."""
    used = {_measure_of(index): index for index in guided}
    for name, index in further:
        if _measure_of(index) in used:
            raise ValueError(
                f"`--judge` must measure with something guidance never saw, got {index.path} with {name}, "
                f"as {used[_measure_of(index)].path} does"
            )


def distinct_names(indexes: Sequence[Any]) -> list[str]:
    """The judge names of indexes, numbered where two measure alike."""
    names = [judge_name(index) for index in indexes]
    return [
        name if names.index(name) == at else f"{name} {names[: at + 1].count(name)}"
        for at, name in enumerate(names)
    ]


def try_out(judges: Judges, size: tuple[int, int], prompt: str, device: str) -> None:
    """Show every judge two pictures of noise of the size to be drawn: who cannot judge them says so now."""
    noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    _seen_by(noise.to(device), [prompt] * 2, judges)
    if judges.references is not None and not any(picture.numel() for _, picture in judges.references.read()):
        raise ValueError(
            f"`--images-of-index` must hold readable images, got none in {judges.references.name}"
        )


def _measure_of(index: Any) -> tuple[str, str]:
    embedder = index.manifest.embedder
    return index.metric, embedder.sha256 if embedder else "pixels"


@torch.no_grad()
def look(records: Sequence[Record], judges: Judges, batch_size: int, device: str, title: str) -> Looked:
    """Show one guidance's pictures to every judge, in batches; shows progress."""
    parts: dict[str, list[Tensor]] = {}
    size = (0, 0)
    with bar(len(records), f"judging {title}") as shown:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            images = torch.stack([read_picture(record.path) for record in batch]).float() / 255
            size = (images.shape[2], images.shape[3])
            prompts = [record.prompt.caption for record in batch]
            for key, values in _seen_by(images.to(device), prompts, judges).items():
                parts.setdefault(key, []).append(values.cpu())
            shown.update(len(batch))
    whole = {key: torch.cat(values) for key, values in parts.items()}
    named = [name for name, _ in (*judges.also, *judges.further)]
    return Looked(
        list(records),
        whole["similarity"],
        whole["vectors"],
        whole["small"],
        size,
        {name: whole[f"index {name}"] for name in named},
        {name: whole[f"copies {name}"] for name, _ in judges.copies},
        *(whole.get(key) for key in ("alignment", "features")),
    )


def _seen_by(images: Tensor, prompts: list[str], judges: Judges) -> dict[str, Tensor]:
    vectors = judges.index.embed(images)
    found = {
        "vectors": vectors,
        "similarity": judges.index.with_searcher("exact").nearest(vectors).similarity,
        "small": interpolate(images, structure_size((images.shape[2], images.shape[3])), mode="area").cpu(),
    }
    for name, index in (*judges.also, *judges.further):
        found[f"index {name}"] = index.with_searcher("exact").nearest(index.embed(images)).similarity
    for name, copies in judges.copies:
        found[f"copies {name}"] = copies(images)
    if judges.alignment is not None:
        found["alignment"] = judges.alignment(images, prompts)
    if judges.network is not None:
        found["features"] = judges.network[1](images).double()
    return found
