"""Rewinds, and the law above all others: sample i of a batch is what it would be alone."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import amg
from amg.config import AMGConfig
from amg.engine.drive import pristine
from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions
from amg.protection.catch_up import Run, advance, denoise
from amg.protection.group import Group
from amg.protection.guide import Guide
from amg.protection.rewind import merge_history
from amg.similarity import similarity_for

from .. import toy

SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++3": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "single": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
STEPS, S0 = 10, 3.0
PICTURES = [3, 17, 40, 8, 29]
TEXT_WEIGHTS = [0.3, 0.02, 0.28, 0.0, 0.15]
PIXEL_WEIGHTS = [0.9, 0.05, 0.85, 0.0, 0.5]
REWINDS = {"rewind_at": (0.5, 0.8), "rewind_to": 0.12, "max_rewinds": 2}


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, amg.Index]:
    path = Path(tmp_path_factory.mktemp("indexes"))
    return {metric: toy.build(metric, path / metric) for metric in ("cosine", "nl2")}


def make_scheduler(name: str, steps: int = STEPS) -> Any:
    kind, options = SCHEDULERS[name]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, kind)(**betas, **options)
    scheduler.set_timesteps(steps)
    return scheduler


@dataclass
class Outcome:
    sample: Tensor
    flights: list[Flight]
    network: toy.ToyNetwork


def config_for(metric: str, **options: Any) -> AMGConfig:
    """Gates and checkpoints that some of the five rows pass and some do not."""
    mine: dict[str, Any] = {
        "c1": 1.5,
        "c2": 2.0,
        "lambda_min": 0.55,
        "lambda_max": 0.7,
        "rewind_threshold": 0.8,
    }
    if metric == "nl2":
        mine = {"lambda_min": -1.5, "lambda_max": -1.3, "rewind_threshold": -1.2}
    return AMGConfig.preset("main", **{**mine, **REWINDS, **options}).for_metric(metric)


def conditions_for(metric: str) -> Conditions:
    if metric == "cosine":
        return toy.conditions(PICTURES, TEXT_WEIGHTS, guided=True)
    return toy.conditions(PICTURES, PIXEL_WEIGHTS, guided=False)


def start(rows: Sequence[int]) -> Tensor:
    return torch.stack(
        [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(70 + row)) for row in rows]
    )


def run(
    scheduler: Any, config: AMGConfig, index: amg.Index, rows: Sequence[int], noise: Tensor | None = None
) -> Outcome:
    """Those rows of the batch of five, sampled together."""
    network = toy.ToyNetwork()
    denoiser = toy.denoiser(network)
    guide = Guide(config, index, similarity_for(index, denoiser), denoiser, S0)
    conditions = conditions_for(index.metric).take(torch.tensor(rows))
    noise = start(rows) if noise is None else noise
    flights = [Flight.from_noise(row) for row in noise]
    mine = Run(guide, pristine(scheduler), {})
    sample = noise * float(scheduler.init_noise_sigma)
    group = Group(pristine(scheduler), sample, [*range(len(rows))])
    return Outcome(denoise(mine, group, conditions, flights), flights, network)


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_a_sample_of_a_batch_equals_its_own_batch_of_one(indexes: dict, metric: str, name: str) -> None:
    scheduler, index = make_scheduler(name), indexes[metric]
    config = config_for(metric)
    together = run(scheduler, config, index, range(5))
    assert bool(torch.isfinite(together.sample).all())
    rewinds = [flight.rewinds for flight in together.flights]
    opened = [sum(bool(step.terms) for step in flight.trace) for flight in together.flights]
    assert 0 < sum(count > 0 for count in rewinds) < 5, "some rows must rewind, and some not"
    assert min(opened) < max(opened)
    for row in range(5):
        alone = run(scheduler, config, index, [row])
        torch.testing.assert_close(together.sample[row], alone.sample[0], rtol=1e-5, atol=1e-5)
        mine, its = together.flights[row], alone.flights[0]
        assert (mine.rewinds, mine.evaluations, len(mine.trace)) == (
            its.rewinds,
            its.evaluations,
            len(its.trace),
        )
        for one, other in zip(mine.trace, its.trace, strict=True):
            assert (one.step, one.t, one.terms, one.neighbour) == (
                other.step,
                other.t,
                other.terms,
                other.neighbour,
            )
            assert one.similarity == pytest.approx(other.similarity, abs=1e-4)


@pytest.mark.parametrize("name", ["dpm++", "pndm", "euler-a"])
def test_the_order_of_a_batch_does_not_matter(indexes: dict, name: str) -> None:
    scheduler, config = make_scheduler(name), config_for("cosine")
    order = [4, 2, 0, 3, 1]
    forth = run(scheduler, config, indexes["cosine"], range(5))
    back = run(scheduler, config, indexes["cosine"], order)
    torch.testing.assert_close(back.sample, forth.sample[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_rewound_sample_goes_on_as_if_it_had_started_there(indexes: dict, name: str) -> None:
    """A rewound row equals plain steps from the rewind's own start, multistep history and all: a whole step,
    the first one where the order counts on what came before."""
    scheduler, index = make_scheduler(name), indexes["nl2"]
    config = config_for(
        "nl2", lambda_min=0.0, lambda_max=0.0, rewind_at=(0.5,), rewind_to=0.18, max_rewinds=1
    )  # rewinds only
    outcome = run(scheduler, config, index, range(5))
    rows = [row for row, flight in enumerate(outcome.flights) if flight.rewinds]
    assert 0 < len(rows) < 5
    plain = config_for("nl2", lambda_min=0.0, lambda_max=0.0, rewind_at=())
    for row in rows:
        recorded = [step.step for step in outcome.flights[row].trace]
        checkpoint = round(0.5 * (len(scheduler.timesteps) - 1))
        first = {"pndm": 0, "lms": 0}.get(name, 2)  # 3 of 19, where a step is two calls
        assert recorded == [*range(checkpoint + 1), *range(first, len(scheduler.timesteps))]
        expected = by_hand(scheduler, plain, index, row, checkpoint, first)
        torch.testing.assert_close(outcome.sample[row], expected, rtol=1e-5, atol=1e-5)


def by_hand(
    scheduler: Any, config: AMGConfig, index: amg.Index, row: int, checkpoint: int, first: int
) -> Tensor:
    """One sample: to the checkpoint, then from fresh noise at `first`, on with a scheduler of its own."""
    network, noise = toy.ToyNetwork(), start([row])
    denoiser = toy.denoiser(network)
    guide = Guide(config, index, similarity_for(index, denoiser), denoiser, S0)
    conditions, flight = conditions_for("nl2").take(torch.tensor([row])), Flight.from_noise(noise[0])
    once, sample = pristine(scheduler), noise * float(scheduler.init_noise_sigma)
    mine = Run(guide, pristine(scheduler), {})
    advance(mine, Group(once, sample, [0]), checkpoint, conditions, [flight])
    if name_takes_noise(once):  # the checkpoint's own step draws before the rewind does
        torch.randn(3, 8, 8, generator=flight.generator)
    again = pristine(scheduler)
    if hasattr(again, "set_begin_index"):  # timesteps may repeat
        again.set_begin_index(first)
    begun = torch.randn(1, 3, 8, 8, generator=flight.generator)
    if type(again).__name__.startswith(("Euler", "Heun", "KDPM2", "LMS")):
        begun = begun * (1 + float(again.sigmas[first]) ** 2) ** 0.5
    return denoise(mine, Group(again, begun, [0], first), conditions, [flight])[0]


def name_takes_noise(scheduler: Any) -> bool:
    sde = str(getattr(scheduler.config, "algorithm_type", "")).startswith("sde")
    return sde or type(scheduler).__name__ in (
        "DDPMScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",  # every second call: the checkpoint's is one
    )


def test_rewinds_are_bounded_and_counted(indexes: dict) -> None:
    scheduler, index = make_scheduler("ddim"), indexes["nl2"]
    for most in (0, 1, 3):
        config = config_for("nl2", rewind_threshold=-1e9, max_rewinds=most, lambda_min=0.0, lambda_max=0.0)
        outcome = run(scheduler, config, index, range(5))
        for flight in outcome.flights:
            assert (flight.rewinds, flight.total_rewinds) == (most, most)
            assert sum("rewind" in step.terms for step in flight.trace) == most
            assert flight.evaluations == len(flight.trace)  # one network call a step, without guidance
            assert not flight.pending
        assert sum(outcome.network.calls) == sum(flight.evaluations for flight in outcome.flights)


def test_without_checkpoints_nothing_rewinds(indexes: dict) -> None:
    outcome = run(
        make_scheduler("ddim"),
        config_for("nl2", rewind_at=(), rewind_threshold=-1e9),
        indexes["nl2"],
        range(5),
    )
    assert [flight.rewinds for flight in outcome.flights] == [0] * 5
    assert all(len(flight.trace) == STEPS for flight in outcome.flights)


def test_rewound_rows_go_on_in_the_calls_of_the_others(indexes: dict) -> None:
    """The recorded calls: all rows as long as the batch needs, then the rewound ones that are behind."""
    config = config_for("nl2", rewind_at=(0.5,), max_rewinds=1, lambda_min=0.0, lambda_max=0.0)
    outcome = run(make_scheduler("ddim"), config, indexes["nl2"], range(5))
    rewound = sum(flight.rewinds > 0 for flight in outcome.flights)
    assert 0 < rewound < 5
    checkpoint, first = round(0.5 * (STEPS - 1)), round(0.12 * (STEPS - 1))
    assert outcome.network.calls == [5] * STEPS + [rewound] * (checkpoint + 1 - first)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "euler-a"])
@pytest.mark.parametrize("one_generator", [True, False])
def test_rows_that_stay_do_not_notice_those_sent_back(indexes: dict, name: str, one_generator: bool) -> None:
    """Bit for bit what they are where no row is sent back, whatever generators the caller gave."""

    def sample(most: int) -> tuple[Tensor, list[Flight]]:
        config = config_for("nl2", rewind_at=(0.5,), max_rewinds=most, lambda_min=0.0, lambda_max=0.0)
        denoiser, noise = toy.denoiser(toy.ToyNetwork()), start(range(5))
        guide = Guide(config, indexes["nl2"], similarity_for(indexes["nl2"], denoiser), denoiser, S0)
        flights = [Flight.from_noise(row) for row in noise]
        scheduler = make_scheduler(name)
        seeds = [torch.Generator().manual_seed(row) for row in range(5)]
        group = Group(
            pristine(scheduler),
            noise * float(scheduler.init_noise_sigma),
            [*range(5)],
            generator=seeds[0] if one_generator else seeds,
        )
        return denoise(Run(guide, pristine(scheduler), {}), group, conditions_for("nl2"), flights), flights

    (with_rewinds, flights), (without, _) = sample(1), sample(0)
    stay = [row for row, flight in enumerate(flights) if not flight.rewinds]
    assert 0 < len(stay) < 5
    assert torch.equal(with_rewinds[stay], without[stay])
    gone = [row for row in range(5) if row not in stay]
    assert not torch.isclose(with_rewinds[gone], without[gone]).flatten(1).all(1).any()


def test_the_neighbours_captions_are_asked_for_open_rows_only(indexes: dict) -> None:
    """Each call has ten rows (two conditions), or as many as that step's trace says were de-duplicated."""
    outcome = run(make_scheduler("ddim"), config_for("cosine", rewind_at=()), indexes["cosine"], range(5))
    asked = [
        sum("deduplication" in flight.trace[step].terms for flight in outcome.flights)
        for step in range(STEPS)
    ]
    expected = [calls for step in range(STEPS) for calls in (10, asked[step]) if calls]
    assert outcome.network.calls == expected
    assert any(0 < count < 5 for count in asked), asked


