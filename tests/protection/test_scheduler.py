"""`AMGScheduler` in somebody's own loop: one fused call a step, and what the wrapped scheduler would do."""

import copy
import inspect
from pathlib import Path

import diffusers
import pytest
import torch

import amg
import amg.protection.fused as fused

from .. import toy

STEPS = 10
SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDIMScheduler clipped": {"clip_sample": True},
    "DDPMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
}
CLOSED = {"lambda_min": 0.0, "lambda_max": 0.0, "check_at": (), "on_memorized": "flag"}
OPEN = {"lambda_min": -2.0, "lambda_max": -2.0, "check_at": (), "terms_from": 0.0, "on_memorized": "flag"}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return toy.build("nl2", Path(tmp_path_factory.mktemp("wrapped")) / "index")


def make(name, **more):
    kind = getattr(diffusers, name.split()[0])
    scheduler = kind(
        beta_start=0.0008, beta_end=0.012, beta_schedule="scaled_linear", **SCHEDULERS[name], **more
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def network(model_input, t):
    """Two halves, neither linear in its input."""
    uncond = torch.tanh(1.3 * model_input.flip(-1) + float(t) / 1000)
    return uncond, uncond + 0.1 * torch.sin(3 * model_input)


def start(scheduler, seed=0):
    noise = torch.randn(2, 3, toy.SIZE, toy.SIZE, generator=torch.Generator().manual_seed(seed))
    return noise * float(scheduler.init_noise_sigma)


def run(scheduler, sample, timesteps, scale=3.0, generator=None, wrapped=False):
    found = []
    for t in timesteps:
        model_input = scheduler.scale_model_input(sample, t)
        uncond, cond = network(model_input, t)
        output = (uncond, cond) if wrapped else uncond + scale * (cond - uncond)
        more = {}
        if generator is not None and "generator" in inspect.signature(scheduler.step).parameters:
            more["generator"] = generator
        sample = scheduler.step(output, t, sample, **more).prev_sample
        found.append(sample)
    return found


def wrapped(name, index, options, **more):
    config = amg.AMGConfig.preset("main", guidance_scale=3.0, rewind_at=(), **options)
    return amg.AMGScheduler(make(name, **more), index, config)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_closed_gates_make_the_scheduler_s_own_steps(name, index):
    own = make(name)
    expected = run(own, start(own), own.timesteps, generator=torch.Generator().manual_seed(3))
    ours = wrapped(name, index, CLOSED)
    found = run(ours, start(own), ours.timesteps, generator=torch.Generator().manual_seed(3), wrapped=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_open_gates_equal_guiding_and_then_stepping(name, index, monkeypatch):
    ours = wrapped(name, index, OPEN)
    sample = start(ours.scheduler)
    found = run(ours, sample, ours.timesteps, generator=torch.Generator().manual_seed(3), wrapped=True)
    assert all("dissimilarity" in step.terms for step in ours._flights[0].trace[2:])
    monkeypatch.setattr(fused.Fused, "begun", staticmethod(lambda *arguments: None))
    apart = wrapped(name, index, OPEN)
    expected = run(apart, sample, apart.timesteps, generator=torch.Generator().manual_seed(3), wrapped=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 2e-5 * max(1.0, float(theirs.abs().max()))


def test_one_call_of_the_kernel_a_step(index, monkeypatch):
    ours, calls = wrapped("DPMSolverMultistepScheduler", index, {**CLOSED, "check_at": (1.0,)}), []
    kernel = fused.kernels.guided_step_into

    def counted(*arguments, **options):
        calls.append(1)
        kernel(*arguments, **options)

    monkeypatch.setattr(fused.kernels, "guided_step_into", counted)
    run(ours, start(ours.scheduler), ours.timesteps[:-1], wrapped=True)
    assert len(calls) == STEPS - 1
    assert [len(one.trace) for one in ours._flights] == [STEPS - 1] * 2
    assert [one.evaluations for one in ours._flights] == [2 * (STEPS - 1)] * 2


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_loop_that_starts_late(name, index):
    own, late = make(name), make(name).timesteps[4:]
    own.set_begin_index(4) if hasattr(own, "set_begin_index") else None
    sample = start(own) * 0.3
    expected = run(own, sample, late)
    ours = wrapped(name, index, CLOSED)
    found = run(ours, sample, late, wrapped=True)
    assert (found[0] - expected[0]).abs().max() <= 1e-5
    assert (found[-1] - expected[-1]).abs().max() <= 1e-5
    assert ours._flights[0].trace[0].step == 4


def test_copies_in_the_middle_go_on_alone(index):
    ours = wrapped("DPMSolverMultistepScheduler", index, CLOSED)
    sample = run(ours, start(ours.scheduler), ours.timesteps[:5], wrapped=True)[-1]
    other = copy.deepcopy(ours)
    first = run(ours, sample, ours.timesteps[5:], wrapped=True)
    second = run(other, sample, other.timesteps[5:], wrapped=True)
    assert torch.equal(first[-1], second[-1])
    assert len(ours._flights[0].trace) == len(other._flights[0].trace) == STEPS


def test_pipelines_see_the_scheduler_s_own_arguments(index):
    ours = wrapped("DDIMScheduler", index, CLOSED)
    assert inspect.signature(ours.step) == inspect.signature(ours.scheduler.step)
    sample, t = start(ours.scheduler), ours.timesteps[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'etta'"):
        ours.step(network(sample, t), t, sample, etta=1.0)
    out = ours.step(network(sample, t), t, sample, eta=0.0, return_dict=False)
    assert isinstance(out, tuple) and len(out) == 2


@pytest.mark.parametrize("at", [0, 2])
def test_timesteps_out_of_order_are_refused(index, at):
    ours = wrapped("DDIMScheduler", index, CLOSED)
    sample, t = start(ours.scheduler), ours.timesteps
    sample = ours.step(network(sample, t[0]), t[0], sample).prev_sample
    with pytest.raises(ValueError, match=r"`timestep` must be the next of the schedule, .*, got"):
        ours.step(network(sample, t[at]), t[at], sample)
    with pytest.raises(ValueError, match="`timestep` must be one of the schedule's 10, got 7"):
        ours.set_timesteps(STEPS)
        ours.step(network(sample, 7), 7, sample)


def test_a_scheduler_without_a_table_makes_its_own_step(index):
    name = "DDIMScheduler"
    own = make(name, thresholding=True, sample_max_value=1.0)
    expected = run(own, start(own), own.timesteps)
    ours = wrapped(name, index, CLOSED, thresholding=True, sample_max_value=1.0)
    found = run(ours, start(own), ours.timesteps, wrapped=True)
    assert ours._fused is None and torch.equal(found[-1], expected[-1])


def test_a_guidance_interval_is_refused(index):
    with pytest.raises(ValueError, match=r"`guidance_interval` must be \(0, 1\).*got \(0.0, 0.7\)"):
        wrapped("DDIMScheduler", index, {**CLOSED, "guidance_interval": (0.0, 0.7)})
