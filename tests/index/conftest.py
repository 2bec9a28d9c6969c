"""A deterministic embedder and small, distinct pictures."""

import filecmp
import io
import itertools
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


@pytest.fixture
def png():
    """A picture [3, H, W] as the bytes of a PNG, or of another format that loses nothing."""
    image_module = pytest.importorskip("PIL.Image")

    def encoded(picture: torch.Tensor, kind: str = "PNG") -> bytes:
        content = io.BytesIO()
        image_module.fromarray(picture.permute(1, 2, 0).numpy()).save(content, kind)
        return content.getvalue()

    return encoded


@pytest.fixture
def make(tmp_path: Path):
    """Build a pixel index of something, each under a name of its own."""
    from amg.index import Index

    count = itertools.count()

    def build(images, captions=None, embedder=None, **options) -> Index:
        path = options.pop("path", tmp_path / f"made-{next(count)}.amg")
        return Index.build(images, captions, embedder, path, progress=False, **options)

    return build


@pytest.fixture
def interrupted_twice(monkeypatch):
    """Build something in shards of four, stopped after each of the first two, and once more to the end; the
    same undisturbed: the two indexes are the same, byte for byte."""
    import amg.index.journal as journal
    from amg.index import Index

    def build(open_images, directory: Path, **options) -> Index:
        monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 4)
        options = {"progress": False, "batch_size": 2, **options}
        whole, killed = directory / "whole.amg", directory / "killed.amg"
        Index.build(open_images(), path=whole, **options)
        for shards in (1, 2):
            with monkeypatch.context() as patch:
                commit = journal.Journal.commit

                def stopping(self, *arguments, commit=commit, shards=shards):
                    commit(self, *arguments)
                    if self.state.shards == shards:
                        raise KeyboardInterrupt

                patch.setattr(journal.Journal, "commit", stopping)
                with pytest.raises(KeyboardInterrupt):
                    Index.build(open_images(), path=killed, **options)
            assert not killed.exists()
        Index.build(open_images(), path=killed, **options)
        names = sorted(file.name for file in whole.iterdir())
        assert names == sorted(file.name for file in killed.iterdir())
        assert filecmp.cmpfiles(whole, killed, names, shallow=False)[0] == names
        return Index.open(killed, verify=True)

    return build