def test_different_noise_gives_different_rewinds(indexes: dict) -> None:
    config = config_for("nl2", rewind_threshold=-1e9, max_rewinds=1)
    one = run(make_scheduler("ddim"), config, indexes["nl2"], [0])
    other = run(make_scheduler("ddim"), config, indexes["nl2"], [0], noise=start([0]) + 1e-3)
    same = run(make_scheduler("ddim"), config, indexes["nl2"], [0])
    assert torch.equal(one.sample, same.sample)
    assert one.flights[0].generator.initial_seed() != other.flights[0].generator.initial_seed()


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_pristine_is_an_unstepped_copy(name: str) -> None:
    scheduler = make_scheduler(name)
    before = copy.deepcopy({key: value for key, value in vars(scheduler).items() if key != "_internal_dict"})
    clone = pristine(scheduler)
    sample = start(range(2))
    for t in scheduler.timesteps[:3]:
        clone.scale_model_input(sample, t)
        sample = clone.step(sample, t, sample).prev_sample
    for key, value in before.items():
        now = vars(scheduler)[key]
        same = torch.allclose(now, value, 0, 0, True) if isinstance(value, Tensor) else str(now) == str(value)
        assert same, key  # KDPM2 has NaN in the levels it does not use


def test_pristine_drops_a_wrapped_step() -> None:
    scheduler = make_scheduler("ddim")
    scheduler.step = lambda *args, **kwargs: None
    assert pristine(scheduler).step.__func__ is diffusers.DDIMScheduler.step
    assert scheduler.step(1) is None


