"""The white-box attacker: what it differentiates is what the guard compares, and it finds what passes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """benchmarks/bench_whitebox.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_whitebox")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("size", [32, 64])
def test_the_attacker_knows_the_guard_s_formula(bench, size):
    from amg.index.guard import sketch

    images = torch.rand(5, 3, size, size)
    torch.testing.assert_close(bench.directions(images), sketch(images).float(), rtol=0, atol=1e-3)


def test_it_finds_the_picture_that_passes_and_changes_it_least(bench):
    photos = torch.rand(3, 3, 8, 8)
    target = bench.Target(lambda images: images.mean((1, 2, 3)), 0.3)
    found = bench.attack(photos, lambda images: images.clamp(0, 1), photos, [target], 80)
    assert (found.mean((1, 2, 3)) <= 0.3).all() and torch.equal(found, bench.eight_bits(found))
    longest = (found - photos).square().mean((1, 2, 3)).sqrt()
    assert (longest < 1.5 * (photos.mean((1, 2, 3)) - 0.3)).all()


def test_what_passes_already_is_left_as_it_is(bench):
    photos = 0.1 * torch.rand(2, 3, 8, 8)
    target = bench.Target(lambda images: images.mean((1, 2, 3)), 0.3)
    found = bench.attack(photos, lambda images: images.clamp(0, 1), photos, [target], 3)
    assert torch.equal(found, bench.eight_bits(photos))
