"""A table does what its scheduler does: replayed against the real one, whose noise is written down."""

import dataclasses
import math
import threading
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from amg.engine.drive import Drawn
from amg.engine.restart import latest, restarts
from amg.engine.table import Refused, StepTable, Tables, tabulate

from .schedulers import BETAS, CASES, Case

FLOAT64_TOLERANCE = 1e-5
FLOAT32_TOLERANCE = 2e-6  # of the sample's size, over a whole trajectory in float32
ROUGH = {"euler-zero-snr": 1e-5}  # x starts at 4096 times its last size: the scheduler itself cancels
MIXING = torch.randn(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 4


def network(model_input: Tensor, t: Any) -> Tensor:
    """Not linear, and no two pixels alike."""
    mixed = model_input.flatten(2) @ MIXING.to(model_input.dtype)
    return torch.tanh(mixed + math.sin(0.01 * float(t))).view_as(model_input)


def normal(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def timed(case: Case, steps: int) -> Any:
    scheduler = case.make()
    scheduler.set_timesteps(steps, **case.times)
    return scheduler


def start_of(table: StepTable, dtype: torch.dtype) -> Tensor:
    return normal(0, dtype) * math.hypot(float(table.alpha[0]), float(table.sigma[0]))


def by_scheduler(scheduler: Any, start: int, sample: Tensor, step: dict) -> list[Tensor]:
    """The scheduler's own loop, as in a pipeline: the samples before each step, and the last."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    given = step
    if "generator" in type(scheduler).step.__code__.co_varnames:
        given = {**step, "generator": torch.Generator().manual_seed(5)}
    samples = [sample]
    for t in scheduler.timesteps[start:]:
        scale = getattr(scheduler, "scale_model_input", None)
        output = network(scale(sample, t) if scale else sample, t)
        sample = scheduler.step(output, t, sample, **given, return_dict=False)[0]
        samples.append(sample)
    return samples


def by_table(table: StepTable, sample: Tensor) -> list[Tensor]:
    generator, state, samples = torch.Generator().manual_seed(5), table.blank(sample), [sample]
    for row in range(len(table)):
        noise = None
        if table.draws[row]:
            noise = torch.randn(sample.shape, generator=generator, dtype=table.noise_dtype or sample.dtype)
        output = network(float(table.input_scale[row]) * sample, table.t[row])
        sample, state = table.advance(row, sample, output, noise, state)
        samples.append(sample)
    return samples


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of a whole trajectory, of the sample's size, at least 1."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


def require_replay(name: str, steps: int, start: int) -> StepTable:
    case = CASES[name]
    table = tabulate(case.make(), start, num_inference_steps=steps, step_arguments=case.step, **case.times)
    assert len(table) == len(timed(case, steps).timesteps) - start
    assert table.states <= 3
    single = name.startswith("unipc")  # it solves in float32 and takes nothing else
    for dtype in (torch.float32,) if single else (torch.float32, torch.float64):
        sample = start_of(table, dtype)
        expected = by_scheduler(timed(case, steps), start, sample, case.step)
        tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else FLOAT64_TOLERANCE
        assert distance(by_table(table, sample), expected) <= max(tolerance, ROUGH.get(name, 0.0))
    return table


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("name", list(CASES))
def test_a_table_replays_its_scheduler(name: str, steps: int) -> None:
    require_replay(name, steps, 0)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("pndm", "lms"))])
def test_a_restart_replays_the_scheduler_started_there(name: str) -> None:
    table = require_replay(name, 20, 6)
    whole = tabulate(
        CASES[name].make(), num_inference_steps=20, step_arguments=CASES[name].step, **CASES[name].times
    )
    torch.testing.assert_close(table.alpha, whole.alpha[6:])
    torch.testing.assert_close(table.sigma, whole.sigma[6:])
    if name in ("dpm2m", "dpm3m", "unipc", "deis"):  # warm-up orders of its own
        assert not torch.allclose(table.d[0], whole.d[6], atol=1e-3)


@pytest.mark.parametrize("name", ["dpm2m-karras", "unipc-karras", "heun", "pndm"])
def test_steps_are_counted_where_timesteps_repeat(name: str) -> None:
    table = require_replay(name, 100 if name.endswith("karras") else 20, 0)
    assert len(set(table.t.tolist())) < len(table)


@pytest.mark.parametrize("name", list(CASES))
def test_an_exact_network_is_read_as_x0(name: str) -> None:
    """alpha, sigma, a and b against their meaning, in the scheduler's parameterisation."""
    case, x0, eps = CASES[name], normal(1, torch.float64), normal(2, torch.float64)
    table = tabulate(case.make(), num_inference_steps=20, step_arguments=case.step, **case.times)
    for row in range(len(table)):
        alpha, sigma = float(table.alpha[row]), float(table.sigma[row])
        size = math.hypot(alpha, sigma)
        outputs = {
            "epsilon": eps,
            "sample": x0,
            "flow": eps - x0,
            "v_prediction": (alpha * eps - sigma * x0) / size,
        }
        sample = alpha * x0 + sigma * eps
        found = table.x0_hat(row, sample, outputs[table.kind])
        torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)
        if table.kind != "flow":  # the network's input is variance preserving
            assert float(table.input_scale[row]) * size == pytest.approx(1, abs=1e-6)


def test_x0_hat_is_the_schedulers_own() -> None:
    """Against `pred_original_sample`, where a scheduler gives one: at second calls, too."""
    for name in (
        "ddpm",
        "ddim-zero-snr",
        "euler-v-karras",
        "euler-a",
        "heun",
        "kdpm2",
        "kdpm2-a-exponential",
        "lms",
    ):
        case, sample = CASES[name], normal(0, torch.float64)
        table, scheduler = tabulate(case.make(), num_inference_steps=20), timed(case, 20)
        for row, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(sample, t), t)
            result = scheduler.step(output, t, sample)
            found = table.x0_hat(row, sample, output)
            torch.testing.assert_close(found, result.pred_original_sample.double(), rtol=1e-5, atol=1e-5)
            sample = result.prev_sample


