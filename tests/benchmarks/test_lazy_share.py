"""The shares of lazy searches add up, and a wrong decision is found."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from amg.index.exact import ExactCosine

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def lazy_share():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("lazy_share")
    sys.path.remove(str(BENCHMARKS))


def walk_and_index():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(600, 12, generator=generator))
    steps = torch.cat([rows[:4][None], 0.02 * torch.randn(9, 4, 12, generator=generator)]).cumsum(0)
    return torch.nn.functional.normalize(steps, dim=2), SimpleNamespace(searcher=ExactCosine(rows))


def test_every_search_is_proved_closed_or_full(lazy_share):
    walks, index = walk_and_index()
    for limit in (-1.0, 0.4):
        lines = lazy_share.shares(index, walks, limit)
        assert [(name, total) for name, total, *_ in lines] == [("early", 20), ("late", 20)]
        for *_, proved, closed, full in lines:
            assert proved + closed + full == pytest.approx(100)
        assert lines[0][4] >= 20  # the first search of each of four samples is full
        assert lines[1][2] > 0


def test_a_wrong_decision_is_an_error(lazy_share, monkeypatch):
    walks, index = walk_and_index()
    plain = lazy_share.nearest_lazily

    def wrong(*arguments, **options):
        found = plain(*arguments, **options)
        return found._replace(row=found.row + 1)

    monkeypatch.setattr(lazy_share, "nearest_lazily", wrong)
    with pytest.raises(AssertionError, match="otherwise than a full one"):
        lazy_share.shares(index, walks, -1.0)
