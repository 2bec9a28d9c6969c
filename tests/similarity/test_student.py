"""The student's look: a cut per sample from numbers the host knows, no value read."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import amg
from amg.embed.student import LIMITS, Agreement, Origin, Student
from amg.similarity.student import Screen

from .. import reads, toy

LEVELS, LIMIT = [0.2, 0.2, 0.9, 0.9], [0.4, 0.5, 0.4, 0.1]


def band(above: float, below: float, shift: float) -> Agreement:
    """The student's cut for a limit is the limit less `shift`."""
    cuts = tuple(limit - shift for limit in LIMITS)
    return Agreement(above, below, 10, 1.0, 1.0, 1.0, cuts, (0.0,) * len(LIMITS))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> amg.Index:
    return toy.build("cosine", Path(tmp_path_factory.mktemp("cosine")) / "toy.amg")


def screen_of(index: Any, *bands: Agreement) -> Screen:
    """By default bands whose cuts differ."""
    agreement = bands or (band(0, 0.5, 0.1), band(0.5, 1.1, 0.3))
    torch.manual_seed(5)
    origin = Origin("toy", "ab" * 32, 40, 4, "cd")
    return Screen(Student(origin, width=8, blocks=1, agreement=agreement).eval(), index)


@dataclass
class Known:
    """An index whose similarities are known."""

    similarity: list[float]
    embedder: Any = field(default_factory=toy.ToyEmbedder)

    def nearest(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return torch.tensor(self.similarity), torch.arange(len(vectors)), None


def samples() -> torch.Tensor:
    return torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("similarity", "near"),
    [
        ([0.3, 0.4, 0.1, -1.0], [True, True, True, True]),  # at their cuts; none is known of 0.1
        ([0.29, 0.39, 0.09, -1.0], [False, False, False, True]),
        ([0.39, 0.39, 0.39, math.nan], [True, False, True, True]),
    ],
)
def test_each_sample_is_held_to_its_own_cut(similarity: list[float], near: list[bool]) -> None:
    screen = screen_of(Known(similarity))
    assert [screen.student.cut(*at) for at in zip(LEVELS, LIMIT, strict=True)] == pytest.approx(
        [0.3, 0.4, 0.1, -math.inf]
    )
    found = screen(samples(), LEVELS, LIMIT)
    assert found.near.tolist() == near
    assert found.measured.row.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_the_teacher_s_to_look_at(index: amg.Index, bad: float) -> None:
    screen, x0_hat = screen_of(index, band(0, 1.1, -3)), samples()
    expected = screen(x0_hat, LEVELS, LIMIT)
    assert expected.near.tolist() == [False, False, False, True]
    x0_hat[1, 0, 0, 0] = bad
    found = screen(x0_hat, LEVELS, LIMIT)
    assert found.near.tolist() == [False, True, False, True]
    others = [0, 2, 3]
    assert torch.equal(found.measured.similarity[others], expected.measured.similarity[others])
    assert math.isnan(found.measured.similarity[1]) and bool(found.measured.images[1].isnan().all())  # type: ignore[index]


def test_no_value_is_read(index: amg.Index, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, x0_hat = screen_of(index), samples()
    found = reads.watch(monkeypatch)
    screen(x0_hat, LEVELS, LIMIT)
    assert found == []


def test_on_a_device_whose_values_nobody_can_read(index: amg.Index) -> None:
    screen = screen_of(index.to("meta"))
    screen.student.to("meta")
    found = screen(samples().to("meta"), LEVELS, LIMIT)
    assert found.near.is_meta and (found.near.shape, found.near.dtype) == ((4,), torch.bool)
    assert found.measured.similarity.is_meta and found.measured.images.shape == (4, 3, 16, 16)  # type: ignore[union-attr]


def test_one_level_and_one_limit_a_sample(index: amg.Index) -> None:
    with pytest.raises(ValueError, match="must have 4 values, one a sample, got 3"):
        screen_of(index)(samples(), LEVELS[:3], LIMIT[:3])
    with pytest.raises(ValueError, match="zip"):
        screen_of(index)(samples(), LEVELS, LIMIT[:3])
