"""Streaming, sketched folding equals the brute-force greedy rule."""

import pytest
import torch

from amg.index import Index
from amg.index.fold import FoldRule, near_pairs, sketch_rows

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


def greedy(closeness: torch.Tensor, threshold: float) -> list[int]:
    """Row of each image: that of its closest kept image within the threshold, or a new one."""
    kept: list[int] = []
    rows: list[int] = []
    for i in range(len(closeness)):
        near = [(closeness[i, j].item(), -row) for row, j in enumerate(kept) if closeness[i, j] >= threshold]
        if near:
            rows.append(-max(near)[1])
        else:
            rows.append(len(kept))
            kept.append(i)
    return rows


def families(members: int, spread: float) -> torch.Tensor:
    """uint8 [12 * members, 3, 9, 10]: shuffled noisy versions of 12 smooth pictures."""
    base = torch.rand(12, 3, 3, 2).repeat_interleave(3, 2).repeat_interleave(5, 3)
    noisy = base.repeat_interleave(members, 0)
    noisy = noisy + spread * torch.rand(len(noisy), 1, 1, 1) * torch.randn_like(noisy)
    return (noisy[torch.randperm(len(noisy))].clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("shard", [7, 64, 1024])
def test_pixel_folding_is_greedy(tmp_path, monkeypatch, shard):
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", shard)
    monkeypatch.setattr("amg.index.fold.KEPT_BLOCK", 11)
    images = families(15, 0.06)
    flat = images.flatten(1).double() / 255
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    rows = greedy(-distance, -0.02)
    index = Index.build(images, path=tmp_path / "i", progress=False, batch_size=7)
    assert 12 < index.count < len(images)
    assert index.counts.tolist() == torch.bincount(torch.tensor(rows)).tolist()
    assert index.ids == [str(rows.index(row)) for row in range(index.count)]


@pytest.mark.parametrize("shard", [8, 1024])
def test_cosine_folding_is_greedy(tmp_path, monkeypatch, embedder, shard):
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", shard)
    images = families(15, 0.3)
    unit = torch.nn.functional.normalize(embedder(images / 255), dim=1)
    rows = greedy(unit @ unit.T, 0.98)
    index = Index.build(images, None, embedder, tmp_path / "i", progress=False, batch_size=8, dtype="float32")
    assert 12 <= index.count < len(images)
    assert index.counts.tolist() == torch.bincount(torch.tensor(rows)).tolist()


@pytest.mark.parametrize("size", [(32, 32), (9, 13), (2, 3), (1, 1)])
def test_a_pixel_sketch_never_exceeds_the_distance(size):
    rows = torch.randint(0, 256, (40, 3 * size[0] * size[1]), dtype=torch.uint8)
    rule = FoldRule("nl2", 0.02, size)
    full = torch.cdist(rows.double() / 255, rows.double() / 255)
    short = torch.cdist(*[sketch_rows(rows, rule).double()] * 2)
    assert (short <= full + 1e-5).all() and short.max() > 0.05 * full.max()


@pytest.mark.parametrize("dimension", [16, 64, 512])
def test_near_pairs_misses_none(dimension):
    rows = torch.nn.functional.normalize(torch.randn(60, dimension), dim=1)
    rows = torch.nn.functional.normalize(
        rows.repeat(3, 1) + 0.15 * torch.randn(180, dimension) / dimension**0.5
    )
    rule = FoldRule("cosine", 0.97)
    short = sketch_rows(rows, rule)
    pairs = near_pairs(rows, short, rows, short, rule)
    expected = (rows.double() @ rows.double().T >= 0.97).nonzero()
    assert len(expected) > 180
    assert torch.equal(torch.stack([pairs.left, pairs.right], 1), expected)
