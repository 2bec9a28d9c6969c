"""No delivered image is closer to the index than stated, unless marked so: every path of the final check."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import amg
from amg.config import AMGConfig
from amg.engine.drive import pristine
from amg.guidance.flight import Flight
from amg.index.exact import Nearest
from amg.index.index import Closest
from amg.promise import check, decode, strong, summary
from amg.protection.catch_up import Run
from amg.protection.deliver import Delivery, deliver
from amg.protection.guide import Guide
from amg.similarity import similarity_for
from amg.verdict import MemorizedError, TraceStep

from . import oracle, reads, toy

PICTURES = [3, 17, 40, 8]
COPIES = [0, 2]  # the rows that are copies in `finished`
CLOSE, LIMIT = 0.9, -1.4


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, amg.Index]:
    path = Path(tmp_path_factory.mktemp("indexes"))
    return {metric: toy.build(metric, path / metric) for metric in ("cosine", "nl2")}


def finished() -> Tensor:
    """[4, 3, 8, 8] in [-1, 1]: rows 0 and 2 are training pictures, 1 and 3 are noise."""
    sample = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(31)) * 2 - 1
    sample[COPIES] = toy.training_pictures()[[PICTURES[row] for row in COPIES]].float() / 127.5 - 1
    return sample


def make_run(config: AMGConfig, index: amg.Index, steps: int = 6) -> tuple[Run, toy.ToyNetwork]:
    network = toy.ToyNetwork()
    denoiser = toy.denoiser(network)
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scheduler.set_timesteps(steps)
    guide = Guide(config.for_metric(index.metric), index, similarity_for(index, denoiser), denoiser, 1.0)
    return Run(guide, pristine(scheduler), {}), network


def flights_of(rows: Sequence[int]) -> list[Flight]:
    return [Flight.from_noise(torch.full((3, 8, 8), float(row))) for row in rows]


def settle(
    config: AMGConfig,
    index: amg.Index,
    also: Sequence[Any] = (),
    rows: Sequence[int] = range(4),
    weight: float = 0.2,
) -> tuple[Delivery, toy.ToyNetwork]:
    """`deliver` of some rows of `finished`; a re-run is drawn to the same pictures with `weight`."""
    run, network = make_run(config, index)
    sample = finished()[list(rows)]
    conditions = toy.conditions([PICTURES[row] for row in rows], [weight] * len(rows), guided=False)
    return deliver(
        decode(run.guide.denoiser, sample), sample, run, conditions, flights_of(rows), also
    ), network


def verdict_of(image: Tensor, index: amg.Index) -> tuple[float, int]:
    rows = index.rows.double()
    if index.metric == "cosine":
        sigma, row = oracle.cosine(toy.ToyEmbedder()(image.double()[None])[0], rows)
    else:
        sigma, row = oracle.nl2(image.double().flatten(), rows / 255)
    return float(sigma), row


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_verdicts_equal_the_oracle(indexes: dict, metric: str) -> None:
    index, flights, images = indexes[metric], flights_of(range(4)), toy.decode(finished())
    flights[1].total_rewinds, flights[1].retries, flights[1].evaluations = 2, 1, 77
    flights[1].trace.append(TraceStep(0, 981.0, None, -1.4, None))
    config = AMGConfig.preset("main", threshold=CLOSE if metric == "cosine" else LIMIT).for_metric(metric)
    verdicts = check(images, index, (), config, flights)
    for row, verdict in enumerate(verdicts):
        sigma, nearest = verdict_of(images[row], index)
        assert verdict.similarity == pytest.approx(sigma, abs=1e-4)
        assert (verdict.neighbour.row, verdict.neighbour.id) == (nearest, index.ids[nearest])
        assert verdict.neighbour.caption == f"picture {nearest}"
        assert (verdict.metric, verdict.threshold) == (metric, config.threshold)
        assert verdict.memorized == (row in COPIES)
        assert not verdict.blocked
    told = verdicts[1]
    assert (told.rewinds, told.retries, told.evaluations, len(told.trace)) == (2, 1, 77, 1)


def test_an_image_at_the_threshold_keeps_the_promise(indexes: dict) -> None:
    index, images = indexes["nl2"], toy.decode(finished())
    config = AMGConfig.preset("main").for_metric("nl2")
    similarity = check(images, index, (), config, flights_of(range(4)))[1].similarity
    at = check(images, index, (), replace(config, threshold=similarity), flights_of(range(4)))[1]
    below = check(images, index, (), replace(config, threshold=similarity - 1e-6), flights_of(range(4)))[1]
    assert (at.memorized, below.memorized) == (False, True)


def test_flag_delivers_and_marks(indexes: dict) -> None:
    delivery, network = settle(AMGConfig.preset("main", on_memorized="flag"), indexes["nl2"])
    assert torch.equal(delivery.sample, finished())
    assert [verdict.memorized for verdict in delivery.verdicts] == [True, False, True, False]
    assert not any(verdict.blocked for verdict in delivery.verdicts)
    assert delivery.replaced == []
    assert network.calls == []


def test_block_blanks_what_is_too_close_and_nothing_else(indexes: dict) -> None:
    delivery, network = settle(AMGConfig.preset("main", on_memorized="block"), indexes["nl2"])
    plain = (toy.decode(finished()) * 255).round() / 255
    for row in range(4):
        blank = row in COPIES
        assert torch.equal(delivery.images[row], torch.zeros(3, 8, 8) if blank else plain[row])
        assert torch.equal(delivery.sample[row], torch.zeros(3, 8, 8) if blank else finished()[row])
        assert delivery.verdicts[row].blocked == delivery.verdicts[row].memorized == blank
    assert delivery.replaced == COPIES
    assert network.calls == []
    assert delivery.verdicts[0].similarity == pytest.approx(0, abs=1e-3)  # of the image withheld


def test_raise_says_which_images_and_how_close(indexes: dict) -> None:
    with pytest.raises(MemorizedError, match=r"2 of 4 images are memorised \(rows \[0, 2\]\)") as caught:
        settle(AMGConfig.preset("main", on_memorized="raise"), indexes["nl2"])
    assert [verdict.memorized for verdict in caught.value.verdicts] == [True, False, True, False]
    delivery, _ = settle(AMGConfig.preset("main", on_memorized="raise"), indexes["nl2"], rows=[1, 3])
    assert not any(verdict.memorized for verdict in delivery.verdicts)


def test_resample_runs_the_copies_again_and_only_them(indexes: dict) -> None:
    index = indexes["nl2"]
    delivery, network = settle(AMGConfig.preset("main", max_evaluations=None), index)
    assert delivery.replaced == COPIES
    assert network.calls[0] == 2
    assert max(network.calls) == 2
    plain = (toy.decode(finished()) * 255).round() / 255
    for row, verdict in enumerate(delivery.verdicts):
        assert not verdict.memorized
        assert not verdict.blocked
        assert verdict.retries == (1 if row in COPIES else 0)
        assert torch.equal(delivery.images[row], plain[row]) == (row not in COPIES)
        sigma, _ = verdict_of(delivery.images[row], index)
        assert verdict.similarity == pytest.approx(sigma, abs=1e-4)
        assert sigma <= verdict.threshold == -1.4
    again = delivery.verdicts[0]
    assert again.evaluations == len(again.trace) >= 6
    assert again.trace[0].threshold == pytest.approx(-1.8, abs=0.05)  # the strong preset's lambda


def test_a_resampled_image_is_what_it_would_be_alone(indexes: dict) -> None:
    config, index = AMGConfig.preset("main"), indexes["nl2"]
    together, _ = settle(config, index)
    for row in range(4):
        alone, _ = settle(config, index, rows=[row])
        torch.testing.assert_close(together.sample[row], alone.sample[0], rtol=1e-5, atol=1e-5)
        assert together.verdicts[row].retries == alone.verdicts[0].retries


def test_resample_ends_in_a_block(indexes: dict) -> None:
    """A model that can only draw its picture: guidance recolours it, and the second judge still knows it."""
    for retries in (0, 1, 2):
        config = AMGConfig.preset("main", max_retries=retries, max_rewinds=0, max_evaluations=None)
        delivery, network = settle(config, indexes["nl2"], [indexes["cosine"]], rows=[0, 2], weight=1.0)
        assert delivery.replaced == [0, 1]
        for row, verdict in enumerate(delivery.verdicts):
            assert verdict.blocked
            assert verdict.memorized
            assert verdict.retries == retries
            assert float(delivery.images[row].abs().max()) == float(delivery.sample[row].abs().max()) == 0
        assert (len(network.calls) > 0) == (retries > 0)


def test_every_judge_is_asked(indexes: dict) -> None:
    """Noise passes nL2 but not a cosine threshold that everything exceeds; the promise is of both."""
    images, flights = toy.decode(finished()), flights_of(range(4))
    config = AMGConfig.preset("main").for_metric("nl2")
    verdicts = check(images, indexes["nl2"], [indexes["cosine"], indexes["nl2"]], config, flights)
    for row, verdict in enumerate(verdicts):
        cosine, pixels = verdict.also
        assert (cosine.metric, cosine.threshold) == ("cosine", 0.5)
        assert cosine.similarity == pytest.approx(verdict_of(images[row], indexes["cosine"])[0], abs=1e-4)
        assert (pixels.metric, pixels.similarity) == ("nl2", verdict.similarity)
        assert verdict.memorized == (verdict.similarity > -1.4 or cosine.similarity > 0.5)
    strong = check(
        images, indexes["nl2"], [indexes["cosine"]], AMGConfig.preset("strong").for_metric("nl2"), flights
    )
    assert [verdict.also[0].threshold for verdict in strong] == [0.4] * 4


def test_one_judge_is_enough_to_block(indexes: dict) -> None:
    """A copy in other colours: nL2 is satisfied (it was what guided), the other judge is not."""
    picture = toy.training_pictures()[3].float() / 255
    recoloured = ((picture - picture.mean()) * 0.35 + 0.15)[None].clamp(0, 1)
    index, judge = indexes["nl2"], indexes["cosine"]
    strict = AMGConfig.preset("main", on_memorized="block", threshold=-0.2, guard_threshold=None)
    run, _ = make_run(strict, index)
    conditions = toy.conditions([3], [0.0], guided=False)
    without = deliver(recoloured, recoloured * 2 - 1, run, conditions, flights_of([0]))
    with_judge = deliver(recoloured, recoloured * 2 - 1, run, conditions, flights_of([0]), [judge])
    assert not without.verdicts[0].memorized
    expected = verdict_of(recoloured[0], judge)[0] > 0.5
    assert with_judge.verdicts[0].memorized == with_judge.verdicts[0].blocked == expected is True


def test_the_guard_alone_is_enough_to_block(indexes: dict) -> None:
    """The same recoloured copy, with no other index: its structure is the training image's."""
    picture = toy.training_pictures()[3].float() / 255
    recoloured = ((picture - picture.mean()) * 0.35 + 0.15)[None].clamp(0, 1)
    run, _ = make_run(AMGConfig.preset("main", on_memorized="block", threshold=-0.2), indexes["nl2"])
    conditions = toy.conditions([3], [0.0], guided=False)
    delivery = deliver(recoloured, recoloured * 2 - 1, run, conditions, flights_of([0]))
    (verdict,) = delivery.verdicts
    assert verdict.similarity < verdict.threshold and verdict.guard is not None
    assert verdict.guard.memorized and verdict.guard.threshold == 0.8 and verdict.guard.neighbour.row == 3
    assert verdict.memorized and verdict.blocked and float(delivery.images.abs().max()) == 0
    assert verdict.reason is not None and verdict.reason.startswith("guard 0.99")
    assert amg.Verdict.from_dict(json.loads(json.dumps(verdict.as_dict()))) == verdict


