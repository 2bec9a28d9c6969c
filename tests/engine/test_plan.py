"""The kernel's coefficients are the scheduler's table; what the host knows of each step is the config's."""

import math

import pytest
import torch

import amg.kernels
from amg.config import AMGConfig
from amg.engine.frame import COLUMN
from amg.engine.plan import coefficient_rows
from amg.engine.restart import latest
from amg.guidance.gate import Gate, Rule
from amg.guidance.schedule import LEAST_ALPHA_BAR

from . import flying
from .schedulers import CASES

STEPS = 9


def starts(course):
    """The first step, and one that a run can start again from."""
    return sorted({0, latest(course.setting.scheduler, 3, course.setting.step_arguments)})


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_with_a_plan_s_rows_makes_the_table_s_steps(name):
    """Whole runs in float64, from the first step and from a later one; coefficients are float32."""
    course = flying.course(name, STEPS)
    for start in starts(course):
        table = flying.TABLES.table(course.setting, start)
        rows, generator = coefficient_rows(table, 4.0), torch.Generator().manual_seed(2)
        assert rows.dtype == torch.float32 and rows.shape == (len(table), 42)
        x = torch.randn(2, *flying.SHAPE, generator=generator, dtype=torch.float64)
        x = x * math.hypot(float(table.alpha[0]), float(table.sigma[0]))
        state = expected_state = table.blank(x)
        for row in range(len(table)):
            uncond, cond, noise = torch.randn(3, *x.shape, generator=generator, dtype=torch.float64)
            output = uncond + 4.0 * (cond - uncond)
            expected, expected_state = table.advance(row, x, output, noise, expected_state)
            after, x0_hat, state = torch.empty_like(x), torch.empty_like(x), state.clone()
            coefficients = rows[row].double().expand(2, -1).contiguous()
            amg.kernels.guided_step_into(
                x, uncond, cond, coefficients=coefficients, noise=noise, state=state if len(state) else None,
                prev_sample=after, x0_hat=x0_hat, impl="reference",
            )  # fmt: skip
            size = float(expected.abs().max())
            assert float((after - expected).abs().max()) <= 2e-6 * size, row
            assert torch.allclose(state, expected_state, rtol=2e-6, atol=2e-6 * size), row
            wanted = table.x0_hat(row, x, output)
            if float(table.alpha[row]) ** 2 > LEAST_ALPHA_BAR:
                assert float((x0_hat - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), row
            x = expected


def test_where_there_is_no_signal_the_prediction_is_of_the_least_signal():
    """alpha = 0: no x0_hat follows from eps, and the floor's coefficients are finite."""
    course = flying.course("euler-zero-snr", STEPS)
    rows = coefficient_rows(flying.TABLES.table(course.setting, 0), 4.0)
    assert rows[:, [COLUMN["a"], COLUMN["b"], COLUMN["inv_sqrt_alpha_bar"]]].isfinite().all()
    assert float(rows[:, COLUMN["inv_sqrt_alpha_bar"]].max()) <= LEAST_ALPHA_BAR**-0.5 * 1.001


def config(**more):
    options = {"check_at": (0.5,), "rewind_at": (0.9,), "rewind_threshold": 0.5, **more}
    return AMGConfig.preset("main", **options).for_metric("cosine")


def test_the_host_looks_at_checks_checkpoints_and_where_a_calibration_listens():
    course = flying.course("ddim", 11)
    assert [row for row, is_ in enumerate(course.plan(config()).attended) if is_] == [5, 9]
    assert all(course.plan(config(check_at=())).attended)
    assert not any(course.plan(flying.OFF).attended)
    rule = Rule("gap", 1.0, 0.0)
    heard = flying.course("ddim", 11, gate=Gate(rules={5: rule}, alarm={2: rule})).plan(config())
    assert [row for row, is_ in enumerate(heard.attended) if is_] == [2, 5, 9]
    later = course.plan(config(), 4)
    assert [row for row, is_ in enumerate(later.attended) if is_] == [1, 5]
    assert (later.start, later.total, later.steps[0].position) == (4, 11, 4)


def test_the_interval_is_of_the_whole_run_and_its_ends_are_events():
    """[0.2, 0.6] of steps 0 to 10 is 2 to 6; an alarm at step 0 reads the unconditional half there."""
    asked = config(guidance_interval=(0.2, 0.6))
    plan = flying.course("ddim", 11).plan(asked)
    assert [row for row, half in enumerate(plan.halves) if half] == [2, 3, 4, 5, 6]
    assert plan.events == (2, 5, 7, 9, 10)
    gate = Gate(alarm={0: Rule("gap", 1.0, 0.0)})
    plan = flying.course("ddim", 11, gate=gate).plan(asked)
    assert [row for row, half in enumerate(plan.halves) if half] == [0, 2, 3, 4, 5, 6]
    assert plan.events == (0, 1, 2, 5, 7, 9, 10)
    later = flying.course("ddim", 11).plan(asked, 4)
    assert [row for row, half in enumerate(later.halves) if half] == [0, 1, 2]


@pytest.mark.parametrize("name", CASES)
def test_a_later_start_is_where_the_scheduler_can_and_as_large_as_x_is_there(name):
    course = flying.course(name, 11)
    plan = course.again(config(rewind_to=0.3), 11)
    total = len(course.setting.scheduler.timesteps)
    wanted = round(0.3 * 10)
    assert plan.start == latest(course.setting.scheduler, wanted, course.setting.step_arguments) <= wanted
    table = flying.TABLES.table(course.setting, 0)
    size = math.hypot(float(table.alpha[plan.start]), float(table.sigma[plan.start]))
    assert plan.size == pytest.approx(size, rel=1e-9)
    assert plan.total == total and course.again(config(rewind_to=0.3), 11) is plan, "made once"
