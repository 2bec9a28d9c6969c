"""One guided step against the oracle: the paper, the released code, the exact step, the parameterisations."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import amg
from amg.config import AMGConfig
from amg.engine.level import levels
from amg.guidance.flight import Flight
from amg.guidance.ordinary import Ordinary, despecify
from amg.guidance.schedule import Prediction, threshold_at
from amg.protection.guide import Guide
from amg.similarity import similarity_for

from .. import oracle, toy
from ..one_step import (
    KINDS,
    S0,
    C,
    Case,
    T,
    at_threshold,
    denoise_of,
    look_at,
    make_case,
    middle,
    neighbour_of,
    preset,
    similarities,
)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, amg.Index]:
    path = Path(tmp_path_factory.mktemp("indexes"))
    return {metric: toy.build(metric, path / metric) for metric in ("cosine", "nl2")}


@pytest.fixture(scope="module")
def frequent(tmp_path_factory: pytest.TempPathFactory) -> amg.Index:
    """Half of the pictures share a caption, 30 times."""
    return toy.build("cosine", Path(tmp_path_factory.mktemp("frequent")) / "index", frequent=True)


@pytest.mark.parametrize("gradient", ["frozen", "full"])
@pytest.mark.parametrize(("metric", "guided"), [("cosine", True), ("nl2", True), ("nl2", False)])
def test_a_step_equals_the_paper(indexes: dict, metric: str, guided: bool, gradient: str) -> None:
    index, case = indexes[metric], make_case(0.0, guided)
    case = at_threshold(case, middle(case, index))
    found = case.run(preset(gradient=gradient), index)
    assert found.changed.sum() == 3
    for row in range(5):
        neighbour = neighbour_of(case, row, index) if guided else None
        expected = oracle.guided_eps(
            case.sample[row].double(),
            denoise_of(case, row),
            neighbour,
            look_at(index),
            case.step.alpha_bar,
            case.step.threshold,
            S0,
            C,
            full=gradient == "full",
        )
        torch.testing.assert_close(found.output[row].double(), expected, rtol=1e-4, atol=2e-5)


def test_the_two_readings_of_the_gradient_differ(indexes: dict) -> None:
    case = make_case(-1.0)
    frozen, full = (case.run(preset(gradient=name), indexes["cosine"]).output for name in ("frozen", "full"))
    assert float((frozen - full).abs().max()) > 1e-2


def released_case(t: int) -> tuple[Case, AMGConfig]:
    case = make_case(0.0, weights=[0.03, 0.02, 0.01, 0.005, 0.0], t=t)
    config = AMGConfig.preset("released")
    low = threshold_at("exponential", 0.3, 0.4, case.step.alpha_bar, t)
    return at_threshold(case, low), config


def test_a_step_equals_the_released_code(frequent: amg.Index) -> None:
    index = frequent
    case, config = released_case(T)
    found = case.run(config, index)
    fired = {term for flight in case.flights for term in flight.trace[-1].terms}
    assert fired == {"despecification", "deduplication", "dissimilarity"}
    for row in range(5):
        denoise, x_t = denoise_of(case, row), case.sample[row].double()
        expected = oracle.released_eps(
            x_t,
            *denoise(x_t),
            neighbour_of(case, row, index),
            lambda found: index.captions[found] == "picture 0",
            look_at(index),
            case.step.alpha_bar,
            float(T),
            S0,
        )
        size = float(expected.abs().max())
        torch.testing.assert_close(found.output[row].double(), expected, rtol=2e-4, atol=2e-5 * size)


def test_released_despecifies_below_lambda_too(frequent: amg.Index) -> None:
    index, (case, config) = frequent, released_case(T)
    case = at_threshold(case, 0.999)
    found = case.run(config, index)
    assert [flight.trace[-1].terms for flight in case.flights] == [("despecification",)] * 5
    eps_uncond, eps_cond = case.outputs()
    assert eps_uncond is not None
    for row, sigma in enumerate(similarities(case, index)):
        s1 = oracle.released_scales(sigma, float(T), S0)[0]
        expected = eps_uncond[row] + (S0 - s1) * (eps_cond[row] - eps_uncond[row])
        torch.testing.assert_close(found.output[row], expected, rtol=1e-4, atol=1e-4)


def test_released_holds_a_frequent_caption_for_ten_steps(frequent: amg.Index) -> None:
    index, (case, config) = frequent, released_case(T)
    case.run(config, index)
    fired = ["deduplication" in flight.trace[-1].terms for flight in case.flights]
    assert any(fired)
    assert not all(fired)
    for later in range(5, 17):
        at = case.step._replace(position=later, total=30, threshold=0.999)
        replace(case, step=at).run(config, index)
        held = ["deduplication" in flight.trace[-1].terms for flight in case.flights]
        assert held == [one and later < 4 + 10 for one in fired]


@pytest.mark.parametrize("guided", [True, False])
def test_released_pixels_scale_with_the_distance_to_lambda(indexes: dict, guided: bool) -> None:
    """s3 = c3·(sigma - lambda_t), lambda_t = -(1.95 - 0.45·exp(-0.025·t)) on the 0-250 scale of t."""
    index, case = indexes["nl2"], make_case(0.0, guided)
    case = at_threshold(case, middle(case, index))
    found = case.run(AMGConfig.preset("released", c3=5.0), index)
    assert found.changed.sum() == 3
    for row in range(5):
        sigma, denoise = similarities(case, index)[row], denoise_of(case, row)
        c3 = 5.0 * max(sigma - case.step.threshold, 0.0)
        expected = oracle.guided_eps(
            case.sample[row].double(),
            denoise,
            None,
            look_at(index),
            case.step.alpha_bar,
            case.step.threshold,
            S0,
            (0.0, 0.0, c3),
        )
        torch.testing.assert_close(found.output[row].double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("t", [0, 4, 100, 996])
def test_released_pixel_thresholds_are_the_authors(indexes: dict, t: int) -> None:
    config = AMGConfig.preset("released").for_metric("nl2")
    denoiser = toy.denoiser(toy.ToyNetwork())
    guide = Guide(config, indexes["nl2"], similarity_for(indexes["nl2"], denoiser), denoiser, S0)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(timesteps=[t])
    published = 1.95 - 0.45 * math.exp(-0.025 * t / 4)
    assert guide.at(scheduler, levels(scheduler), 0).threshold == pytest.approx(-published, abs=1e-9)


@pytest.mark.parametrize("threshold", [-1.4, -1.2])
def test_the_exact_step_leaves_nl2_at_lambda(indexes: dict, threshold: float) -> None:
    """Unconditional pixels: l2(x0_hat', n0) / D, D held, is -lambda_t for every open sample."""
    index, case = indexes["nl2"], make_case(threshold, guided=False)
    found = case.run(preset(step_length="exact"), index)
    rows = index.rows.double() / 255
    for row, sigma in enumerate(similarities(case, index)):
        assert bool(found.changed[row]) == (sigma > threshold)
        x_t = case.sample[row].double()
        before = toy.decode(
            oracle.predict_x0(x_t, denoise_of(case, row)(x_t)[1], case.step.alpha_bar)
        ).flatten()
        after = toy.decode(oracle.predict_x0(x_t, found.output[row].double(), case.step.alpha_bar)).flatten()
        _, nearest = oracle.nl2(before, rows)
        denominator = oracle.l2(before, rows[nearest]) / -sigma
        if sigma > threshold:
            assert float(oracle.l2(after, rows[nearest]) / denominator) == pytest.approx(-threshold, rel=2e-4)
    assert 0 < int(found.changed.sum()) < 5


@pytest.mark.parametrize("gradient", ["frozen", "full"])
def test_the_exact_step_takes_cosine_towards_lambda(indexes: dict, gradient: str) -> None:
    index, case = indexes["cosine"], make_case(0.0)
    case = at_threshold(case, middle(case, index))
    found = case.run(preset(step_length="exact", gradient=gradient, c1=0.0, c2=0.0), index)
    for row, sigma in enumerate(similarities(case, index)):
        x0_hat = oracle.predict_x0(case.sample[row].double(), found.output[row].double(), case.step.alpha_bar)
        after = float(look_at(index)(x0_hat)[0])
        assert after < sigma if sigma > case.step.threshold else after == pytest.approx(sigma, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("step_length", ["constant", "exact"])
@pytest.mark.parametrize("gradient", ["frozen", "full"])
def test_every_parameterisation_is_guided_alike(
    indexes: dict, metric: str, kind: str, step_length: str, gradient: str
) -> None:
    index, epsilon = indexes[metric], make_case(0.0)
    epsilon = at_threshold(epsilon, middle(epsilon, index))
    config = preset(step_length=step_length, gradient=gradient)
    expected = epsilon.run(config, index)
    case = at_threshold(make_case(0.0, kind=kind), epsilon.step.threshold)
    found = case.run(config, index)
    assert torch.equal(found.changed, expected.changed)
    eps = Prediction(kind, case.step.alpha_bar).to_eps(found.output, case.sample)
    torch.testing.assert_close(eps, expected.output, rtol=2e-4, atol=2e-4)


def test_later_tries_never_take_the_memorised_caption_though_it_is_rare(tmp_path: Path) -> None:
    """Copies with captions of their own, or dropped before indexing: the caption is in the index once."""
    index = toy.build("cosine", tmp_path / "index")  # "picture i", each once
    denoiser = toy.denoiser(toy.ToyNetwork())
    for row in range(0, index.count, 7):
        flight = Flight(torch.full((3, 8, 8), float(row)), prompt=index.captions[row])
        despecify(index, denoiser, Ordinary(), [(flight, preset().for_metric("cosine"), row)])
        assert flight.caption is None  # no other shares a telling word


def test_an_image_seen_often_is_passed_over_whatever_its_caption(tmp_path: Path) -> None:
    index = toy.build("cosine", tmp_path / "index")
    others = [row for row in range(index.count) if row != 5]
    captions = ["big red dog"] * index.count
    captions[5], captions[others[0]], captions[others[1]] = "Rex the red dog", "a red dog", "stairs"
    counts = [100 if row in others[2:] else 1 for row in range(index.count)]
    index.__dict__["_meta"] = {**index._meta, "caption": captions, "count": counts}
    flight = Flight(torch.zeros(3, 8, 8), prompt="a big red dog")
    samples = [(flight, preset().for_metric("cosine"), 5)]
    despecify(index, toy.denoiser(toy.ToyNetwork()), Ordinary(), samples)
    assert flight.caption == "a red dog"


def test_later_tries_take_the_ordinary_caption_with_the_rarest_shared_words() -> None:
    from amg.guidance.ordinary import closest_captions

    others = ["a photo of a cat", "a photo of a dog", "a photo of a red dog", "stairs"]
    assert closest_captions("Rex the red dog, a photo of 1999", others) == ["a photo of a red dog"]
    assert closest_captions("Tom the CAT", others) == ["a photo of a cat"]
    assert closest_captions("nothing shared", others) == [] == closest_captions("a", [])
