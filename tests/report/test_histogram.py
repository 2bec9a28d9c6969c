import numpy as np
import pytest

from amg.report.histogram import histogram, nice_step


def test_every_value_is_counted_once_and_warm_bars_hold_exactly_those_above():
    rng = np.random.default_rng(0)
    values = {"off": (-rng.uniform(0.1, 2.2, 400)).tolist(), "main": [-1.4, -1.4000001, -1.3999999, -2.0]}
    chart = histogram("nL2", "", values, {"memorised": -1.4}, negated=True)
    for row in chart.rows:
        numbers = np.array(values[row.column])
        assert sum(bar.count for bar in row.bars) == len(numbers)
        assert sum(bar.count for bar in row.bars if bar.warm) == (numbers > -1.4).sum() == row.closer
        line = row.lines[0].left
        assert all(bar.left >= line - 1e-6 for bar in row.bars if bar.warm)
        assert all(bar.left + bar.width <= line + 1e-6 for bar in row.bars if not bar.warm)


def test_bars_lie_where_their_values_are():
    chart = histogram("", "", {"off": [0.9], "main": [0.1]}, {"memorised": 0.5})
    ticks = {tick.label: tick.left for tick in chart.ticks}
    low, high = ticks["0.2"], ticks["0.8"]
    position = lambda value: low + (high - low) * (value - 0.2) / 0.6  # noqa: E731
    for row, value in zip(chart.rows, (0.9, 0.1), strict=True):
        (bar,) = row.bars
        assert bar.left - 1e-6 <= position(value) <= bar.left + bar.width + 1e-6
        assert bar.height == 100.0
    assert chart.rows[0].lines[0].left == pytest.approx(position(0.5))


def test_axis_is_labelled_in_nl2_and_runs_towards_closer():
    chart = histogram("", "", {"off": [-2.0, -0.2]}, {"memorised": -1.4}, negated=True)
    labels = [float(tick.label) for tick in chart.ticks]
    assert labels == sorted(labels, reverse=True)
    assert min(labels) > 0


def test_a_threshold_named_after_a_column_is_drawn_there_only():
    chart = histogram("", "", {"off": [0.9], "strong": [0.3]}, {"memorised": 0.5, "strong": 0.4})
    assert [len(row.lines) for row in chart.rows] == [1, 2]


def test_one_value_and_no_value_can_be_drawn():
    assert histogram("", "", {"off": []}, {"memorised": 0.5}).rows[0].total == 0
    assert histogram("", "", {"off": [0.5]}, {"memorised": 0.5}).rows[0].closer == 0


@pytest.mark.parametrize(
    ("span", "steps", "step"), [(1.0, 5, 0.2), (2.4, 7, 0.5), (100, 4, 25), (0.013, 1, 0.02)]
)
def test_nice_step(span, steps, step):
    assert nice_step(span, steps) == pytest.approx(step)
