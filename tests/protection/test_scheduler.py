"""`AMGScheduler` against the wrapped scheduler's own step, and against guidance followed by it."""

import copy
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import amg
import amg.kernels as kernels
import amg.protection.scheduler as module
from amg.engine.drive import Refused

from .. import toy
from ..engine.schedulers import CASES, Case, case

S0, STEPS, BATCH = 4.0, 8, 2
NAMES = [
    "ddim",
    "ddim-eta-clip",
    "ddpm",
    "ddpm-clip",
    "euler",
    "euler-a",
    "dpm2m",
    "dpm-sde",
    "unipc",
    "heun",
]
NAMES += ["lms", "pndm", "kdpm2", "flow"]
OPEN: dict[str, Any] = {"lambda_min": -1.0, "lambda_max": -1.0, "c1": 1.5, "c2": 2.0, "rewind_at": ()}
CLOSED: dict[str, Any] = {"lambda_min": 1.0, "lambda_max": 1.0, "rewind_at": ()}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> amg.Index:
    return toy.build("cosine", Path(tmp_path_factory.mktemp("scheduler")) / "i")


def network(sample: Tensor, t: Any, pull: float) -> Tensor:
    """Bounded and not linear."""
    return torch.tanh(0.7 * sample.flip(-1) + pull + 0.001 * float(t)).to(sample.dtype)


def neighbour_output(sample: Tensor, t: Any, rows: list[int], captions: Any) -> Tensor:
    shifts = [0.01 * row + 0.001 * len(caption) for row, caption in zip(rows, captions, strict=True)]
    return network(sample, t, -0.2) + torch.tensor(shifts).view(-1, 1, 1, 1)


def config(**options: Any) -> amg.AMGConfig:
    return amg.AMGConfig.preset("main", guidance_scale=S0, **options)


def wrapped(name: str | Case, index: amg.Index, options: Any = None, steps: int = STEPS) -> amg.AMGScheduler:
    made = CASES[name] if isinstance(name, str) else name
    scheduler = amg.AMGScheduler(
        made.make(), index, config(**(options or CLOSED)), neighbour_output=neighbour_output
    )
    scheduler.set_timesteps(steps, **made.times)
    return scheduler


def noise(scheduler: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return (drawn * getattr(scheduler, "init_noise_sigma", 1.0)).to(dtype)


def halves(scheduler: Any, sample: Tensor, t: Any) -> tuple[Tensor, Tensor]:
    seen = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
    return network(seen, t, 0.1), network(seen, t, 0.3)


def options_of(name: str, scheduler: Any) -> dict[str, Any]:
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = dict(CASES[name].step)
    return options | ({"generator": torch.Generator().manual_seed(9)} if "generator" in known else {})


def walk(scheduler: Any, sample: Tensor, times: Any, plain: bool = False, **options: Any) -> list[Any]:
    """Every step's own output of a loop; `plain`: classifier-free guidance is the loop's."""
    found = []
    for t in times:
        uncond, cond = halves(scheduler, sample, t)
        output: Any = uncond + S0 * (cond - uncond) if plain else (uncond, cond)
        found.append(scheduler.step(output, t, sample, **options))
        sample = found[-1].prev_sample
    return found


def assert_close(found: list[Any], expected: list[Any]) -> None:
    """Every step within 1e-5 of the sample's size, or of 1."""
    assert len(found) == len(expected) > 0
    for mine, own in zip(found, expected, strict=True):
        assert type(mine) is type(own)
        for name in ("prev_sample", "pred_original_sample"):
            one, other = getattr(mine, name, None), getattr(own, name, None)
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max())), name


@pytest.fixture
def guide_then_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function while no scheduler has a table."""

    def run(function: Callable[[], Any]) -> Any:
        def refuse(tables: Any, scheduler: Any, *_: Any) -> None:
            raise Refused(scheduler, "the test says so")

        with monkeypatch.context() as patched:
            patched.setattr(module, "begun", refuse)
            return function()

    return run


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for every call of the kernel: whether it wrote the next sample."""
    calls, own = list[bool](), kernels.guided_step_into

    def count(*args: Any, **kwargs: Any) -> None:
        calls.append(kwargs.get("prev_sample") is not None)
        own(*args, **kwargs)

    monkeypatch.setattr(kernels, "guided_step_into", count)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_with_closed_gates_the_steps_are_the_schedulers_own(
    name: str, index: amg.Index, counted: list[bool]
) -> None:
    scheduler, own = wrapped(name, index), CASES[name].make()
    own.set_timesteps(STEPS, **CASES[name].times)
    found = walk(scheduler, noise(own), scheduler.timesteps, **options_of(name, own))
    assert counted.count(True) == len(found)
    assert_close(found, walk(own, noise(own), own.timesteps, plain=True, **options_of(name, own)))
    for flight in scheduler._flights:
        assert flight.evaluations == 2 * len(found) and len(flight.trace) == len(found)
        assert [step.t for step in flight.trace] == own.timesteps.tolist()
        assert any(step.similarity is not None for step in flight.trace)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flow"])