def test_draws_are_counted_where_their_weight_is_zero_too() -> None:
    def draws(name: str) -> tuple[int, ...]:
        return tabulate(CASES[name].make(), num_inference_steps=5, step_arguments=CASES[name].step).draws

    assert draws("ddim") == (0, 0, 0, 0, 0)
    assert draws("ddpm") == (1, 1, 1, 1, 0)
    assert draws("lcm") == (1, 1, 1, 1, 0)
    assert draws("ddim-eta-clip") == draws("euler-a") == draws("flow-stochastic") == (1, 1, 1, 1, 1)
    assert draws("kdpm2-a") == (0, 1, 0, 1, 0, 1, 0, 1, 0)
    euler_a = tabulate(CASES["euler-a"].make(), num_inference_steps=5)
    assert float(euler_a.d[-1, 3]) == 0 and euler_a.noise_dtype is None
    multistep = tabulate(CASES["dpm-sde"].make(), num_inference_steps=5)
    assert multistep.noise_dtype == torch.float32  # whatever the output's dtype is


def test_euler_and_ddim_have_the_published_coefficients() -> None:
    """Karras et al. 2022, algorithm 2 without churn; Song et al. 2021, eq. 12."""
    euler = tabulate(CASES["euler"].make(), num_inference_steps=10)
    after = torch.cat([euler.sigma[1:], euler.sigma.new_zeros(1)])
    torch.testing.assert_close(euler.d[:, 0], torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(euler.d[:, 1], after - euler.sigma, rtol=1e-6, atol=1e-6)
    ddim = tabulate(CASES["ddim"].make(), num_inference_steps=10)
    ratio = ddim.alpha[1:] / ddim.alpha[:-1]
    torch.testing.assert_close(ddim.d[:-1, 0], ratio, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ddim.d[:-1, 1], ddim.sigma[1:] - ratio * ddim.sigma[:-1], rtol=1e-6, atol=1e-6)
    assert ddim.states == euler.states == 0 and ddim.clip is None


def test_custom_timesteps_and_sigmas_are_the_schedulers() -> None:
    given = [900, 700, 500, 200, 30]
    table = tabulate(diffusers.DDPMScheduler(clip_sample=False), timesteps=given)
    assert table.t.tolist() == given
    sigmas = [10.0, 3.0, 0.5]
    euler = tabulate(diffusers.EulerDiscreteScheduler(**BETAS), sigmas=[*sigmas, 0.0])
    torch.testing.assert_close(euler.sigma[:3], torch.tensor(sigmas, dtype=torch.float64))
    flow = tabulate(diffusers.FlowMatchEulerDiscreteScheduler(), sigmas=[1.0, 0.6, 0.2])
    torch.testing.assert_close(flow.alpha, torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64))


