"""guided_step_into, the whole step of a batching engine, against its equations in float64."""

import os
from dataclasses import replace

import pytest
import torch

from amg.kernels.extension import EXTENSION

from .whole_step import (
    BATCH,
    COUNTS,
    Outcome,
    WholeStep,
    assert_equals_oracle,
    assert_same,
    make_step,
    run,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see test_interpreted.py
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension), *["triton"] * INTERPRETED]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]  # of sample, of the network
each_impl = pytest.mark.parametrize("impl", IMPLS)


def check(step: WholeStep, impl: str, **changes) -> None:
    assert_equals_oracle(run(step, impl, **changes), step, truncates=impl == "triton")


@each_impl
@pytest.mark.parametrize("states", [0, 1, 2, 3])
@pytest.mark.parametrize(("dtype", "network"), DTYPES)
def test_every_dtype_and_number_of_states(impl, dtype, network, states):
    check(make_step(dtype, network, states=states), impl)


@each_impl
@pytest.mark.parametrize("of_sample", [(1,), (33,), (6, 64), (4, 8, 8), (4, 3, 5, 7), (3, 70, 70)])
def test_samples_of_any_rank_and_size(impl, of_sample):
    check(make_step(of_sample=of_sample), impl)


@pytest.mark.parametrize("states", [0, 3])
def test_reference_in_float64_equals_the_oracle(states):
    step = make_step(states=states).double()
    assert_equals_oracle(run(step, "reference"), step)


@each_impl
@pytest.mark.parametrize(
    "missing", ["noise", "eps_neighbour", "similarity_grad", "output_scale", "rows", "state"]
)
def test_what_is_missing_is_left_out(impl, missing):
    step = make_step()
    if missing == "rows":
        first = {name: getattr(step, name)[:5] for name in ("eps_uncond", "eps_cond")}
        five = torch.cat([step.eps_cond] * 2)
        step = replace(step, **first, eps_neighbour=five[1:6], similarity_grad=five[3:8])
    check(replace(step, **{missing: None}), impl)


@each_impl
def test_without_similarity_every_gate_is_closed(impl):
    check(replace(make_step(), similarity=None, eps_neighbour=None, similarity_grad=None), impl)


@each_impl
@pytest.mark.parametrize("network", [F16, BF16])
def test_gradient_may_be_fp32_beside_half_outputs(impl, network):
    step = make_step(F32, network)
    check(replace(step, similarity_grad=step.similarity_grad.float()), impl)


@each_impl
def test_one_row_of_coefficients_serves_all(impl):
    step = make_step()
    check(replace(step, coefficients=step.coefficients[0]), impl)


@each_impl
def test_ten_coefficients_mean_the_forty_two_they_say(impl):
    step = replace(make_step(states=0), output_scale=None)
    narrow = replace(step, coefficients=step.coefficients[:, :10].contiguous())
    root, inverse = step.coefficients[:, 3], step.coefficients[:, 4]
    ones = dict.fromkeys(("e_output", "scale", "next_scale"), 1.0)
    wide = step.with_column(a=inverse, b=-root * inverse, clip=torch.inf, k_clipped=0.0, e_sample=0.0, **ones)
    assert_equals_oracle(run(narrow, impl), wide, truncates=impl == "triton")
    scaled = torch.linspace(0.5, 1.5, 5)
    check_narrow = run(replace(narrow, output_scale=scaled), impl)
    assert_equals_oracle(check_narrow, replace(wide, output_scale=scaled), truncates=impl == "triton")


@each_impl
@pytest.mark.parametrize(("dtype", "network"), DTYPES)
def test_without_update_only_x0_and_three_signals(impl, dtype, network):
    step = make_step(dtype, network)
    found = run(step, impl, update=False)
    assert_equals_oracle(found, step, truncates=impl == "triton")
    assert torch.equal(found.state, step.state)
    whole = run(step, impl)
    if impl == "cpp":
        assert torch.equal(found.x0_hat, whole.x0_hat) and torch.equal(found.signals, whole.signals[:, :3])


