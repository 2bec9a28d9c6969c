"""Streaming, sketched folding equals the brute-force greedy rule."""

import numpy as np
import pytest
import torch

from amg.index import Index
from amg.index.fold import HashTable
from amg.index.sketches import Sketcher

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
    monkeypatch.setattr("amg.index.fold.FOLD_BLOCK", 11)
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
    full = torch.cdist(rows.double() / 255, rows.double() / 255)
    short = torch.cdist(*[Sketcher(size).sketch(rows).sketches.double()] * 2)
    assert (short <= full + 1e-5).all() and short.max() > 0.05 * full.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("first", "dimension"), [(1, 512), (30, 40), (200, 512), (2000, 96)])
def test_a_sketch_of_vectors_never_exceeds_the_distance(first, dimension, dtype):
    """Whatever rows decided on the axes, all rows are projected on the same; those that vary most first."""
    spectrum = torch.arange(1, dimension + 1) ** -0.5
    rows = torch.nn.functional.normalize(0.3 + torch.randn(2000, dimension) * spectrum, dim=1).to(dtype)
    sketcher = Sketcher(None)
    short = torch.cat([sketcher.sketch(part).sketches for part in (rows[:first], rows[first:])]).double()
    chosen = torch.randint(2000, (2, 400))
    full = (rows.double()[chosen[0]] - rows.double()[chosen[1]]).norm(dim=1)
    apart = short[chosen[0]] - short[chosen[1]]
    assert (apart.norm(dim=1) <= full * (1 + 1e-5) + 1e-6).all()
    energy = apart.square().mean(0)
    if first >= 200:
        assert apart.norm(dim=1).mean() > 0.6 * full.mean() and energy[:16].sum() > 2 * energy[48:].sum()


def test_a_sketcher_holds_what_was_kept():
    sketcher, made = Sketcher(None), []
    for count in (3, 1, 0, 700, 40):
        made.append(sketcher.sketch(torch.randn(count, 70)))
        sketcher.keep(made[-1].codes)
    known = sketcher.known()
    for at in range(3):
        assert torch.equal(known.codes[at], torch.cat([part.codes[at] for part in made]))
    assert len(known.sketches) == 0


def test_a_hash_is_found_in_every_run_and_the_first_row_of_it():
    rng, table, known = np.random.default_rng(0), HashTable(), np.empty(0, dtype=np.uint64)
    for count in (5, 300, 0, 1, 1, 64, 1000, 7):
        hashes = rng.integers(0, 700, count).astype(np.uint64)
        table.add(hashes, len(known))
        known = np.concatenate([known, hashes])
    asked = rng.integers(0, 900, 500).astype(np.uint64)
    expected = [int(np.flatnonzero(known == value)[0]) if value in known else -1 for value in asked]
    assert table.find(asked).tolist() == expected and -1 in expected
