"""Samples that go back to an early step, look, are corrected and fail, each on its own, in one set."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import amg
from amg.config import AMGConfig
from amg.engine.job import Job
from amg.engine.look import Tools
from amg.engine.loop import Engine, first_slots
from amg.engine.restart import latest
from amg.engine.step import step
from amg.guidance.flight import Flight
from amg.guidance.predict import Conditions
from amg.similarity import judges_for, similarity_for

from .. import toy
from . import flying

PIXELS = (3, 8, 8)


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, amg.Index]:
    path = Path(tmp_path_factory.mktemp("indexes"))
    return {metric: toy.build(metric, path / metric) for metric in ("cosine", "nl2")}


def rewinding(**more: object) -> AMGConfig:
    """Every sample goes back at the step nearest to 0.5, and no term acts."""
    options = {"check_at": (0.5,), "rewind_at": (0.5,), "rewind_to": 0.3, "rewind_threshold": -1.0}
    options |= {"lambda_min": 1.0, "lambda_max": 1.0, "max_rewinds": 1, "rewind_caption": "prompt"}
    return AMGConfig.preset("main", **{**options, **more}).for_metric("cosine")


def tools_of(index: amg.Index, network: object = flying.network, **more: object) -> Tools:
    denoiser = replace(flying.DENOISER, network=network)
    return Tools(index, similarity_for(index, denoiser), denoiser, **more)


def job(how: object, index: amg.Index, config: AMGConfig, seed: int = 1, **more: object) -> Job:
    """As `flying.job`, of samples that the index takes."""
    made = flying.job(how, seed, config=config, tools=tools_of(index), **more)
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(made), *PIXELS, generator=chance)
    made.sample = noise * how.noise_scale
    made.flights = [Flight.from_noise(row) for row in noise]
    return made


def empty(index: amg.Index) -> object:
    return flying.empty(tools_of(index).denoiser, torch.zeros(1, *PIXELS))


@pytest.mark.parametrize("name", ["ddim", "euler-a", "dpm2m-karras", "dpm3m", "unipc", "heun", "pndm"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_sample_goes_back_with_fresh_noise_and_the_scheduler_s_own_restart(
    indexes: dict, name: str, scale: float | None
) -> None:
    """The whole second life in float64: restart table, noise as large as x_t is there, lower scale."""
    how, config = flying.course(name, 11), replace(rewinding(), rewind_guidance=scale)
    one = job(how, indexes["cosine"], config, generator=torch.Generator().manual_seed(7))
    total = how.plan(config).total
    (done,) = flying.fly(empty(indexes["cosine"]), {2: [one]}).values()
    back = round(0.5 * (total - 1)) + 1  # steps made before it went back
    start = latest(how.setting.scheduler, round(0.3 * (total - 1)), how.setting.step_arguments)
    flight, own = done.slot.flight, torch.Generator().manual_seed(int(done.slot.flight.seed or 0))
    table = flying.TABLES.table(how.setting, start)
    fresh = torch.randn(1, *PIXELS, generator=own) * math.hypot(float(table.alpha[0]), float(table.sigma[0]))
    noises = [torch.randn(1, *PIXELS, generator=own) if drawn else torch.zeros(1) for drawn in table.draws]
    low = 3.0 if scale is None else scale
    scales = [low if start + row < back else 3.0 for row in range(len(table))]
    alone = flying.alone(table, fresh, one.conditions, scales, noises)
    size = float(alone.after[-1].abs().max())
    assert float((done.sample - alone.after[-1]).abs().max()) <= 3e-5 * size
    trace = flight.trace
    assert [at.step for at in trace] == [*range(back), *range(start, total)]
    assert [at.step for at in trace if "rewind" in at.terms] == [back - 1]
    despecified = [at.step for at in trace[back:] if at.terms == ("despecification",)]
    assert despecified == ([] if scale is None else [*range(start, back)])
    signals = torch.tensor([at.signals for at in trace[back:]], dtype=torch.float64)
    torch.testing.assert_close(signals, torch.tensor(alone.signals).double(), rtol=2e-4, atol=2e-3)
    assert flight.evaluations == 2 * (back + total - start)
    assert (flight.rewinds, flight.total_rewinds, flight.pending) == (1, 1, False)


def test_only_the_marked_go_back_and_the_others_steps_are_untouched(indexes: dict) -> None:
    """Three requests join at different times; their finished samples are those of three sets of one."""
    index, config = indexes["cosine"], rewinding(rewind_threshold=0.6, max_rewinds=3)
    how = flying.course("dpm2m-karras", 11)
    ours = [job(how, index, config, seed, images=3) for seed in (1, 2, 3)]
    together = flying.fly(empty(index), {0: ours[:1], 3: ours[1:2], 4: ours[2:]})
    rewound = [done.slot.flight.rewinds for done in together.values()]
    assert 0 in rewound and any(rewound)
    for seed, one in zip((1, 2, 3), ours, strict=True):
        other = job(how, index, config, seed, images=3)
        for (_, place), done in flying.fly(empty(index), {0: [other]}).items():
            mine = together[one, place]
            torch.testing.assert_close(mine.sample, done.sample, rtol=1e-4, atol=1e-4)
            found, wanted = mine.slot.flight, done.slot.flight
            assert (found.rewinds, found.evaluations) == (wanted.rewinds, wanted.evaluations)
            assert [at.terms for at in found.trace] == [at.terms for at in wanted.trace]


CONFIGS = {
    "exact": {"step_length": "exact"},
    "constant": {"step_length": "constant", "c3": 0.2},
    "full": {"step_length": "constant", "c3": 0.3, "gradient": "full"},
    "released": None,
    "ungated": {"step_length": "exact", "gated": False, "lambda_min": 1.0, "lambda_max": 1.0},
}


def acting(name: str) -> AMGConfig:
    options = CONFIGS[name]
    open_ = {"lambda_min": -1.0, "lambda_max": -1.0, "rewind_at": (), "check_at": (), "terms_from": 0.0}
    if options is None:
        return AMGConfig.preset("released", lambda_min=-1.0, lambda_max=-1.0, c2=0.0).for_metric("cosine")
    return AMGConfig.preset("main", **{**open_, "c2": 0.0, **options}).for_metric("cosine")


@pytest.mark.parametrize("first", CONFIGS)
def test_samples_under_different_configs_are_guided_each_by_its_own(indexes: dict, first: str) -> None:
    """A re-run's config is another than that of the first tries it shares a set with: the first in the row
    must not decide for all."""
    index, how = indexes["cosine"], flying.course("ddim", 4)
    order = [first, *(name for name in CONFIGS if name != first)]
    ours = {name: job(how, index, acting(name), at) for at, name in enumerate(sorted(CONFIGS))}
    together = flying.fly(empty(index), {0: [ours[name] for name in order]})
    for at, name in enumerate(sorted(CONFIGS)):
        (alone,) = flying.fly(empty(index), {0: [job(how, index, acting(name), at)]}).values()
        mine = together[ours[name], 0]
        torch.testing.assert_close(mine.sample, alone.sample, rtol=1e-4, atol=1e-4)
        assert [one.terms for one in mine.slot.flight.trace] == [one.terms for one in alone.slot.flight.trace]
        assert any(one.terms for one in mine.slot.flight.trace)


@pytest.mark.parametrize("strict_first", [True, False])
def test_further_indexes_hold_each_sample_to_its_own_config_s_limit(
    indexes: dict, strict_first: bool
) -> None:
    """Under the further index's preset: `main`'s 0.5 for one, `strong`'s 0.4 for the other."""
    index = indexes["nl2"]
    denoiser = tools_of(index).denoiser

    class Judged:
        def measure(self, x0_hat: torch.Tensor) -> object:
            found = similarity_for(indexes["cosine"], denoiser).measure(x0_hat)
            return found._replace(similarity=torch.full_like(found.similarity, 0.45))

    (judge,) = judges_for([indexes["cosine"]], denoiser)
    tools = tools_of(index, judges=(judge._replace(similarity=Judged()),))
    options = {"check_at": (0.5,), "rewind_at": (0.5,), "rewind_to": 0.3, "rewind_threshold": -1e-3}
    options |= {"lambda_min": -1e-3, "lambda_max": -1e-3, "guard_threshold": None, "max_rewinds": 1}
    how, went = flying.course("ddim", 5), {}
    names = ["strong", "main"] if strict_first else ["main", "strong"]
    ours = []
    for seed, name in enumerate(names):
        one = job(how, index, AMGConfig.preset(name, **options).for_metric("nl2"), seed)
        one.tools = tools
        ours.append(one)
    for (one, _), done in flying.fly(empty(index), {0: ours}).items():
        went[one.config.preset_name] = done.slot.flight.total_rewinds
    assert went == {"main": 0, "strong": 1}