def _seeded(arguments: dict) -> dict:
    for generator in arguments.values():
        generator.manual_seed(0)
    return arguments


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++", "unipc"])
def test_pristine_forgets_where_the_scheduler_stood(name: str) -> None:
    """A pipeline calls `scale_model_input` before the network: Euler then stands at step 0."""
    scheduler, sample = make_scheduler(name), start(range(2))
    scheduler.scale_model_input(sample, scheduler.timesteps[0])
    clone, fresh = pristine(scheduler), pristine(make_scheduler(name))
    t = scheduler.timesteps[3]
    for one in (clone, fresh):
        one.scale_model_input(sample, t)
    noise = {} if name == "unipc" else {"generator": torch.Generator()}
    found, expected = (one.step(sample, t, sample, **_seeded(noise)).prev_sample for one in (clone, fresh))
    torch.testing.assert_close(found, expected)


def test_merge_history_copies_rows_of_every_list_and_tensor() -> None:
    outer = SimpleNamespace(
        model_outputs=[torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)],
        last_sample=torch.zeros(4, 3, 2, 2),
        n=2,
    )
    inner = SimpleNamespace(
        model_outputs=[torch.ones(4, 3, 2, 2), torch.full((4, 3, 2, 2), 2.0)],
        last_sample=torch.ones(4, 3, 2, 2),
        n=9,
    )
    assert merge_history(outer, inner, [1, 3], 4)
    changed = [part.flatten(1).mean(1).tolist() for part in (*outer.model_outputs, outer.last_sample)]
    assert changed == [[0, 1, 0, 1], [0, 2, 0, 2], [0, 1, 0, 1]]
    assert outer.n == 2


@pytest.mark.parametrize(
    "shorter", [{"ets": [torch.ones(4, 3, 2, 2)]}, {"ets": [torch.ones(4, 3, 2, 2), None]}, {}]
)
def test_a_history_that_cannot_be_merged_leaves_all_as_it_was(shorter: dict) -> None:
    outer = SimpleNamespace(
        first=torch.zeros(4, 3, 2, 2), ets=[torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)]
    )
    inner = SimpleNamespace(first=torch.ones(4, 3, 2, 2), **shorter)
    assert not merge_history(outer, inner, [2], 4)
    assert float(outer.first.abs().max()) == 0
    assert all(float(part.abs().max()) == 0 for part in outer.ets)


def test_a_flight_is_made_of_its_noise_alone() -> None:
    noise = start([0])[0]
    one, same, other = (
        Flight.from_noise(noise),
        Flight.from_noise(noise.clone()),
        Flight.from_noise(noise + 1e-6),
    )
    assert torch.equal(one.noise(noise), same.noise(noise))
    assert not torch.equal(one.noise(noise), other.noise(noise))
    half = one.noise(noise.half())
    assert (half.dtype, half.shape) == (torch.float16, noise.shape)