def test_without_arguments_the_timesteps_are_those_set() -> None:
    case = CASES["dpm2m"]
    scheduler = timed(case, 20)
    given = tabulate(case.make(), num_inference_steps=20)
    torch.testing.assert_close(tabulate(scheduler).d, given.d)
    sample = normal(0, torch.float32)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    with pytest.raises(ValueError, match="`num_inference_steps`, `timesteps` or `sigmas` must be given"):
        tabulate(case.make())


REFUSALS = {
    "prk": (Case("PNDMScheduler", BETAS), "PNDMScheduler: its steps need 5 states"),
    "thresholding": (Case("DDIMScheduler", {"thresholding": True}), "DDIMScheduler: dynamic thresholding"),
    "learned": (
        Case("DDPMScheduler", {"variance_type": "learned_range"}),
        "DDPMScheduler: its variance is learned",
    ),
    "ipndm": (Case("IPNDMScheduler", {}), "IPNDMScheduler: it has neither `sigmas` nor `alphas_cumprod`"),
    "edm": (Case("EDMEulerScheduler", {}), "EDMEulerScheduler: it scales the network's input by 0.0124998"),
    "edm-1": (Case("EDMEulerScheduler", {"sigma_data": 1.0}), "EDMEulerScheduler: its x0_hat at step 0 is"),
    "edm-multistep": (
        Case("EDMDPMSolverMultistepScheduler", {}),
        "EDMDPMSolverMultistepScheduler: it scales",
    ),
    "consistency": (Case("CMStochasticIterativeScheduler", {}), "CMStochasticIterativeScheduler: it scales"),
    "churn": (
        Case("EulerDiscreteScheduler", BETAS, step={"s_churn": 5.0}),
        "EulerDiscreteScheduler: its x0_hat",
    ),
    "infinite": (
        Case("DDIMScheduler", {**CASES["ddim-zero-snr"].config, "prediction_type": "epsilon"}),
        "DDIMScheduler: no x0_hat follows from eps where alpha is 0",
    ),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_what_is_no_table_is_refused_by_name(name: str) -> None:
    case, reason = REFUSALS[name]
    with pytest.raises(
        Refused, match=f"^`scheduler` must be one whose steps are linear, .*, got {reason}"
    ) as error:
        tabulate(case.make(), num_inference_steps=20, step_arguments=case.step)
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)


def test_arguments_are_refused_by_name() -> None:
    scheduler = CASES["ddim"].make()
    with pytest.raises(ValueError, match="`start` must be a step, 0 to 9, got 10"):
        tabulate(scheduler, 10, num_inference_steps=10)
    with pytest.raises(ValueError, match=r"`step_arguments` must be of DDIMScheduler\.step, got 's_churn'"):
        tabulate(scheduler, num_inference_steps=10, step_arguments={"s_churn": 1.0})