@each_impl
@pytest.mark.parametrize("left_out", ["x0_hat", "signals", "flags"])
@pytest.mark.parametrize("update", [True, False])
def test_buffers_that_are_not_given_change_no_other(impl, update, left_out):
    step = make_step(of_sample=(3, 9, 11))
    whole, found = run(step, impl, update), run(step, impl, update, **{left_out: None})
    assert_same(found, replace(whole, **{left_out: None}))


@each_impl
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("of_sample", [(3, 7, 5), (3, 96, 96)])
def test_prev_sample_may_be_the_sample(impl, dtype, of_sample):
    step = make_step(dtype, of_sample=of_sample)
    truth, overwritten = run(step, impl), step.sample.clone()
    found = run(replace(step, sample=overwritten), impl, prev_sample=overwritten)
    assert_same(found, truth)


def poisoned(step: WholeStep, value: float) -> WholeStep:
    """`value` in everything that no sample reads.

    That is rows nobody has, rows of closed samples (0 and 3), and noise and first state of sample 3, which
    multiplies them by 0.
    """
    zeros = ("k_noise", "B0_noise", "B1_noise", "h0", "A00", "A10")
    step = step.with_column(**{name: [1.0, 1.0, 1.0, 0.0, 1.0] for name in zeros})
    longer = {
        name: torch.cat([tensor, torch.full_like(tensor[:2], value)])
        for name, tensor in vars(step).items()
        if name in ("eps_cond", "eps_neighbour", "similarity_grad")
    }
    rows, noise, state = step.rows.clone(), step.noise.clone(), step.state.clone()
    rows[2, [0, 3]], rows[3, [0, 3]] = COUNTS[2], COUNTS[3] + 1
    noise[3], state[0, 3] = value, value
    return replace(step, **longer, eps_uncond=longer["eps_cond"], rows=rows, noise=noise, state=state)


@each_impl
@pytest.mark.parametrize(("dtype", "network"), DTYPES)
def test_what_no_sample_reads_may_be_nan(impl, dtype, network):
    step, clean = (poisoned(make_step(dtype, network), value) for value in (torch.nan, 1.0))
    found = run(step, impl)
    assert_same(found, run(clean, impl))
    assert_equals_oracle(found, clean, truncates=impl == "triton")


@each_impl
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_similarity_spoils_its_own_sample_only(impl, value, update):
    step = make_step()
    similarity = step.similarity.clone()
    similarity[2] = value
    clean, spoilt = run(step, impl, update), run(replace(step, similarity=similarity), impl, update)
    assert_spoilt(spoilt, clean, 2)
    assert torch.equal(spoilt.signals[2, :3], clean.signals[2, :3])
    assert spoilt.flags.tolist() == [0, 0, int(update), 0, 0]


def assert_spoilt(found: Outcome, clean: Outcome, which: int) -> None:
    """Sample `which` is NaN wherever its output goes, the others are what they were to the bit."""
    rest = [i for i in range(BATCH) if i != which]
    for name in ("prev_sample", "x0_hat", "signals"):
        output, expected = getattr(found, name), getattr(clean, name)
        assert (output is None) == (expected is None)
        if output is not None:
            assert torch.equal(output[rest], expected[rest])
            assert name == "signals" or output[which].isnan().all()
    assert torch.equal(found.state[:, rest], clean.state[:, rest])
    if found.prev_sample is not None:
        assert found.state[:, which].isnan().all() and found.signals[which, 3].isnan()


@each_impl
@pytest.mark.parametrize("row", [-1, -7, COUNTS[1], 2**31 - 1, -(2**31)])
def test_a_row_number_outside_the_conditional_output_spoils_its_own_sample_only(impl, row):
    step = make_step()
    rows = step.rows.clone()
    rows[1, 2] = row
    found = run(replace(step, rows=rows), impl)
    assert_spoilt(found, run(step, impl), 2)
    assert found.flags.tolist() == [0, 0, 1, 0, 0]