@pytest.mark.parametrize("ceiling", [1.0, 2.0, 3.0, 4.5])
def test_no_image_costs_more_than_its_ceiling(indexes: dict, ceiling: float) -> None:
    """A model that can only draw its picture, with every return allowed: blocked before it costs more."""
    config = AMGConfig.preset("main", max_retries=9, max_rewinds=9, max_evaluations=ceiling, c3=0.0)
    delivery, _ = settle(config, indexes["nl2"], [indexes["cosine"]], rows=[0, 2], weight=1.0)
    for verdict in delivery.verdicts:
        assert verdict.blocked and verdict.evaluations <= ceiling * 6
        assert verdict.evaluations > (ceiling - 2) * 6, "what the ceiling allows was tried"


def test_pictures_in_other_units_are_refused(indexes: dict) -> None:
    """A copy in [-1, 1] or [0, 255] is far from every training image, and nobody would be told."""
    images, config = toy.decode(finished()), AMGConfig.preset("main").for_metric("nl2")
    for other in (images * 2 - 1, images * 255, images - 0.5):
        with pytest.raises(ValueError, match=r"`images` must .* in \[0, 1\] .*, got values from"):
            check(other, indexes["nl2"], (), config, flights_of(range(4)))
    nearly = check(images * 1.001, indexes["nl2"], (), config, flights_of(range(4)))
    assert [verdict.memorized for verdict in nearly] == [True, False, True, False]