@pytest.mark.parametrize("at", [0, 2, 5, 7])
@pytest.mark.parametrize("check_at", [(1.0,), ()])
def test_nan_in_one_sample_fails_its_request_alone_with_the_step_s_number(
    indexes: dict, at: int, check_at: tuple[float, ...]
) -> None:
    """The network breaks one sample's output at step `at` of 8, looked at there or not before the last."""
    index, calls = indexes["cosine"], []

    def breaking(sample: torch.Tensor, t: object, *, words: torch.Tensor) -> torch.Tensor:
        output = flying.network(sample, t, words=words)
        if len(calls) == at:
            output[-1, 0, 1, 1] = math.inf
        calls.append(len(output))
        return output

    config = rewinding(check_at=check_at, rewind_at=(), on_memorized="flag")
    how, engine = flying.course("ddim", 8), Engine()
    ours = [job(how, index, config, seed, images=2) for seed in (1, 2)]
    for one in ours:
        one.tools = tools_of(index, breaking)
        engine.admit(one)
    while engine.busy or not all(one.future.done() for one in ours):
        engine.turn()
        engine.forget({one for one in ours if one.future.done()})
    with pytest.raises(FloatingPointError, match=rf"image 1 of the request, step {at}$"):
        ours[1].future.result()
    assert ours[0].future.result().images.isfinite().all()
    assert len(calls) == 8