def test_with_open_gates_a_step_is_guidance_and_then_the_schedulers_own(
    name: str, index: amg.Index, counted: list[bool], guide_then_step: Any
) -> None:
    def run() -> tuple[list[Any], list[Any]]:
        scheduler = wrapped(name, index, OPEN)
        found = walk(scheduler, noise(scheduler), scheduler.timesteps, **options_of(name, scheduler))
        return found, [flight.trace for flight in scheduler._flights]

    found, traces = run()
    assert counted.count(True) == len(found)
    expected, own_traces = guide_then_step(run)
    assert_close(found, expected)
    assert {term for step in traces[0] for term in step.terms} >= {"despecification", "deduplication"}
    for one, other in zip(itertools.chain(*traces), itertools.chain(*own_traces), strict=True):
        assert (one.step, one.t, one.neighbour, one.terms) == (
            other.step,
            other.t,
            other.neighbour,
            other.terms,
        )
        assert one.threshold == pytest.approx(other.threshold, abs=1e-6)
        assert one.similarity == pytest.approx(other.similarity, abs=1e-4)
        assert (one.signals is None) == (other.signals is None)
        if one.signals is not None:
            assert one.signals == pytest.approx(other.signals, rel=1e-4, abs=1e-4)


def test_a_step_without_a_look_is_one_kernel_call(index: amg.Index, counted: list[bool]) -> None:
    scheduler = wrapped("euler", index, {**CLOSED, "check_at": (1.0,)})
    for t in scheduler.timesteps[:-1]:
        sample = noise(scheduler)
        scheduler.step(halves(scheduler, sample, t), t, sample)
    assert counted == [True] * (STEPS - 1)
    scheduler.step(halves(scheduler, sample, t), scheduler.timesteps[-1], sample)
    assert counted == [True] * (STEPS - 1) + [False, True]


def test_one_output_is_unconditional(index: amg.Index) -> None:
    scheduler, own = wrapped("dpm2m", index), CASES["dpm2m"].make()
    own.set_timesteps(STEPS)
    sample = mine = noise(own)
    for t in own.timesteps:
        mine = scheduler.step(network(mine, t, 0.2), t, mine).prev_sample
        sample = own.step(network(sample, t, 0.2), t, sample).prev_sample
        assert torch.allclose(mine, sample, rtol=0, atol=1e-5 * max(1.0, float(sample.abs().max())))
    assert scheduler._flights[0].evaluations == STEPS


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler-a", "dpm2m", "unipc", "heun", "lms"])
def test_a_loop_may_start_late(name: str, told: bool, index: amg.Index, counted: list[bool]) -> None:
    scheduler, own = wrapped(name, index), CASES[name].make()
    own.set_timesteps(STEPS)
    start = 4
    if told and not hasattr(own, "set_begin_index"):
        pytest.skip("it has no begin index to set")
    for one in (scheduler, own) if told else ():
        one.set_begin_index(start)
    sample = noise(own) / 3
    found = walk(scheduler, sample, scheduler.timesteps[start:], **options_of(name, own))
    assert counted.count(True) == len(found)
    assert_close(found, walk(own, sample, own.timesteps[start:], plain=True, **options_of(name, own)))
    assert [step.step for step in scheduler._flights[0].trace] == [*range(start, len(own.timesteps))]