def test_the_picture_that_is_stored_is_checked_too(indexes: dict) -> None:
    """Whoever takes an array stores 8 bits: the similarity is that of the array or of its rounding, the
    larger."""
    index, config = indexes["cosine"], AMGConfig.preset("main").for_metric("cosine")
    raw = (toy.decode(finished()) + 0.4 / 255).clamp(0, 1)  # what rounding brings back to the training image
    rounded = (raw * 255).round() / 255
    found = check(raw, index, (), config, flights_of(range(4)))
    for row, verdict in enumerate(found):
        closest = max(verdict_of(one[row], index)[0] for one in (raw, rounded))
        assert verdict.similarity == pytest.approx(closest, abs=1e-6)
    assert found[0].similarity > verdict_of(raw[0], index)[0] + 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["resample", "block", "flag", "raise"])
def test_an_image_that_cannot_be_checked_is_an_error(indexes: dict, how: str, bad: float) -> None:
    run, _ = make_run(AMGConfig.preset("main", on_memorized=how), indexes["nl2"])
    images = toy.decode(finished())
    images[3, 0, 2, 2] = bad
    with pytest.raises(FloatingPointError, match=r"`images`.*rows \[3\]"):
        deliver(
            images, finished(), run, toy.conditions(PICTURES, [0.0] * 4, guided=False), flights_of(range(4))
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_that_went_non_finite_is_an_error(indexes: dict, bad: float) -> None:
    """Clamping must not turn an infinity into white or black, which would pass every check."""
    run, _ = make_run(AMGConfig.preset("main"), indexes["nl2"])
    sample = finished()
    sample[1, 0, 2, 2] = bad
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        deliver(
            decode(run.guide.denoiser, sample),
            sample,
            run,
            toy.conditions(PICTURES, [0.0] * 4, guided=False),
            flights_of(range(4)),
        )


@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("steps", [255, 1000])
def test_the_host_reads_once_of_the_images_and_once_under_each_index(
    indexes: dict, metric: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 8 bits and in finer steps, where the rounding is looked at too."""
    index, other = indexes[metric], indexes["nl2" if metric == "cosine" else "cosine"]
    images = (torch.rand(16, 3, 8, 8) * steps).round() / steps
    config, flights = AMGConfig.preset("main").for_metric(metric), flights_of(range(16))
    for one in (index, other):
        one.seal.check()  # reads the files once
    with monkeypatch.context() as patch:
        found = reads.watch(patch)
        check(images, index, (), config, flights)
        assert len(found) == 2
        check(images, index, [other], config, flights)
        assert len(found) == 2 + 3


@pytest.mark.parametrize("what", ["similarity", "guard"])
def test_what_an_index_could_not_measure_is_an_error(indexes: dict, what: str) -> None:
    class Lost(amg.Index):
        def closest(self, images: Tensor) -> Closest:
            found = super().closest(images)
            alike = found.guard
            assert alike is not None
            for lost in [found.similarity] if what == "similarity" else [alike.similarity]:
                lost[[1, 2]] = math.nan
            return found

    lost: Any = copy.copy(indexes["nl2"])
    lost.__class__ = Lost
    config = AMGConfig.preset("main").for_metric("nl2")
    with pytest.raises(FloatingPointError, match=rf"`{what}` must be finite, .* in rows \[1, 2\] of \[4\]"):
        check(toy.decode(finished()), lost, (), config, flights_of(range(4)))
    if what == "guard":
        found = check(
            toy.decode(finished()), lost, (), replace(config, guard_threshold=None), flights_of(range(4))
        )
        assert [verdict.guard for verdict in found] == [None] * 4


def test_an_embedder_that_fails_on_one_picture_is_an_error(indexes: dict) -> None:
    def embed(images: Tensor) -> Tensor:
        found = toy.ToyEmbedder()(images)
        return torch.where(torch.arange(len(found))[:, None] == 3, torch.nan, found)

    broken = copy.copy(indexes["cosine"])
    broken.embedder = amg.embed.wrap(embed, name="toy", dimension=40, sha="ab" * 32, preprocessing="none")
    config = AMGConfig.preset("main", on_memorized="flag").for_metric("cosine")
    with pytest.raises(FloatingPointError, match=r"`similarity` must be finite, .* in rows \[3\] of \[4\]"):
        check(toy.decode(finished()), broken, (), config, flights_of(range(4)))


class Dead:
    """A searcher whose shards do not answer."""

    def nearest(self, queries: Tensor) -> None:
        raise OSError("shard 3 does not answer")


class Blind:
    """A searcher that always finds something far away."""

    def nearest(self, queries: Tensor) -> Nearest:
        far = torch.full((len(queries),), -9.0)
        return Nearest(far, torch.zeros(len(queries), dtype=torch.int64), None)


def searching_with(index: amg.Index, spec: str, searcher: Any) -> amg.Index:
    other = copy.copy(index)
    other.searcher_spec, other.searcher = spec, searcher
    return other


def test_a_judge_that_fails_fails_the_call(indexes: dict) -> None:
    dead = searching_with(indexes["nl2"], "exact", Dead())
    with pytest.raises(OSError, match="shard 3"):
        settle(AMGConfig.preset("main", on_memorized="flag"), indexes["nl2"], [dead])


def test_the_final_check_is_exact_whatever_searched_before(indexes: dict) -> None:
    """An approximate searcher that misses every copy guides badly; it does not decide what is delivered."""
    blind = searching_with(indexes["nl2"], "approximate", Blind())
    config = AMGConfig.preset("main").for_metric("nl2")
    verdicts = check(toy.decode(finished()), blind, [blind], config, flights_of(range(4)))
    assert [verdict.memorized for verdict in verdicts] == [True, False, True, False]
    assert [verdict.also[0].memorized for verdict in verdicts] == [True, False, True, False]


def test_images_are_judged_in_the_bits_they_are_delivered_in(indexes: dict) -> None:
    run, _ = make_run(AMGConfig.preset("main"), indexes["nl2"])
    images = decode(
        run.guide.denoiser,
        torch.cat([finished(), torch.full((1, 3, 8, 8), 3.0), torch.full((1, 3, 8, 8), -3.0)]),
    )
    assert images.dtype == torch.float32
    assert torch.equal((images * 255).round() / 255, images)
    assert float((images[:4] - toy.decode(finished())).abs().max()) <= 0.5 / 255 + 1e-6
    assert (float(images[4].min()), float(images[5].max())) == (1.0, 0.0)


def test_nothing_given_to_deliver_is_changed_in_place(indexes: dict) -> None:
    run, _ = make_run(AMGConfig.preset("main", on_memorized="block"), indexes["nl2"])
    images, sample = toy.decode(finished()), finished()
    deliver(images, sample, run, toy.conditions(PICTURES, [0.0] * 4, guided=False), flights_of(range(4)))
    assert torch.equal(images, toy.decode(finished()))
    assert torch.equal(sample, finished())


def test_verdicts_are_plain_json(indexes: dict) -> None:
    delivery, _ = settle(AMGConfig.preset("main"), indexes["nl2"], [indexes["nl2"]])
    for verdict in delivery.verdicts:
        told = json.loads(json.dumps(verdict.as_dict()))
        assert told["neighbour"]["id"] == verdict.neighbour.id
        assert len(told["trace"]) == len(verdict.trace)
        assert told["also"][0]["metric"] == "nl2"
        assert json.loads(json.dumps(verdict.as_dict(trace=False)))["trace"] == []


def test_summary_counts(indexes: dict) -> None:
    blocked, _ = settle(AMGConfig.preset("main", on_memorized="block"), indexes["nl2"])
    assert (
        summary(blocked.verdicts)
        == "4 images: 0 rewound, 0 resampled, 2 blocked, 0 delivered marked as memorised"
    )
    flagged, _ = settle(AMGConfig.preset("main", on_memorized="flag"), indexes["nl2"])
    assert summary(flagged.verdicts).endswith("0 blocked, 2 delivered marked as memorised")
    again, _ = settle(AMGConfig.preset("main", max_evaluations=None), indexes["nl2"])
    assert ", 2 resampled, 0 blocked" in summary(again.verdicts)


def test_a_rerun_is_never_guided_less_than_the_first_run(indexes: dict) -> None:
    """A user's own thresholds may be stricter than those of `strong`; the gradient is theirs to choose."""
    mine = {"threshold": -1.9, "lambda_min": -2.2, "lambda_max": -2.0, "rewind_threshold": -2.0}
    config = AMGConfig.preset("main", gradient="full", max_rewinds=4, **mine).for_metric("nl2")
    again = strong(config)
    assert (again.preset_name, again.metric, again.gradient) == ("strong", "nl2", "full")
    assert again.max_rewinds >= 4
    for name, value in mine.items():
        assert getattr(again, name) <= value, name
    lenient = strong(AMGConfig.preset("main", threshold=-1.0, lambda_max=-1.1).for_metric("nl2"))
    assert (lenient.threshold, lenient.lambda_max) == (-1.6, -1.65)


def test_what_was_given_up_is_marked_whatever_its_similarity(indexes: dict) -> None:
    """Blocked without a re-run that it cannot afford; named as such."""
    config = AMGConfig.preset("main", max_evaluations=1.0)
    run, network = make_run(config, indexes["nl2"])
    flights, conditions = flights_of([1, 3]), toy.conditions([17, 8], [0.0] * 2, guided=False)
    flights[0].exhausted, flights[0].evaluations = True, 6
    sample = finished()[[1, 3]]
    found = deliver(decode(run.guide.denoiser, sample), sample, run, conditions, flights)
    assert [verdict.memorized for verdict in found.verdicts] == [True, False] and network.calls == []
    assert [verdict.blocked for verdict in found.verdicts] == [True, False]
    reason = found.verdicts[0].reason
    assert reason is not None and "`max_evaluations` reached" in reason
    assert amg.Verdict.from_dict(json.loads(json.dumps(found.verdicts[0].as_dict()))) == found.verdicts[0]
