"""guided_step's Triton kernels where they differ from the C++ ones: blocks, a non-finite σ, bf16, bits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.guided_step import triton as launchers

from ..step_inputs import assert_within_twice_eager, in_float64, make_inputs, run

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


def test_every_term_is_its_own():
    """One coefficient row a sample, each with one term alone, so that none can stand in for another."""
    inputs = make_inputs(torch.float32, (5, 4, 8, 8))
    rows = inputs.coefficients.repeat(5, 1)
    rows[:, 5] = torch.tensor([-1.0, -1.0, -1.0, 0.4, 2.0])  # open, open, open, at its threshold, closed
    rows[:, 7:] = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 20.0], [2.0, 3, 4], [2.0, 3, 4]])
    inputs = replace(inputs, coefficients=rows)
    assert_within_twice_eager(run(inputs, "triton"), inputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_similarity_spoils_its_own_sample_only(value):
    """The launcher is called directly: on CPU the op refuses such a similarity, on a GPU it cannot look."""
    inputs = make_inputs(torch.float32)
    similarity = inputs.similarity.clone()
    similarity[1] = value
    clean, spoilt = (launch(inputs, sigma) for sigma in (inputs.similarity, similarity))
    for before, after in zip(clean, spoilt, strict=True):
        rest = torch.tensor([0, 2, 3, 4])
        assert torch.equal(before[rest], after[rest])
    assert spoilt[0][1].isnan().all() and spoilt[1][1].isnan().all()
    assert torch.equal(spoilt[2][1, :3], clean[2][1, :3]) and spoilt[2][1, 3].isnan()


def launch(inputs, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tensors, keywords = inputs.arguments()
    return launchers.guided_step(*tensors, similarity, keywords["noise"], keywords["coefficients"])


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
    assert kernels.dispatch.default_impl("guided_step", inputs.sample) in ("cpp", "reference")