@pytest.mark.parametrize("name", ["ddim", "dpm2m", "lms"])
def test_a_copy_made_in_the_middle_goes_its_own_way(name: str, index: amg.Index) -> None:
    scheduler = wrapped(name, index)
    sample = walk(scheduler, noise(scheduler), scheduler.timesteps[:3])[-1].prev_sample
    twin = copy.deepcopy(scheduler)
    assert twin.index is scheduler.index and twin.scheduler is not scheduler.scheduler
    expected = walk(scheduler, sample, scheduler.timesteps[3:])
    assert len(twin._flights[0].trace) == 3
    found = walk(twin, sample, twin.timesteps[3:])
    assert all(
        torch.equal(one.prev_sample, two.prev_sample) for one, two in zip(found, expected, strict=True)
    )
    assert len(twin._flights[0].trace) == len(scheduler._flights[0].trace) == len(scheduler.timesteps)
    twin.set_timesteps(4)
    assert len(scheduler.timesteps) == STEPS and len(twin.timesteps) == 4


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "dpm2m", "flow"])
def test_signatures_are_the_wrapped_schedulers(name: str, index: amg.Index) -> None:
    scheduler, own = wrapped(name, index), CASES[name].make()
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(scheduler, method)) == inspect.signature(getattr(own, method))
    with pytest.raises(
        TypeError, match=rf"{type(own).__name__}\.step\(\) got an unexpected keyword argument 'x'"
    ):
        scheduler.step(noise(own), scheduler.timesteps[0], noise(own), x=1)


@pytest.mark.parametrize("name", ["ddim", "dpm2m", "euler", "heun"])
def test_a_tuple_where_it_is_asked_for(name: str, index: amg.Index) -> None:
    scheduler, own = wrapped(name, index), CASES[name].make()
    own.set_timesteps(STEPS)
    sample, t = noise(own), own.timesteps[0]
    uncond, cond = halves(own, sample, t)
    expected = own.step(uncond + S0 * (cond - uncond), t, sample, return_dict=False)
    found = scheduler.step((uncond, cond), t, sample, return_dict=False)
    assert type(found) is tuple and len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm2m", "unipc"])
def test_half_precision_comes_back_as_it_came(name: str, dtype: torch.dtype, index: amg.Index) -> None:
    scheduler, own = wrapped(name, index), CASES[name].make()
    own.set_timesteps(STEPS)
    sample, t = noise(own, dtype), own.timesteps[0]
    uncond, cond = halves(own, sample, t)
    found = scheduler.step((uncond, cond), t, sample).prev_sample
    plain = uncond.float() + S0 * (cond.float() - uncond.float())
    expected = own.step(plain, t, sample.float()).prev_sample
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_double_precision_is_left_to_the_scheduler(index: amg.Index, counted: list[bool]) -> None:
    scheduler, own = wrapped("ddim", index), CASES["ddim"].make()
    own.set_timesteps(STEPS)
    found = walk(scheduler, noise(own, torch.float64), scheduler.timesteps)
    expected = walk(own, noise(own, torch.float64), own.timesteps, plain=True)
    assert found[-1].prev_sample.dtype == torch.float64 and True not in counted
    assert torch.allclose(found[-1].prev_sample, expected[-1].prev_sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "made",
    [case("DDIMScheduler", thresholding=True, clip_sample=False), CASES["lcm"]],
    ids=["threshold", "lcm"],
)
def test_a_scheduler_without_a_table_makes_its_own_steps(
    made: Case, index: amg.Index, counted: list[bool]
) -> None:
    scheduler, own = wrapped(made, index), made.make()
    own.set_timesteps(STEPS)
    torch.manual_seed(3)
    found = walk(scheduler, noise(own), scheduler.timesteps)
    torch.manual_seed(3)
    expected = walk(own, noise(own), own.timesteps, plain=True)
    assert type(found[0]) is type(expected[0]) and True not in counted
    assert torch.allclose(found[-1].prev_sample, expected[-1].prev_sample, rtol=0, atol=1e-5)


def test_noise_that_the_caller_drew(index: amg.Index) -> None:
    scheduler, own = wrapped("ddim", index), CASES["ddim"].make()
    own.set_timesteps(STEPS)
    drawn = torch.randn(BATCH, 3, 8, 8)
    options = {"eta": 0.5, "variance_noise": drawn}
    found = walk(scheduler, noise(own), scheduler.timesteps, **options)
    assert_close(found, walk(own, noise(own), own.timesteps, plain=True, **options))


def test_arguments_of_step_may_change_where_there_is_no_history(index: amg.Index) -> None:
    scheduler, own = wrapped("ddim", index), CASES["ddim"].make()
    own.set_timesteps(STEPS)
    sample = noise(own)
    for eta, t in zip((0.0, 0.3, 0.8), own.timesteps, strict=False):
        first, second = (torch.Generator().manual_seed(1) for _ in range(2))
        uncond, cond = halves(own, sample, t)
        found = scheduler.step((uncond, cond), t, sample, eta=eta, generator=first)
        sample = own.step(uncond + S0 * (cond - uncond), t, sample, eta=eta, generator=second).prev_sample
        assert torch.allclose(found.prev_sample, sample, rtol=0, atol=1e-5)