class Blend:
    """A user's own: DDIM in three lines, its last two outputs averaged; no config, no base class."""

    def __init__(self, bend: float = 0.0, twice: bool = False):
        self.alphas_cumprod = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
        self.bend, self.twice, self.kept = bend, twice, None

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.linspace(99, 0, num_inference_steps).round().long()
        self.kept, self.place = None, 0

    def step(self, output: Tensor, t: Tensor, sample: Tensor) -> tuple[Tensor]:
        at = int(torch.nonzero(self.timesteps == t)[0])
        after = self.timesteps[at + 1] if at + 1 < len(self.timesteps) else self.timesteps[at]
        now, then = self.alphas_cumprod[t], self.alphas_cumprod[after]
        mean = output if self.kept is None else (output + self.kept) / 2
        self.kept = output
        x0_hat = (sample - (1 - now).sqrt() * mean) / now.sqrt()
        noise = torch.randn_like(sample) + (torch.randn(sample.shape) if self.twice else 0)
        x0_hat = x0_hat + self.bend * x0_hat**2
        return (then.sqrt() * x0_hat + (1 - then).sqrt() * (mean * 0.8 + noise * 0.6),)


def test_a_scheduler_of_ones_own_is_a_table() -> None:
    table = tabulate(Blend(), num_inference_steps=10)
    assert (table.scheduler, table.kind, table.states, set(table.draws)) == ("Blend", "epsilon", 1, {1})
    scheduler, sample = Blend(), normal(0, torch.float64)
    scheduler.set_timesteps(10)
    torch.manual_seed(5)
    expected = [sample]
    for t in scheduler.timesteps:
        expected.append(scheduler.step(network(expected[-1], t), t, expected[-1])[0])
    assert distance(by_table(table, sample), expected) < 1e-9
    with pytest.raises(Refused, match="Blend: its table strays from it by"):
        tabulate(Blend(bend=0.01), num_inference_steps=10)
    with pytest.raises(Refused, match="Blend: it draws noise more than once in a step"):
        tabulate(Blend(twice=True), num_inference_steps=10)


RESTARTS = {
    "ddim": [*range(20)],
    "ddim-linspace": [*range(20)],
    "ddpm-large": [*range(20)],
    "euler-a": [*range(20)],
    "dpm3m": [*range(20)],
    "dpm-sde": [*range(20)],
    "unipc3": [*range(20)],
    "deis": [*range(20)],
    "flow-mu": [*range(20)],
    "single-sde": [0, *range(2, 20, 2), 19],
    "heun": [*range(0, 39, 2)],
    "kdpm2": [*range(0, 39, 2)],
    "kdpm2-a": [*range(0, 39, 2)],
    "flow-heun": [*range(0, 39, 2)],
    "lms": [0],
    "pndm": [0, 19, 20],  # at t = 1 there is nothing left to warm up for
}


@pytest.mark.parametrize("name", list(RESTARTS))
def test_restarts_land_on_whole_steps_that_need_no_history(name: str) -> None:
    case = CASES[name]
    found = restarts(case.make(), num_inference_steps=20, step_arguments=case.step, **case.times)
    assert list(found) == RESTARTS[name]
    assert restarts(timed(case, 20), (5, 6), step_arguments=case.step) == tuple({5, 6} & {*found})
    for wanted in (0, 5, 6):
        assert latest(timed(case, 20), wanted, case.step) == max(step for step in found if step <= wanted)