def test_a_failing_step_is_made_again_by_each_request_alone(indexes: dict) -> None:
    """What cannot be joined is still sampled; only the request that fails alone fails; evaluations are those
    of plain sampling."""
    index, calls = indexes["cosine"], []

    def choosy(sample: torch.Tensor, t: object, *, words: torch.Tensor) -> torch.Tensor:
        calls.append(len(sample))
        if len(sample) > 4 or (len(calls) > 4 and bool((words == bad).all(1).any())):
            raise RuntimeError("too much at once")
        return flying.network(sample, t, words=words)

    how, engine = flying.course("dpm2m-karras", 5), Engine()
    ours = [
        job(how, index, rewinding(rewind_at=(), check_at=(1.0,), on_memorized="flag"), seed)
        for seed in (1, 2, 3)
    ]
    bad = ours[1].conditions.cond["words"]
    for one in ours:
        one.tools = tools_of(index, choosy)
    engine.admit(ours[0])
    engine.turn()
    for one in ours[1:]:
        engine.admit(one)
    with pytest.warns(UserWarning, match="a step of 3 requests failed, each goes on alone"):
        while not all(one.future.done() for one in ours):
            engine.turn()
            engine.forget({one for one in ours if one.future.done()})
    with pytest.raises(RuntimeError, match="too much at once"):
        ours[1].future.result()
    for seed in (1, 3):
        other = job(how, index, rewinding(rewind_at=(), check_at=(1.0,), on_memorized="flag"), seed)
        (alone,) = flying.fly(empty(index), {0: [other]}).values()
        one = ours[seed - 1]
        torch.testing.assert_close(one.samples[0], alone.sample, rtol=1e-5, atol=1e-5)
        assert one.verdicts[0].evaluations == 10


def test_a_later_try_is_conditioned_on_its_caption_alone_and_its_noise_is_its_own(indexes: dict) -> None:
    """`encode_captions` is called once for all that go back at a step; conditions of the others stay."""
    index, said = copy.copy(indexes["cosine"]), []
    captions = [f"a picture, number {row % 9}" for row in range(index.count)]
    index.__dict__["_meta"] = {**index._meta, "caption": captions}

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        said.append(list(captions))
        return {"words": torch.tensor([[float(len(one)), 0.0, 1.0] for one in captions])}

    config, how = rewinding(rewind_caption="ordinary"), flying.course("ddim", 11)
    one = job(how, index, config, images=2)
    tools = tools_of(index)
    one.tools = replace(tools, denoiser=replace(tools.denoiser, encode_captions=encode))
    for flight, prompt in zip(one.flights, ("number 3", "number 5 alone"), strict=True):
        flight.prompt = prompt
    slots, engine = flying.empty(one.tools.denoiser, torch.zeros(1, *PIXELS)), Engine()
    with torch.no_grad():
        slots.join(first_slots(one), one.sample)
        for _ in range(6):
            step(slots)
            engine._settle(slots)
    given = [flight.caption for flight in one.flights]
    assert said == [given] and None not in given
    for slot, caption in zip(slots.slots, given, strict=True):
        assert isinstance(slot.conditions, Conditions)
        assert slot.conditions.cond["words"].tolist() == [[float(len(caption or "")), 0.0, 1.0]]
        assert torch.equal(slot.conditions.uncond["words"], one.conditions_of(slot.place).uncond["words"])
    assert not torch.equal(slots.sample[0], slots.sample[1])