@each_impl
@pytest.mark.parametrize("row", [-2, max(COUNTS), 2**31 - 1, -(2**31)])
def test_any_other_row_number_outside_its_tensor_counts_as_none(impl, row):
    step = make_step()
    outside, none = step.rows.clone(), step.rows.clone()
    outside[[0, 2, 3], 2], none[[0, 2, 3], 2] = row, -1
    assert_same(run(replace(step, rows=outside), impl), run(replace(step, rows=none), impl))


@each_impl
@pytest.mark.parametrize("update", [True, False])
def test_a_non_finite_output_flags_its_own_sample_only(impl, update):
    step = make_step()
    output = step.eps_cond.clone()
    output[4, 0, 0, 0] = torch.inf  # what sample 3 alone is conditioned on
    found, clean = run(replace(step, eps_cond=output), impl, update), run(step, impl, update)
    rest = [0, 1, 2, 4]
    for name in ("prev_sample", "x0_hat", "signals"):
        if (output := getattr(found, name)) is not None:
            assert torch.equal(output[rest], getattr(clean, name)[rest])
    assert found.flags.tolist() == [0, 0, 0, 1, 0]
    assert not found.signals[3].isfinite().all()


@each_impl
def test_flags_are_never_cleared(impl):
    flags = torch.tensor([0, 1, 0, 7, 0], dtype=torch.int32)
    assert run(make_step(), impl, flags=flags).flags.tolist() == [0, 1, 0, 7, 0]


@each_impl
@pytest.mark.parametrize("of_sample", [(3, 7, 5), (4, 40, 40)])
def test_every_sample_equals_its_own_batch_of_one(impl, of_sample):
    step = make_step(of_sample=of_sample)
    whole = run(step, impl)
    for i in range(BATCH):
        names = ("sample", "similarity", "noise", "coefficients", "output_scale")
        one = {name: getattr(step, name)[i : i + 1] for name in names}
        alone = run(replace(step, **one, rows=step.rows[:, i : i + 1], state=step.state[:, i : i + 1]), impl)
        for name in ("prev_sample", "x0_hat", "signals"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[i], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(alone.state[:, 0], whole.state[:, i], rtol=1e-6, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("states", [0, 2])
def test_large_outputs_equal_small_ones_to_the_bit_in_cpp(states):
    """From 2 MiB an fp32 output is written past the caches, unless it is written over the sample."""
    step = make_step(of_sample=(4, 192, 192), states=states)
    assert step.sample.nbytes >= 2**21
    overwritten = step.sample.clone()
    in_place = run(replace(step, sample=overwritten), "cpp", prev_sample=overwritten)
    assert_same(run(step, "cpp"), in_place)


@needs_extension
def test_runs_and_thread_counts_agree_to_the_bit():
    step, threads = make_step(of_sample=(3, 64, 64)), torch.get_num_threads()
    found = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        found.append(run(step, "cpp"))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert_same(other, found[0])


@each_impl
@pytest.mark.parametrize("of_sample", [(0,), (3, 0, 4)])
def test_empty_samples(impl, of_sample):
    found = run(make_step(of_sample=of_sample), impl)
    assert not found.signals.any() and not found.flags.any()


@each_impl
def test_no_samples(impl):
    step = make_step()
    names = ("sample", "similarity", "noise", "coefficients", "output_scale")
    none = {name: getattr(step, name)[:0] for name in names}
    found = run(replace(step, **none, rows=step.rows[:, :0], state=step.state[:, :0]), impl)
    assert found.signals.shape == (0, 4) and found.prev_sample.shape == (0, 3, 7, 5)


@each_impl
def test_layouts_and_offsets_of_inputs_change_nothing(impl):
    step = make_step()
    names = ("sample", "eps_uncond", "eps_cond", "eps_neighbour", "similarity_grad", "noise")
    layouts = {
        "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
        "strided": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
        "misaligned": lambda tensor: torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape),
    }
    strided = step.rows.t().contiguous().t()
    for lay_out in layouts.values():
        moved = replace(step, rows=strided, **{name: lay_out(getattr(step, name)) for name in names})
        buffers = {name: torch.full(step.sample.shape, torch.nan) for name in ("prev_sample", "x0_hat")}
        assert_same(run(moved, impl, **buffers), run(step, impl))
