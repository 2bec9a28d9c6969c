"""The scales, the terms and the gate against the float64 oracle, and their limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amg.guidance import terms as guidance

from .. import oracle

SHAPE = (5, 4, 6, 7)
SIGMAS = [-0.4, 0.02, 0.35, 0.6, 0.97]
finite = {"allow_nan": False, "allow_infinity": False}


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("s0", "c1", "c2"), [(7.5, 10.0, 3.0), (7.5, 1.0, 2.0), (3.0, 0.0, 9.0), (1.0, 4.0, 4.0), (0.5, 4.0, 4.0)]
)
def test_scales_equal_the_paper(s0: float, c1: float, c2: float) -> None:
    for sigma in SIGMAS:
        found = guidance.scales(sigma, s0, c1, c2, 30.0)
        assert found[:2] == pytest.approx(oracle.scales(sigma, s0, c1, c2), rel=1e-12, abs=1e-12)
        assert found.s3 == 30.0


@pytest.mark.parametrize("t", [1.0, 501.0, 981.0])
def test_released_scales_equal_the_authors_code(t: float) -> None:
    for sigma in SIGMAS:
        found = guidance.released_scales(sigma, 7.5, 13.0, 1 / 0.3, 100.0, t)
        assert found == pytest.approx(oracle.released_scales(sigma, t, 7.5), rel=1e-10, abs=1e-10)


def test_classifier_free_is_that_of_diffusers_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        noise_pred_uncond, noise_pred_text = normal(0, dtype), normal(1, dtype)
        expected = noise_pred_uncond + 7.5 * (noise_pred_text - noise_pred_uncond)
        assert torch.equal(guidance.classifier_free(noise_pred_uncond, noise_pred_text, 7.5), expected)


@settings(max_examples=300, deadline=None)
@given(
    sigma=st.floats(-20, 20, **finite),
    s0=st.floats(-2, 50, **finite),
    c1=st.floats(0, 1e4, **finite),
    c2=st.floats(0, 1e4, **finite),
)
def test_guidance_never_turns_past_the_unconditional_one(
    sigma: float, s0: float, c1: float, c2: float
) -> None:
    """0 <= s1, 0 <= s2, s1 + s2 <= s0 - 1 up to two roundings; s0 <= 1 leaves no room at all."""
    room = max(s0 - 1, 0.0)
    slack = 2 * torch.finfo(torch.float64).eps * room
    paper = guidance.scales(sigma, s0, c1, c2, 1.0)
    released = guidance.released_scales(sigma, s0, c1, c2, 1.0, 500.0)
    for one, two, _ in (paper, released):
        assert one >= 0
        assert two >= 0
        assert one + two <= room + slack


@settings(max_examples=100, deadline=None)
@given(sigma=st.floats(-1, 1, **finite), c1=st.floats(0, 50, **finite), c2=st.floats(0, 50, **finite))
def test_scales_equal_the_oracle_everywhere(sigma: float, c1: float, c2: float) -> None:
    s1, s2, _ = guidance.scales(sigma, 7.5, c1, c2, 0.0)
    expected = oracle.scales(sigma, 7.5, c1, c2)
    assert (s1, s2) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    sigma=st.lists(st.floats(-1, 1, **finite), min_size=1, max_size=4),
    threshold=st.floats(-1, 1, **finite),
    steepness=st.floats(0.01, 100, **finite),
)
def test_newton_lands_on_lambda_for_a_linear_similarity_unless_clipped(
    sigma: list[float], threshold: float, steepness: float
) -> None:
    similarity = torch.tensor(sigma, dtype=torch.float64)
    gradient = steepness * torch.randn(
        len(sigma), 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    shift = guidance.newton_shift(gradient, similarity, threshold, limit=0.5)
    reached = similarity + (gradient * shift).flatten(1).sum(1)
    size = shift.flatten(1).square().mean(1).sqrt()
    clipped = (similarity - threshold) / gradient.flatten(1).norm(dim=1) > 0.5 * math.sqrt(48)
    for row in range(len(sigma)):
        assert float(size[row]) <= 0.5 * (1 + 1e-12)
        if sigma[row] <= threshold:
            assert float(shift[row].abs().max()) == 0
        elif clipped[row]:
            assert float(size[row]) == pytest.approx(0.5, rel=1e-12)
            assert threshold < float(reached[row]) < sigma[row]
        else:
            assert float(reached[row]) == pytest.approx(threshold, abs=1e-10)


def test_newton_limit_scales_with_the_values_of_x0_hat() -> None:
    shift = guidance.newton_shift(
        torch.full((1, 3, 4, 4), 1e-6), torch.tensor([0.9]), 0.1, limit=0.25, scale=4.0
    )
    assert float(shift.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-5)
    assert float(guidance.newton_shift(torch.zeros(1, 3, 4, 4), torch.tensor([0.9]), 0.1).abs().max()) == 0


def test_newton_takes_a_threshold_per_sample_and_passes_nan_on() -> None:
    generator = torch.Generator().manual_seed(6)
    gradient = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)
    similarity = torch.tensor([0.5, 0.7, math.nan, 0.2], dtype=torch.float64)
    gradient[3, 1, 2, 2] = math.nan
    thresholds = [0.45, 0.8, 0.1, 0.1]
    found = guidance.newton_shift(gradient, similarity, torch.tensor(thresholds, dtype=torch.float64))
    for row, threshold in enumerate(thresholds[:2]):
        assert torch.equal(found[row], guidance.newton_shift(gradient, similarity, threshold)[row])
    assert float((gradient[0] * found[0]).sum()) == pytest.approx(-0.05, rel=1e-12)
    assert float(found[1].abs().max()) == 0
    assert bool(found[2:].isnan().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_have_no_scales(bad: float) -> None:
    for measure in (
        lambda: guidance.scales(bad, 7.5, 10.0, 3.0, 1.0),
        lambda: guidance.released_scales(bad, 7.5, 13.0, 3.3, 100.0, 500.0),
    ):
        with pytest.raises(FloatingPointError, match=r"`similarity` must be finite"):
            measure()


def test_require_finite_names_the_rows() -> None:
    images = torch.zeros(4, 3, 2, 2)
    guidance.require_finite("images", images)
    images[2, 1, 0, 0] = math.nan
    images[3, 0, 1, 1] = -math.inf
    with pytest.raises(FloatingPointError, match=r"`images`.*rows \[2, 3\] of \[4, 3, 2, 2\]"):
        guidance.require_finite("images", images)