@pytest.mark.parametrize("name", ["dpm3m", "unipc", "deis", "single", "heun", "lms", "pndm", "kdpm2"])
def test_a_wrong_restart_leaves_the_line(name: str) -> None:
    """The free run of an exact network from every step: on the line where a restart is admitted, off by 0.01
    and more where not."""
    case = CASES[name]
    x0, eps = normal(1, torch.float32), normal(2, torch.float32)
    whole = tabulate(case.make(), num_inference_steps=20)
    admitted = restarts(case.make(), num_inference_steps=20)
    for start in range(len(whole) - 4):
        table = tabulate(case.make(), start, num_inference_steps=20)
        sample, state, off = whole.alpha[start] * x0 + whole.sigma[start] * eps, None, 0.0
        for row, place in enumerate(range(start, len(whole))):
            line = (whole.alpha[place] * x0 + whole.sigma[place] * eps).float()
            off = max(off, float((sample - line).abs().max() / line.abs().max()))
            state = table.blank(sample) if state is None else state
            sample, state = table.advance(row, sample.float(), eps, None, state)
        moved = abs(float(table.sigma[0] - whole.sigma[start]))
        assert (off < 1e-4 and moved < 1e-4) if start in admitted else (off > 0.01 or moved > 0.01), (
            start,
            off,
        )


def test_noise_is_caught_on_this_thread_alone() -> None:
    """Another thread draws what its seed says all the while, and nothing is left behind."""
    seeded = torch.Generator().manual_seed(1)
    expected = torch.randn(4, generator=seeded)
    entered, leave, found = threading.Event(), threading.Event(), list[Tensor]()

    def inside() -> None:
        with Drawn(torch.zeros(4)) as drawn:
            entered.set()
            leave.wait(10)
            found.extend([torch.randn(4), torch.randn_like(torch.ones(4, dtype=torch.float64))])
        assert drawn.dtypes == [torch.float32, torch.float64]

    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(10)
    drawn = torch.randn(4, generator=torch.Generator().manual_seed(1))
    leave.set()
    thread.join()
    assert torch.equal(drawn, expected) and all(not one.any() for one in found)
    assert torch.equal(torch.randn(4, generator=torch.Generator().manual_seed(1)), expected)


def test_tables_made_on_many_threads_are_equal() -> None:
    case, found = CASES["kdpm2-a"], list[StepTable]()
    threads = [
        threading.Thread(target=lambda: found.append(tabulate(case.make(), num_inference_steps=20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = tabulate(case.make(), num_inference_steps=20)
    assert len(found) == 4
    for table in found:
        assert all(torch.equal(getattr(table, part), getattr(expected, part)) for part in "dhAB")


def test_a_table_is_made_beside_everything_else() -> None:
    """No random number of the caller's is used, and its modes leave no trace."""
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    with torch.inference_mode(), torch.autocast("cpu"):
        table = tabulate(CASES["unipc"].make(), num_inference_steps=10)
    assert torch.equal(torch.randn(3), expected)
    plain = tabulate(CASES["unipc"].make(), num_inference_steps=10)
    for part in dataclasses.fields(StepTable):
        value = getattr(table, part.name)
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(plain, part.name)) and not value.is_inference()


def test_tables_are_made_once_for_equal_settings() -> None:
    tables = Tables()
    first = tables(CASES["dpm2m"].make(), num_inference_steps=10)
    assert tables(timed(CASES["dpm2m"], 10)) is first  # however its timesteps came to be
    others = [
        tables(CASES["dpm2m"].make(), 3, num_inference_steps=10),
        tables(CASES["dpm2m"].make(), num_inference_steps=11),
        tables(CASES["dpm2m-karras"].make(), num_inference_steps=10),
        tables(CASES["dpm3m"].make(), num_inference_steps=10),
        tables(CASES["ddim"].make(), num_inference_steps=10),
        tables(CASES["ddim"].make(), num_inference_steps=10, step_arguments={"eta": 1.0}),
    ]
    assert len({id(table) for table in (first, *others)}) == 7
    altered = CASES["ddim"].make()
    altered.alphas_cumprod = altered.alphas_cumprod**2  # no part of its config
    assert not torch.equal(tables(altered, num_inference_steps=10).alpha, others[4].alpha)
    assert Tables()(CASES["dpm2m"].make(), num_inference_steps=10) is not first
