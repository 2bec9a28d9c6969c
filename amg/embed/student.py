"""The student: a tiny decoder from x0_hat's latents to a small picture for the teacher's embedder.

It screens: where its similarity stays below its cut for a limit, at that noise level, the teacher (decoder,
embedder) need not look. Trained by `amg distill` for one model, index and embedder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from amg.replacing import replacing

FORMAT, VERSION = "amg student", 1
LIMITS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
SCALE = 4  # pixels per latent, each way


@dataclass(frozen=True)
class Origin:
    """What a student was distilled from: the teacher's name and sha256, its dimension, the model's latent
    channels, and the sha256 of its decoder's config."""

    teacher: str
    teacher_sha256: str
    dimension: int
    channels: int
    decoder_sha256: str


@dataclass(frozen=True)
class Agreement:
    """Student against teacher on held-out x0_hat with alpha_bar in [`above`, `below`), `count` of them.

    `cosine`: mean of the two embeddings; `correlation` of the two similarities; `same_row`: share of those
    with similarity > 0.3 with the same nearest row. `cuts`: of each of `LIMITS`, the similarity that the
    student stays above, at every step of the band, on a further generation whose similarity by the teacher
    exceeds the limit, but for a share `miss_rate` of them (conformal); -inf where too few did. `skipped`: the
    share of the x0_hat below the limit that the student stays below the cut on.
    """

    above: float
    below: float
    count: int
    cosine: float
    correlation: float
    same_row: float
    cuts: tuple[float, ...]
    skipped: tuple[float, ...]


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(nn.functional.silu(self.first(nn.functional.silu(self.norm(features)))))


class Student(nn.Module):
    """x0_hat latents float32 [B, C, h, w] -> a small picture [B, 3, SCALE·h, SCALE·w] for the teacher's
    embedder, in [0, 1] but unclamped.

    All its work is done at the latents' size. No batch statistics: a picture never depends on its
    batch-mates. `agreement`: by noise level, as measured by `amg distill`.
    """

    def __init__(self, origin: Origin, width: int = 64, blocks: int = 4, agreement: Sequence[Agreement] = ()):
        super().__init__()
        self.origin, self.width, self.agreement = origin, width, tuple(agreement)
        self.stem = nn.Conv2d(origin.channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.head = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)

    def forward(self, x0_hat: Tensor) -> Tensor:
        if x0_hat.ndim != 4 or x0_hat.shape[1] != self.origin.channels:
            raise ValueError(f"`x0_hat` must be [B, {self.origin.channels}, h, w], got {list(x0_hat.shape)}")
        features = self.blocks(self.stem(x0_hat.float()))
        return nn.functional.pixel_shuffle(self.head(features), SCALE) + 0.5

    def cut(self, alpha_bar: float, limit: float) -> float:
        """The similarity below which ours tells that the teacher's is not above `limit`, at this noise level;
        -inf where none is known."""
        bands = [one.cuts for one in self.agreement if one.above <= alpha_bar < one.below]
        cuts = zip(LIMITS, bands[0] if bands else (), strict=False)
        known = [cut for value, cut in cuts if value <= limit and cut > -math.inf]
        return known[-1] if known else -math.inf


def save_student(student: Student, path: str | Path, report: Mapping[str, Any]) -> None:
    """Write weights (float16) and, as metadata, origin, agreement and `report`; renamed when complete."""
    described = {
        "version": VERSION,
        "origin": asdict(student.origin),
        "width": student.width,
        "blocks": len(student.blocks),
        "agreement": [asdict(one) for one in student.agreement],
        **report,
    }
    weights = {name: tensor.half().contiguous() for name, tensor in student.state_dict().items()}
    with replacing(Path(path)) as partial:
        save_file(weights, partial, {FORMAT: json.dumps(described)})


def _require_claimed(described: Mapping[str, Any], origin: Origin, weights: Mapping[str, Tensor]) -> None:
    """ValueError unless the sizes that a file says are those of its weights, before anything is made."""
    claimed = (described["width"], origin.channels)
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if tuple(weights["stem.weight"].shape[:2]) != claimed or described["blocks"] != len(blocks):
        raise ValueError(f"width, channels {claimed} and {described['blocks']} blocks are not its weights'")


def load_student(path: str | Path, device: str | torch.device = "cpu") -> Student:
    """A student of `amg distill` in evaluation mode. Errors: FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"`student` must be a file of `amg distill`, found none at {path}")
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {})[FORMAT])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if described["version"] != VERSION:
            raise ValueError(f"version {described['version']!r}")
        agreement = [
            Agreement(**{**one, "cuts": tuple(one["cuts"]), "skipped": tuple(one["skipped"])})
            for one in described["agreement"]
        ]
        origin = Origin(**described["origin"])
        _require_claimed(described, origin, weights)
        student = Student(origin, described["width"], described["blocks"], agreement).float()
        student.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError, SafetensorError) as error:
        raise ValueError(
            f"`student` must be a file of `amg distill`, {FORMAT} version {VERSION}, got {path} ({error!r})"
        ) from error
    return student.eval().requires_grad_(False).to(device)
