"""Options are checked where they are made; presets promise what they say."""

import dataclasses
import math

import pytest

from amg.config import PRESETS, AMGConfig

PROMISES = {
    ("main", "cosine"): 0.5,
    ("main", "nl2"): -1.4,
    ("strong", "cosine"): 0.4,
    ("strong", "nl2"): -1.6,
    ("released", "cosine"): 0.5,
    ("released", "nl2"): -1.4,
    ("off", "cosine"): 0.5,
    ("off", "nl2"): -1.4,
}
METRICS = ["cosine", "nl2"]


@pytest.mark.parametrize(("name", "metric"), list(PROMISES))
def test_presets_promise_the_papers_thresholds(name: str, metric: str) -> None:
    config = AMGConfig.preset(name).for_metric(metric)
    assert config.threshold == PROMISES[name, metric]
    assert config.metric == metric
    missing = [field for field in PRESETS[name][metric] if getattr(config, field) is None]
    assert not missing
    assert config.for_metric(metric) == config


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["main", "strong"])
def test_gates_open_below_what_is_promised(name: str, metric: str) -> None:
    config = AMGConfig.preset(name).for_metric(metric)
    assert config.lambda_min <= config.lambda_max < config.threshold
    assert config.rewind_threshold <= config.threshold


def test_released_keeps_the_authors_numbers() -> None:
    config = AMGConfig.preset("released").for_metric("cosine")
    assert (config.c1, config.c2, config.c3) == (13.0, 1 / 0.3, 100.0)
    assert (config.threshold_schedule, config.lambda_min, config.lambda_max) == ("exponential", 0.3, 0.4)
    assert (config.form, config.rewind_at, config.step_length, config.gradient) == (
        "released",
        (),
        "constant",
        "frozen",
    )


def test_off_does_nothing() -> None:
    for metric in METRICS:
        config = AMGConfig.preset("off").for_metric(metric)
        assert not config.active
        assert (config.c1, config.c2, config.c3, config.rewind_at, config.on_memorized) == (
            0,
            0,
            0,
            (),
            "flag",
        )


def test_overrides_win_over_presets() -> None:
    config = AMGConfig.preset("main", c1=2.0, lambda_max=0.42, rewind_at=()).for_metric("cosine")
    assert (config.c1, config.lambda_max, config.rewind_at, config.c2) == (2.0, 0.42, (), 3.0)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AMGConfig.preset("main").c1 = 3.0  # type: ignore[misc]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'paper'"):
        AMGConfig.preset("paper")
    with pytest.raises(TypeError, match="'c4'"):
        AMGConfig.preset("main", c4=1.0)
    with pytest.raises(ValueError, match="'l1'"):
        AMGConfig.preset("main").for_metric("l1")
    with pytest.raises(ValueError, match="'nl2' but the index measures 'cosine'"):
        AMGConfig.preset("main", metric="nl2").for_metric("cosine")
    with pytest.raises(ValueError, match="preset_name"):
        AMGConfig(preset_name="mian")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"form": "published"}, "form"),
        ({"threshold_schedule": "linear"}, "threshold_schedule"),
        ({"gradient": "fast"}, "gradient"),
        ({"step_length": "newton"}, "step_length"),
        ({"on_memorized": "ignore"}, "on_memorized"),
        ({"max_rewinds": -1}, "max_rewinds"),
        ({"max_retries": -1}, "max_retries"),
        ({"c1": -0.1}, "c1"),
        ({"c2": math.inf}, "c2"),
        ({"c3": math.nan}, "c3"),
        ({"rewind_to": 1.0}, "rewind_to"),
        ({"rewind_at": (0.05,)}, "rewind_at"),
        ({"rewind_at": (1.2,)}, "rewind_at"),
    ],
)
def test_impossible_values_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"`{named}`"):
        AMGConfig.preset("main", **options)


@pytest.mark.parametrize(
    "name", ["threshold", "lambda_min", "lambda_max", "rewind_threshold", "guidance_scale"]
)
def test_a_nan_threshold_is_refused(name: str) -> None:
    """`similarity > nan` is False: the gate would stay closed and the promise would hold of everything."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        AMGConfig.preset("main", **{name: math.nan})


def test_rewinds_that_are_asked_for_have_a_threshold() -> None:
    """Checkpoints without `rewind_threshold` would silently do nothing: it is filled in, or refused."""
    try:
        config = AMGConfig.preset("released", rewind_at=(0.5,)).for_metric("cosine")
    except ValueError as error:
        assert "rewind_threshold" in str(error)
    else:
        assert config.rewind_threshold is not None