def test_arguments_of_step_may_not_change_under_a_history(index: amg.Index) -> None:
    scheduler = wrapped("lms", index)
    sample, times = noise(scheduler), scheduler.timesteps
    scheduler.step(sample, times[0], sample)
    with pytest.raises(ValueError, match=r"`order` must be None, as in the steps before, .*, got 2"):
        scheduler.step(sample, times[1], sample, order=2)
    scheduler.step(sample, times[1], sample)


def test_the_place_is_told_while_the_wrapped_scheduler_stands_still(index: amg.Index) -> None:
    scheduler = wrapped("euler", index)
    assert scheduler.step_index is None and not hasattr(wrapped("ddim", index), "step_index")
    walk(scheduler, noise(scheduler), scheduler.timesteps[:3])
    assert scheduler.step_index == 3


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_a_timestep_is_made_once_and_in_order(name: str, index: amg.Index) -> None:
    scheduler = wrapped(name, index, steps=3)
    sample, times = noise(scheduler), scheduler.timesteps
    with pytest.raises(ValueError, match=r"`timestep` must be one of the schedule's, got 1234\.0"):
        scheduler.step(sample, 1234, sample)
    scheduler.step(sample, times[0], sample)
    for wrong in (times[0], times[2]):
        with pytest.raises(
            ValueError, match=rf"`timestep` must be {float(times[1])}, .*, got {float(wrong)}"
        ):
            scheduler.step(sample, wrong, sample)
    for t in times[1:]:
        scheduler.step(sample, t, sample)
    with pytest.raises(ValueError, match=r"`timestep` must be of a new run .*: all 3 steps were made"):
        scheduler.step(sample, times[0], sample)
    scheduler.set_timesteps(3)
    scheduler.step(sample, times[0], sample)


def test_latents_without_a_decoder_are_refused(index: amg.Index) -> None:
    scheduler = amg.AMGScheduler(diffusers.DDIMScheduler(), index, config())
    scheduler.set_timesteps(4)
    latents = torch.randn(2, 4, 8, 8)
    message = r"`decode` must be given for samples that are no pictures .*got samples \[2, 4, 8, 8\]"
    with pytest.raises(ValueError, match=message):
        scheduler.step(latents, scheduler.timesteps[0], latents)
    with pytest.raises(ValueError, match=message):
        scheduler.begin(latents)


def test_what_is_refused(index: amg.Index) -> None:
    with pytest.raises(ValueError, match=r"`guidance_interval` must be \(0\.0, 1\.0\).*got \(0\.2, 0\.8\)"):
        amg.AMGScheduler(diffusers.DDIMScheduler(), index, config(guidance_interval=(0.2, 0.8)))
    scheduler = wrapped("ddim", index)
    sample, times = noise(scheduler), scheduler.timesteps
    with pytest.raises(ValueError, match="`model_output` must be shaped like `sample`"):
        scheduler.step((sample[:1], sample), times[0], sample)
    with pytest.raises(
        FloatingPointError, match=r"`output` must be finite, got NaN or infinity in rows \[3\]"
    ):
        scheduler.step(
            (sample, sample.clone().index_fill_(0, torch.tensor([1]), torch.nan)), times[0], sample
        )
    scheduler.step(sample, times[0], sample)
    with pytest.raises(ValueError, match="`sample` must have 2 rows as in the steps before, got 1"):
        scheduler.step(sample[:1], times[1], sample[:1])


def test_a_scale_of_one_is_said_to_the_loop(index: amg.Index) -> None:
    scheduler = amg.AMGScheduler(
        CASES["ddim"].make(), index, amg.AMGConfig.preset("main", guidance_scale=1.0)
    )
    scheduler.set_timesteps(STEPS)
    sample = noise(scheduler)
    with pytest.warns(UserWarning, match=r"`guidance_scale` is 1\.0") as said:
        scheduler.step((sample, sample), scheduler.timesteps[0], sample)
    assert [one.filename for one in said] == [__file__]


def test_the_networks_gradient_is_refused(index: amg.Index) -> None:
    scheduler = wrapped("ddim", index, {**OPEN, "gradient": "full"})
    with pytest.raises(ValueError, match=r'`gradient="full"` needs the network'):
        walk(scheduler, noise(scheduler), scheduler.timesteps)
