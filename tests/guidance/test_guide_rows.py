"""What one guided step leaves alone, refuses, counts and remembers, row by row."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

import amg
from amg.config import AMGConfig
from amg.protection.guide import Guide
from amg.similarity import similarity_for

from .. import toy
from ..one_step import KINDS, PICTURES, S0, Case, T, at_threshold, make_case, middle, preset, similarities


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, amg.Index]:
    path = Path(tmp_path_factory.mktemp("indexes"))
    return {metric: toy.build(metric, path / metric) for metric in ("cosine", "nl2")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_a_closed_gate_changes_nothing_bit_for_bit(indexes: dict, metric: str, kind: str) -> None:
    case = make_case(2.0, kind=kind)
    eps_uncond, eps_cond = case.outputs()
    found = case.run(preset(step_length="exact"), indexes[metric])
    assert torch.equal(found.output, eps_uncond + S0 * (eps_cond - eps_uncond))
    assert not bool(found.changed.any())
    assert case.network.calls == []


@pytest.mark.parametrize("kind", KINDS)
def test_closed_rows_of_a_mixed_batch_stay_bit_for_bit(indexes: dict, kind: str) -> None:
    index, case = indexes["cosine"], make_case(0.0, kind=kind)
    case = at_threshold(case, middle(case, index))
    eps_uncond, eps_cond = case.outputs()
    found, plain = case.run(preset(), index), eps_uncond + S0 * (eps_cond - eps_uncond)
    assert found.changed.tolist() == [sigma > case.step.threshold for sigma in similarities(case, index)]
    for row, changed in enumerate(found.changed.tolist()):
        assert torch.equal(found.output[row], plain[row]) != changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("step_length", ["constant", "exact"])
def test_zero_constants_equal_classifier_free_guidance_bit_for_bit(
    indexes: dict, kind: str, guided: bool, step_length: str
) -> None:
    """Every gate open, every constant zero."""
    case = make_case(-10.0, guided, kind=kind)
    eps_uncond, eps_cond = case.outputs()
    plain = eps_cond if eps_uncond is None else eps_uncond + S0 * (eps_cond - eps_uncond)
    found = case.run(preset(c1=0.0, c2=0.0, c3=0.0, step_length=step_length), indexes["nl2"])
    assert torch.equal(found.output, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_classifier_free_guidance_bit_for_bit(indexes: dict, kind: str) -> None:
    case = make_case(-10.0, kind=kind)
    eps_uncond, eps_cond = case.outputs()
    found = case.run(AMGConfig.preset("off"), indexes["cosine"])
    assert torch.equal(found.output, eps_uncond + S0 * (eps_cond - eps_uncond))
    assert not bool(found.changed.any())


def test_ungated_acts_on_every_row(indexes: dict) -> None:
    index, case = indexes["cosine"], make_case(2.0)
    found = case.run(preset(gated=False), index)
    expected = at_threshold(make_case(0.0), -2.0).run(preset(), index)
    assert bool(found.changed.all())
    assert torch.equal(found.output, expected.output)


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_prediction_raises(indexes: dict, metric: str, bad: float) -> None:
    """In one row, under a threshold no other row reaches: nothing is decided about a NaN."""
    for name in ("main", "released"):
        case = make_case(2.0)
        case.conditions.cond["picture"][3, 0, 0, 0] = bad
        with pytest.raises(FloatingPointError, match=r"rows \[3\]"):
            case.run(AMGConfig.preset(name), indexes[metric])


def test_the_neighbours_captions_are_asked_for_open_rows_only(indexes: dict) -> None:
    index, case = indexes["cosine"], make_case(0.0)
    for opened in (1, 2, 4):
        at = at_threshold(case, middle(case, index, opened))
        at.network.pictures_seen.clear()
        at.run(preset(), index)
        assert at.network.calls == [opened]
        neighbours = [flight.trace[-1].neighbour for flight in at.flights]
        open_rows = [row for row, sigma in enumerate(similarities(case, index)) if sigma > at.step.threshold]
        pictures = toy.encode_captions([index.captions[neighbours[row]] for row in open_rows])["picture"]
        assert torch.equal(at.network.pictures_seen[-1], pictures)
    case.run(preset(c2=0.0), index)
    assert case.network.calls == []


def test_rows_without_room_for_deduplication_do_not_ask(indexes: dict) -> None:
    """s1 = s0 - 1 leaves s2 = 0: the third evaluation would be thrown away."""
    case = make_case(-1.0)
    case.run(preset(c1=1e4), indexes["cosine"])
    assert case.network.calls == []


def test_a_model_without_text_is_not_deduplicated(indexes: dict) -> None:
    case, index = make_case(-1.0), indexes["cosine"]
    config = preset().for_metric("cosine")
    denoiser = toy.denoiser(case.network, text=False)
    guide = Guide(config, index, similarity_for(index, denoiser), denoiser, S0)
    found = guide(case.step, case.sample, *case.outputs(), case.conditions, case.flights)
    expected = make_case(-1.0).run(preset(c2=0.0), index)
    assert torch.equal(found.output, expected.output)
    assert all("deduplication" not in flight.trace[-1].terms for flight in case.flights)


def test_the_trace_says_what_happened(indexes: dict) -> None:
    index, case = indexes["cosine"], make_case(0.0)
    case = at_threshold(case, middle(case, index))
    case.run(preset(), index)
    for flight, sigma, picture in zip(case.flights, similarities(case, index), PICTURES, strict=True):
        (one,) = flight.trace
        assert (one.step, one.t, one.threshold) == (4, float(T), case.step.threshold)
        assert one.similarity == pytest.approx(sigma, abs=1e-5)
        is_open = sigma > case.step.threshold
        assert one.terms == (("despecification", "deduplication", "dissimilarity") if is_open else ())
        assert flight.evaluations == (3 if is_open else 2)
        if is_open:
            assert index.captions[one.neighbour] == f"picture {picture}"


def test_evaluations_count_the_full_gradient(indexes: dict) -> None:
    for guided, expected in ((True, 5), (False, 2)):
        case = make_case(-10.0, guided)
        case.run(preset(gradient="full"), indexes["cosine"])
        assert [flight.evaluations for flight in case.flights] == [expected] * 5


def test_a_later_try_starts_with_its_own_guidance_scale(indexes: dict) -> None:
    case = make_case(2.0)
    for row, rewinds in ((1, 2), (3, 8)):
        case.flights[row].despecified_until, case.flights[row].rewinds = 5, rewinds
    eps_uncond, eps_cond = case.outputs()
    found = case.run(preset(rewind_guidance=1.5, max_rewinds=8), indexes["cosine"])
    for row in range(5):
        scale = {1: S0 + (1.5 - S0) * 2 / 8, 3: 1.5}.get(row, S0)
        assert torch.equal(found.output[row], eps_uncond[row] + scale * (eps_cond[row] - eps_uncond[row]))
    assert found.changed.tolist() == [False, True, False, True, False]
    after = replace(case, step=case.step._replace(position=5))
    assert not bool(after.run(preset(rewind_guidance=1.5), indexes["cosine"]).changed.any())


def test_a_later_try_without_its_own_scale_is_still_despecified(indexes: dict) -> None:
    """`rewind_guidance=None` keeps s0, and with it the gate's despecification: never guided less."""
    index, case = indexes["cosine"], make_case(-1.0)
    config = replace(preset().for_metric("cosine"), rewind_guidance=None)
    assert config.rewind_guidance is None
    expected = case.run(config, index)
    for flight in case.flights:
        flight.despecified_until = 5
    denoiser = toy.denoiser(case.network)
    guide = Guide(config, index, similarity_for(index, denoiser), denoiser, S0)
    found = guide(case.step, case.sample, *case.outputs(), case.conditions, case.flights)
    torch.testing.assert_close(found.output, expected.output)


