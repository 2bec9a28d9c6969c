"""A deterministic embedder and small, distinct pictures."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch


@dataclass
class ToyEmbedder:
    """A fixed random projection of 4x4 block means."""

    name: str = "toy"
    dimension: int = 24
    sha: str = "a" * 64
    preprocessing: str = "none"
    projection: torch.Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.projection = torch.randn(48, self.dimension, generator=generator)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(images, (4, 4)).flatten(1) - 0.5
        return means @ self.projection.to(means)


@pytest.fixture
def embedder() -> ToyEmbedder:
    return ToyEmbedder()


@pytest.fixture
def pictures() -> torch.Tensor:
    """uint8 [80, 3, 8, 8], all far apart."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (80, 3, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path, pictures: torch.Tensor) -> Path:
    """Six PNGs in two folders, a caption beside some of them."""
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path / "images"
    for at in range(6):
        file = root / ("a" if at < 3 else "b") / f"{at}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(pictures[at].permute(1, 2, 0).numpy()).save(file)
        if at % 2 == 0:
            file.with_suffix(".txt").write_text(f"picture {at}\n")
    return root
