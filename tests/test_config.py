"""Options are checked where they are made; presets promise what they say."""

import dataclasses
import math

import numpy as np
import pytest
import torch

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


COSINE_EDGES = {
    "threshold": (-1.0, 0.99),
    "rewind_threshold": (-1.0, 0.99),
    "lambda_min": (-1.0, 1.0),
    "lambda_max": (-1.0, 1.0),
}


@pytest.mark.parametrize("name", COSINE_EDGES)
def test_a_cosine_threshold_that_a_copy_cannot_exceed_is_refused(name: str) -> None:
    low, high = COSINE_EDGES[name]
    for value in (low, high):
        assert getattr(AMGConfig.preset("main", **{name: value}).for_metric("cosine"), name) == value
    for value in (low - 1e-6, high + 1e-6, 5.0, 1.4, -1.4):
        with pytest.raises(ValueError, match=rf"`{name}` must be in \[-1, {high:g}\] .*cosine, got"):
            AMGConfig.preset("main", **{name: value}).for_metric("cosine")


def test_an_exact_copy_of_a_float16_row_is_over_the_largest_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    for dimension in (2, 16, 512, 4096):
        unit = torch.nn.functional.normalize(torch.randn(200, dimension, generator=generator).double())
        assert float((unit * unit.half().double()).sum(1).min()) >= 0.9995 > COSINE_EDGES["threshold"][1]


@pytest.mark.parametrize("name", COSINE_EDGES)
def test_an_nl2_threshold_may_be_written_either_way(name: str) -> None:
    for value in (1.4, -1.4, np.float32(1.5), np.float64(-1.5), 1, -1):
        config = AMGConfig.preset("main", **{name: value}).for_metric("nl2")
        assert getattr(config, name) == -abs(float(value))
        assert type(getattr(config, name)) is float
        assert dataclasses.replace(config, **{name: value}) == config == config.for_metric("nl2")
    given = AMGConfig.preset("main", metric="nl2", **{name: 1.4})
    assert getattr(given, name) == -1.4


def test_an_nl2_threshold_that_nothing_or_everything_exceeds_is_refused() -> None:
    for name, value in (
        ("threshold", 0),
        ("threshold", 2.01),
        ("threshold", -140),
        ("rewind_threshold", 0.0),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must .*measures nL2.*, got {value:g}"):
            AMGConfig.preset("main", **{name: value}).for_metric("nl2")
    assert AMGConfig.preset("main", lambda_min=0, lambda_max=0.0).for_metric("nl2").lambda_max == 0
    assert str(AMGConfig.preset("off").for_metric("nl2").lambda_max) == "0.0"


def test_a_resolved_config_stays_in_range() -> None:
    with pytest.raises(ValueError, match=r"`threshold` must be in \[-1, 0.99\]"):
        dataclasses.replace(AMGConfig.preset("main").for_metric("cosine"), threshold=1.0)
    strict = AMGConfig.preset("main", threshold=0.3).for_metric("cosine")
    assert strict.under("cosine").threshold == 0.3 and strict.under("nl2").threshold == -1.4


NUMBERS = [
    *("threshold", "lambda_min", "lambda_max", "rewind_threshold", "rewind_guidance", "guidance_scale"),
    *("c1", "c2", "c3", "threshold_decay", "terms_from", "rewind_to", "max_rewinds", "max_retries"),
    "null_class",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, np.True_, "0.5", b"1", [0.5], 1j, math.nan, math.inf])
def test_only_numbers_are_numbers(name: str, value: object) -> None:
    for given in (value, -(10**400)):  # an int too large for a float
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            AMGConfig.preset("main", **{name: given})


@pytest.mark.parametrize("name", ["max_rewinds", "max_retries", "null_class"])
def test_counts_are_whole(name: str) -> None:
    assert getattr(AMGConfig.preset("main", **{name: np.int64(2)}), name) == 2
    for value in (1.5, 2.0, -1):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 0, got {value}"):
            AMGConfig.preset("main", **{name: value})


@pytest.mark.parametrize("name", ["guidance_scale", "rewind_to", "early_rewind", "gated", "max_retries"])
def test_what_has_a_value_of_its_own_cannot_be_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        AMGConfig.preset("main", **{name: None})


@pytest.mark.parametrize("name", ["early_rewind", "gated"])
def test_switches_are_true_or_false(name: str) -> None:
    assert getattr(AMGConfig.preset("main", **{name: np.False_}), name) is False
    for value in ("false", 0, 1.0):
        with pytest.raises(ValueError, match=f"`{name}` must be True or False, got {value!r}"):
            AMGConfig.preset("main", **{name: value})


@pytest.mark.parametrize("name", ["check_at", "rewind_at"])
def test_fractions_are_a_tuple(name: str) -> None:
    for value in ((0.2, 0.5), [0.2, 0.5], np.array([0.2, 0.5])):
        config = AMGConfig.preset("main", **{name: value})
        assert getattr(config, name) == (0.2, 0.5) and hash(config) == hash(config)
    for value in (0.5, "0.5", (0.5, True), ("0.5",), (math.nan,), (1.01,), np.array([[0.5]]), {0.5}):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            AMGConfig.preset("main", **{name: value})


def test_a_decay_that_shuts_the_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="`threshold_decay` must be >= 0"):
        AMGConfig.preset("released", threshold_decay=-0.1)


@pytest.mark.parametrize("name", ["calibration", "student"])
def test_files_are_paths(name: str) -> None:
    for value in (True, 3, b"c.json", ""):
        with pytest.raises(ValueError, match=f"`{name}` must be the path of a file, got {value!r}"):
            AMGConfig.preset("main", **{name: value})


def test_help_documents_every_field():
    said = AMGConfig.__doc__
    for field in dataclasses.fields(AMGConfig):
        (line,) = (line for line in said.splitlines() if line.startswith(f"{field.name}: "))
        assert said.split(line)[1].lstrip("\n").startswith("    "), field.name