def test_guidance_rescale_is_that_of_diffusers(indexes: dict) -> None:
    case = make_case(2.0)
    eps_uncond, eps_cond = case.outputs()
    expected = rescale_noise_cfg(eps_uncond + S0 * (eps_cond - eps_uncond), eps_cond, 0.7)
    found = case.run(preset(), indexes["cosine"], guidance_rescale=0.7)
    torch.testing.assert_close(found.output, expected, rtol=1e-6, atol=1e-6)


def test_terms_are_added_to_the_rescaled_output(indexes: dict) -> None:
    """c1 so large that s1 = s0 - 1 takes all the room: G_spe = -(s0 - 1)·(eps_c - eps_u) on every row."""
    case = make_case(-10.0)
    eps_uncond, eps_cond = case.outputs()
    plain = eps_uncond + S0 * (eps_cond - eps_uncond)
    expected = rescale_noise_cfg(plain, eps_cond, 0.7) - (S0 - 1) * (eps_cond - eps_uncond)
    found = case.run(preset(c1=1e6, c3=0.0), indexes["cosine"], guidance_rescale=0.7)
    assert [flight.trace[-1].terms for flight in case.flights] == [("despecification",)] * 5
    torch.testing.assert_close(found.output, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_caption_is_a_caption(indexes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second row is captioned "": it is encoded like any other, each row with its own."""
    index = indexes["cosine"]
    kept = {row: index.captions[row] for row in range(index.count)}
    numbered = {"" if row % 2 else caption: row for row, caption in kept.items()}
    said: list[str] = []

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        said.extend(captions)
        return toy.picture_condition([numbered[caption] for caption in captions], [0.1] * len(captions))

    monkeypatch.setattr(toy, "encode_captions", encode)
    captions = ["" if row % 2 else caption for row, caption in kept.items()]
    monkeypatch.setattr(type(index), "captions", property(lambda self: captions))
    case = make_case(-10.0)
    case.run(preset(c1=0.0), index)
    neighbours = [flight.trace[-1].neighbour for flight in case.flights]
    assert said == [captions[row] for row in neighbours] and "" in said
    assert all("deduplication" in flight.trace[-1].terms for flight in case.flights)


def test_a_scale_of_one_leaves_only_dissimilarity(indexes: dict) -> None:
    case = make_case(-10.0)
    case.run(preset(), indexes["cosine"], s0=1.0)
    assert [flight.trace[-1].terms for flight in case.flights] == [("dissimilarity",)] * 5


@pytest.mark.parametrize("gradient", ["frozen", "full"])
@pytest.mark.parametrize("step_length", ["constant", "exact"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.25), (torch.float64, 1e-4)])
def test_other_dtypes_are_guided_in_their_own(
    indexes: dict, gradient: str, step_length: str, dtype: torch.dtype, tolerance: float
) -> None:
    """The tolerance is on the relative root mean square difference from float32."""
    index, case = indexes["cosine"], make_case(0.7)
    config = preset(gradient=gradient, step_length=step_length, c2=0.0)
    expected = case.run(config, index)
    assert expected.changed.tolist() == [True, True, True, False, False]
    mine = replace(case, sample=case.sample.to(dtype), network=toy.ToyNetwork(dtype))
    found = mine.run(config, index)
    assert found.output.dtype == dtype
    assert torch.equal(found.changed, expected.changed)
    difference = (found.output.float() - expected.output).norm() / expected.output.norm()
    assert float(difference) < tolerance


def test_checkpoints_mark_what_is_too_close(indexes: dict) -> None:
    index, case = indexes["cosine"], make_case(2.0)
    threshold = middle(case, index)
    config = preset(rewind_at=(0.5,), rewind_to=0.1, rewind_threshold=threshold, max_rewinds=1)
    case.run(config, index)  # step 4 of 10 is round(0.5·9)
    for flight, sigma in zip(case.flights, similarities(case, index), strict=True):
        assert flight.pending == (sigma > threshold)
        assert ("rewind" in flight.trace[-1].terms) == (sigma > threshold)
    for flight in case.flights:
        flight.pending, flight.rewinds = False, 1
    case.run(config, index)
    elsewhere = replace(make_case(2.0), step=case.step._replace(position=3))
    elsewhere.run(config, index)
    assert all(not flight.pending for flight in [*case.flights, *elsewhere.flights])


def test_checkpoints_send_back_what_the_guard_finds(indexes: dict) -> None:
    """Under a metric that finds nothing: rows whose structure is a training image's go back, and nothing
    else."""
    weights = [0.09, 0.075, 0.06, 0.03, 0.01]  # the first is no copy by the metric
    index, case = indexes["cosine"], make_case(2.0, weights=weights)
    alike = index.guard.nearest(pictures_of(case)).similarity
    threshold = float(alike.sort().values[2:4].mean())
    config = preset(rewind_at=(0.5,), rewind_to=0.1, rewind_threshold=0.99, guard_threshold=threshold)
    case.run(config, index)
    marked = [flight.pending for flight in case.flights]
    assert marked == (alike > threshold).tolist() and any(marked) and not all(marked)
    untouched = make_case(2.0, weights=weights)
    untouched.run(replace(config, guard_threshold=None), index)
    assert not any(flight.pending for flight in untouched.flights)


def pictures_of(case: Case) -> torch.Tensor:
    """The pictures x0_hat of plain guidance decodes to, [5, 3, 8, 8]."""
    uncond, cond = case.outputs()
    eps = uncond + S0 * (cond - uncond)
    alpha_bar = case.step.alpha_bar
    return toy.decode((case.sample - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5).clamp(0, 1)


@pytest.mark.parametrize("spent", [0, 8, 9, 40])
def test_a_sample_goes_back_only_while_it_can_afford_to(indexes: dict, spent: int) -> None:
    """Step 4 of 10 at two evaluations each: going back may cost 20 more, of 30 that are allowed."""
    index, case = indexes["cosine"], make_case(2.0)
    config = preset(rewind_at=(0.5,), rewind_to=0.1, rewind_threshold=-1.0, max_evaluations=1.5)
    for flight in case.flights:
        flight.evaluations = spent
    case.run(config, index)
    assert [flight.pending for flight in case.flights] == [spent + 2 + 20 <= 30] * 5


def test_deduplication_waits_for_room_under_the_ceiling(indexes: dict) -> None:
    """Its extra evaluation is left out where the rest of the trajectory needs what is left."""
    index = indexes["cosine"]
    for spent, asks in ((6, True), (7, True), (8, False)):  # then this step's two and ten to come, of 20
        case = make_case(-1.0)
        for flight in case.flights:
            flight.evaluations = spent
        case.run(preset(max_evaluations=1.0), index)
        assert bool(case.network.calls) == asks, spent


def test_a_sample_that_cannot_afford_to_go_back_is_given_up(indexes: dict) -> None:
    """Not one that went back as often as it may: that is the preset's choice, and the final check's."""
    index = indexes["cosine"]
    config = preset(
        rewind_at=(0.5,), rewind_to=0.1, rewind_threshold=-1.0, max_evaluations=1.5, max_rewinds=2
    )
    for spent, rewinds, given_up in ((0, 0, False), (9, 0, True), (9, 2, False)):
        case = make_case(2.0)
        for flight in case.flights:
            flight.evaluations, flight.rewinds = spent, rewinds
        case.run(config, index)
        assert [flight.exhausted for flight in case.flights] == [given_up] * 5
