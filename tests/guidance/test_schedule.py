"""alpha_bar, step coefficients and parameterisations against the schedulers of diffusers themselves."""

import math

import diffusers
import pytest
import torch
from torch import Tensor

from amg.engine.level import levels
from amg.guidance.schedule import LEAST_ALPHA_BAR, Prediction, threshold_at

from .. import oracle

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIXELS = {"clip_sample": False}
EXPOSING = ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
CONVERTING = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
KINDS = ["epsilon", "v_prediction", "sample"]
SHAPE = (2, 3, 4, 4)


def make(name: str, steps: int = 10, **more):
    options = {**BETAS, **(PIXELS if name in ("DDPMScheduler", "DDIMScheduler") else {}), **more}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def normal(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alpha_bars(scheduler) -> list[float]:
    return [max(level.alpha_bar, LEAST_ALPHA_BAR) for level in levels(scheduler)]


EXPOSED = [
    (name, kind)
    for name in EXPOSING
    for kind in KINDS
    if (name, kind) != ("EulerAncestralDiscreteScheduler", "sample")
]


@pytest.mark.parametrize(("name", "kind"), EXPOSED)  # diffusers has no ancestral Euler for "sample"
def test_x0_hat_equals_the_schedulers_own_predicted_original_sample(name: str, kind: str) -> None:
    scheduler = make(name, prediction_type=kind)
    sample = normal(1) * float(scheduler.init_noise_sigma)
    known = alpha_bars(scheduler)
    for step, t in enumerate(scheduler.timesteps):
        model_input, output = scheduler.scale_model_input(sample, t), normal(100 + step)
        prediction = Prediction(kind, known[step])
        found = prediction.x0_hat(prediction.to_eps(output, model_input), model_input)
        result = scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(found, result.pred_original_sample, rtol=2e-5, atol=2e-5)
        sample = result.prev_sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVERTING)
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_x0_hat_equals_the_multistep_schedulers_converted_output(name: str, kind: str, spacing: str) -> None:
    scheduler = make(name, prediction_type=kind, timestep_spacing=spacing)
    sample, known = normal(1), alpha_bars(scheduler)
    for step, t in enumerate(scheduler.timesteps):
        output = normal(100 + step)
        prediction = Prediction(kind, known[step])
        found = prediction.x0_hat(prediction.to_eps(output, sample), sample)
        before = sample
        sample = scheduler.step(output, t, sample).prev_sample
        newest = scheduler.model_outputs[-1]
        torch.testing.assert_close(found, newest, rtol=2e-5, atol=2e-5)
        assert not torch.equal(before, sample)


def test_alpha_bar_of_pndm_is_that_of_each_of_its_timesteps() -> None:
    scheduler = make("PNDMScheduler", skip_prk_steps=True, steps_offset=1)
    assert len(scheduler.timesteps) == 11  # the second timestep is visited twice
    known = alpha_bars(scheduler)
    for step, t in enumerate(scheduler.timesteps.tolist()):
        assert known[step] == pytest.approx(float(scheduler.alphas_cumprod[t]), rel=1e-12)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_alpha_bar_follows_karras_sigmas(name: str) -> None:
    scheduler = make(name, use_karras_sigmas=True)
    for step in range(10):
        sigma = float(scheduler.sigmas[step])
        assert alpha_bars(scheduler)[step] == pytest.approx(1 / (1 + sigma * sigma), rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_parameterisations_round_trip(kind: str) -> None:
    sample, eps = normal(1, torch.float64), normal(2, torch.float64)
    for alpha_bar in (0.005, 0.3, 0.5, 0.97):
        prediction = Prediction(kind, alpha_bar)
        output = prediction.from_eps(eps, sample)
        torch.testing.assert_close(prediction.to_eps(output, sample), eps, rtol=1e-10, atol=1e-10)


def test_parameterisations_agree_with_their_definitions() -> None:
    alpha_bar, x0, eps = 0.3, normal(1, torch.float64), normal(2, torch.float64)
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    sample = signal * x0 + noise * eps
    outputs = {"epsilon": eps, "v_prediction": signal * eps - noise * x0, "sample": x0}
    for kind, output in outputs.items():
        prediction = Prediction(kind, alpha_bar)
        torch.testing.assert_close(prediction.to_eps(output, sample), eps, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(prediction.from_eps(eps, sample), output, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(prediction.x0_hat(eps, sample), x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(oracle.predict_x0(sample, eps, alpha_bar), x0, rtol=1e-10, atol=1e-10)


def test_unknown_parameterisations_are_refused_both_ways() -> None:
    prediction = Prediction("flow", 0.5)
    for convert in (prediction.to_eps, prediction.from_eps):
        with pytest.raises(ValueError, match="flow"):
            convert(normal(0), normal(1))


def test_v_prediction_is_defined_at_zero_terminal_snr() -> None:
    """alpha_bar = 0 there: x0_hat = sqrt(alpha_bar)·x_t - sqrt(1 - alpha_bar)·v = -v."""
    scheduler = make(
        "DDIMScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    sample, v = normal(1), normal(2)
    assert float(scheduler.alphas_cumprod[scheduler.timesteps[0]]) == 0
    prediction = Prediction("v_prediction", alpha_bars(scheduler)[0])
    torch.testing.assert_close(
        prediction.x0_hat(prediction.to_eps(v, sample), sample), -v, rtol=5e-3, atol=5e-3
    )


@pytest.mark.parametrize("schedule", ["parabolic", "constant", "exponential"])
def test_thresholds_equal_their_formulas(schedule: str) -> None:
    for alpha_bar, t in ((0.0047, 981.0), (0.28, 501.0), (0.9991, 1.0), (1.0, 0.0)):
        found = threshold_at(schedule, -1.6, -1.45, alpha_bar, t)
        assert found == pytest.approx(oracle.threshold(schedule, -1.6, -1.45, alpha_bar, t), abs=1e-12)


def test_thresholds_go_from_lambda_min_to_lambda_max() -> None:
    assert threshold_at("parabolic", 0.3, 0.45, 0.0, 999) == 0.3
    assert threshold_at("parabolic", 0.3, 0.45, 1.0, 0) == pytest.approx(0.45, abs=1e-15)
    assert threshold_at("exponential", 0.3, 0.4, 1.0, 0) == pytest.approx(0.4, abs=1e-15)
    published = {0: 0.400, 501: 0.308, 981: 0.301}
    for t, expected in published.items():
        assert threshold_at("exponential", 0.3, 0.4, 0.5, t) == pytest.approx(expected, abs=5e-4)
    with pytest.raises(ValueError, match="linear"):
        threshold_at("linear", 0.3, 0.4, 0.5, 1)


TWO_CALLS = ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]


@pytest.mark.parametrize(
    "name", [*EXPOSING, *CONVERTING, *TWO_CALLS, "PNDMScheduler", "LMSDiscreteScheduler"]
)
def test_levels_undo_scale_model_input(name: str) -> None:
    """x_t is as many times larger than the variance-preserving one, at a whole run's every step."""
    scheduler, sample = make(name), normal(1)
    found = levels(scheduler)
    assert len(found) == len(scheduler.timesteps)
    for level, t in zip(found, scheduler.timesteps, strict=True):
        scaled = scheduler.scale_model_input(sample, t)
        torch.testing.assert_close(scaled * level.size, sample, rtol=1e-6, atol=1e-6)
        scheduler.step(sample, t, sample)
