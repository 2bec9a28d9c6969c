"""guided_step's Triton kernels where they differ from the C++ ones: blocks, bf16, bits."""

from dataclasses import replace

import pytest
import torch

import amg.kernels as kernels
from amg.kernels.guided_step import triton as launchers

from ..step_inputs import assert_within_twice_eager, in_float64, make_inputs, run
from ..whole_step import assert_equals_oracle, make_step
from ..whole_step import run as run_whole

BLOCK = launchers.BLOCK
TENSORS = ("sample", "eps_uncond", "eps_cond", "eps_neighbour", "similarity_grad", "noise")


@pytest.mark.parametrize(
    "size",
    [
        *(1, 15, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 16),
        *(launchers.WHOLE_BLOCK + 1, launchers.ONE_PROGRAM, launchers.ONE_PROGRAM + 1),
        launchers.SUM_PROGRAMS * BLOCK + 5,
    ],
)
def test_block_edges(size):
    """An element missed or counted twice moves a sum by far more than these tolerances."""
    inputs = make_inputs(torch.float32, (2, 1, 1, size))
    for output, truth in zip(run(inputs, "triton"), in_float64(inputs), strict=True):
        torch.testing.assert_close(output.double(), truth, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("states", [0, 1, 3])
@pytest.mark.parametrize("size", [launchers.ONE_PROGRAM, launchers.ONE_PROGRAM + 1])
def test_engine_steps_at_block_edges(size, states):
    step = make_step(of_sample=(size,), states=states)
    assert_equals_oracle(run_whole(step, "triton"), step)


def test_flags_of_samples_of_several_programs():
    step = make_step(of_sample=(launchers.ONE_PROGRAM + BLOCK,))
    step.noise[1, -1] = torch.nan
    for update, flags in ((True, [0, 1, 0, 0, 0]), (False, [0] * 5)):
        assert run_whole(step, "triton", update).flags.tolist() == flags
        assert run_whole(step, "triton", update, signals=None).flags.tolist() == flags


def test_every_term_is_its_own():
    """One coefficient row a sample, each with one term alone, so that none can stand in for another."""
    inputs = make_inputs(torch.float32, (5, 4, 8, 8))
    rows = inputs.coefficients.repeat(5, 1)
    rows[:, 5] = torch.tensor([-1.0, -1.0, -1.0, 0.4, 2.0])  # open, open, open, at its threshold, closed
    rows[:, 7:] = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 20.0], [2.0, 3, 4], [2.0, 3, 4]])
    inputs = replace(inputs, coefficients=rows)
    assert_within_twice_eager(run(inputs, "triton"), inputs)


@pytest.mark.parametrize("size", [100, 2 * BLOCK + 7])
def test_bf16_is_fp32_arithmetic_rounded_once(size):
    """The interpreter truncates where a GPU rounds to nearest, so the fp32 result is truncated here too."""
    inputs = make_inputs(torch.bfloat16, (3, 1, 1, size))
    wide = replace(inputs, **{name: getattr(inputs, name).float() for name in TENSORS})
    narrow, exact = run(inputs, "triton"), run(wide, "triton")
    for name in ("prev_sample", "x0_hat"):
        truncated = (getattr(exact, name).view(torch.int32) >> 16 << 16).view(torch.float32)
        assert torch.equal(getattr(narrow, name).float(), truncated)
    assert torch.equal(narrow.signals, exact.signals)


def test_the_same_bits_twice():
    inputs = make_inputs(torch.float16, (3, 4, 40, 40))
    for first, second in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8)])
def test_predict_x0_of_nothing(shape):
    inputs = make_inputs(torch.float32, shape)
    tensors = (inputs.sample, inputs.eps_uncond, inputs.eps_cond)
    output = kernels.predict_x0(*tensors, coefficients=inputs.coefficients, impl="triton")
    assert output.x0_hat.shape == shape and output.signals.shape == (shape[0], 3)
    assert not output.signals.any()


def test_the_default_on_cpu_is_not_the_interpreter():
    inputs = make_inputs(torch.float32)
    assert kernels.dispatch.default_impl("guided_step_into", inputs.sample) in ("cpp", "reference")
