"""guided_step against the paper's seven steps in float64, for every implementation, dtype and CPU level."""

import os
from dataclasses import replace

import pytest
import torch

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

from .step_inputs import DTYPES, StepInputs, assert_within_twice_eager, make_inputs, oracle, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see test_interpreted.py
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension), *["triton"] * INTERPRETED]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5, 4, 9, 7), (1, 4, 64, 64), (3, 1, 1, 1), (10, 3, 32, 32)])
def test_error_is_at_most_twice_eager(impl, dtype, shape):
    inputs = make_inputs(dtype, shape)
    assert_within_twice_eager(run(inputs, impl), inputs)


@needs_extension
@pytest.mark.parametrize("shape", [(6, 7, 112, 112), (5, 3, 187, 187)])
def test_large_outputs_equal_small_ones_to_the_bit_in_cpp(shape):
    """From 2 MiB an output of whole vectors is written past the caches; (187, 187) has a tail and is not."""
    inputs = make_inputs(torch.float32, shape)
    assert inputs.sample.nbytes >= 2**21
    for whole, parts in zip(run(inputs, "cpp"), zip(*sample_by_sample(inputs), strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def sample_by_sample(inputs: StepInputs) -> list[kernels.GuidedStep]:
    """The C++ step of each sample alone, under 2 MiB."""
    alone = []
    for i in range(len(inputs.sample)):
        each = {name: value[i : i + 1] for name, value in vars(inputs).items() if name != "coefficients"}
        alone.append(run(replace(inputs, **each), "cpp"))
    return alone


@pytest.mark.parametrize("impl", IMPLS)
def test_reference_in_float64_equals_the_oracle(impl):
    inputs = make_inputs(torch.float32).to(torch.float64, torch.float64)
    if impl != "reference":
        with pytest.raises(
            ValueError, match=r"takes float32, float16, bfloat16 on cpu.*, got float64 on cpu"
        ):
            run(inputs, impl)
        return
    for output, truth in zip(run(inputs, impl), oracle(inputs), strict=True):
        torch.testing.assert_close(output, truth, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_sample_never_reads_neighbour_or_gradient(impl, dtype):
    inputs = make_inputs(dtype)
    closed = inputs.similarity <= inputs.coefficients[5]
    assert closed.tolist() == [True, False, False, True, False]
    poisoned = replace(
        inputs,
        eps_neighbour=inputs.eps_neighbour.masked_fill(closed.view(-1, 1, 1, 1), torch.nan),
        similarity_grad=inputs.similarity_grad.masked_fill(closed.view(-1, 1, 1, 1), torch.nan),
    )
    for clean, output in zip(run(inputs, impl), run(poisoned, impl), strict=True):
        assert torch.equal(clean, output)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_similarity_the_step_is_plain_guidance(impl):
    inputs = make_inputs(torch.float32)
    tensors = (inputs.sample, inputs.eps_uncond, inputs.eps_cond)
    output = kernels.guided_step(*tensors, noise=inputs.noise, coefficients=inputs.coefficients, impl=impl)
    closed = replace(inputs, similarity=torch.full((5,), -1.0))
    for plain, truth in zip(output, run(closed, impl), strict=True):
        assert torch.equal(plain, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("missing", ["eps_neighbour", "similarity_grad", "noise"])
def test_a_missing_tensor_leaves_its_term_out(impl, missing):
    inputs = make_inputs(torch.float32)
    row = inputs.coefficients.clone()
    zero = {"eps_neighbour": 8, "similarity_grad": 9, "noise": 2}[missing]
    row[zero] = 0
    without = replace(inputs, **{missing: None, "coefficients": row})
    zeroed = replace(inputs, coefficients=row)
    for left_out, truth in zip(run(without, impl), run(zeroed, impl), strict=True):
        torch.testing.assert_close(left_out, truth, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_sample_equals_its_own_batch_of_one(impl):
    inputs = make_inputs(torch.float32, (5, 4, 40, 40))
    rows = inputs.coefficients.repeat(5, 1)
    rows[:, 6] = torch.linspace(1.5, 9.0, 5)
    inputs = replace(inputs, coefficients=rows)
    whole = run(inputs, impl)
    for i in range(5):
        fields = {name: getattr(inputs, name)[i : i + 1] for name in inputs.__dataclass_fields__}
        for batched, alone in zip(whole, run(StepInputs(**fields), impl), strict=True):
            torch.testing.assert_close(batched[i], alone[0], rtol=1e-6, atol=1e-6)
    assert_within_twice_eager(whole, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_may_be_fp32_beside_half_tensors(impl):
    inputs = make_inputs(torch.float16)
    wide = replace(inputs, similarity_grad=inputs.similarity_grad.float())
    for output, truth in zip(run(wide, impl), run(inputs, impl), strict=True):
        assert torch.equal(output, truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_and_offsets_change_nothing(impl):
    inputs = make_inputs(torch.float32, (5, 4, 9, 7))
    truth = run(inputs, impl)
    names = ("sample", "eps_uncond", "eps_cond", "eps_neighbour", "similarity_grad", "noise")
    layouts = {
        "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
        "strided": lambda tensor: tensor.repeat_interleave(2, dim=3)[..., ::2],
        "misaligned": lambda tensor: torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape),
    }
    for lay_out in layouts.values():
        moved = replace(inputs, **{name: lay_out(getattr(inputs, name)) for name in names})
        for output, expected in zip(run(moved, impl), truth, strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8)])
def test_empty_tensors(impl, shape):
    output = run(make_inputs(torch.float32, shape), impl)
    assert output.prev_sample.shape == shape and output.signals.shape == (shape[0], 4)
    assert not output.signals.any()


@needs_extension
def test_runs_and_thread_counts_agree_to_the_bit():
    inputs = make_inputs(torch.float32, (3, 4, 64, 64))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(run(inputs, "cpp"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_predict_x0_is_the_first_half(impl, dtype):
    inputs = make_inputs(dtype)
    tensors = (inputs.sample, inputs.eps_uncond, inputs.eps_cond)
    first = kernels.predict_x0(*tensors, coefficients=inputs.coefficients, impl=impl)
    whole = kernels.guided_step(*tensors, noise=inputs.noise, coefficients=inputs.coefficients, impl=impl)
    assert torch.equal(first.x0_hat, whole.x0_hat)
    assert torch.equal(first.signals, whole.signals[:, :3])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_similarity_spoils_its_own_sample_only(impl, value):
    inputs = make_inputs(torch.float32)
    similarity = inputs.similarity.clone()
    similarity[3] = value
    clean, spoilt = run(inputs, impl), run(replace(inputs, similarity=similarity), impl)
    rest = torch.tensor([0, 1, 2, 4])
    for before, after in zip(clean, spoilt, strict=True):
        assert torch.equal(before[rest], after[rest])
    assert spoilt.prev_sample[3].isnan().all() and spoilt.x0_hat[3].isnan().all()
    assert torch.equal(spoilt.signals[3, :3], clean.signals[3, :3]) and spoilt.signals[3, 3].isnan()


def test_bad_arguments_are_named():
    inputs = make_inputs(torch.float32)
    cases = {
        r"`eps_cond` must be \[5, 4, 9, 7\] float32 or float16 or bfloat16 on cpu": {
            "eps_cond": inputs.eps_cond[:4]
        },
        r"`noise` must be .* got \[5, 4, 9, 7\] float16": {"noise": inputs.noise.half()},
        r"`coefficients` must be \[K\] or \[B, K\] float32": {"coefficients": inputs.coefficients[:9]},
        r"`similarity` must be \[5\] float32": {"similarity": inputs.similarity.double()},
        r"`eps_neighbour` needs `similarity`": {"similarity": None},
        r"must not require grad": {"sample": inputs.sample.clone().requires_grad_()},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            run(replace(inputs, **change), None)


def test_unknown_and_missing_implementations_are_refused():
    inputs = make_inputs(torch.float32)
    with pytest.raises(ValueError, match="`impl` must be"):
        run(inputs, "fortran")
    if not INTERPRETED:
        with pytest.raises((RuntimeError, ValueError), match="impl='triton'"):
            run(inputs, "triton")
