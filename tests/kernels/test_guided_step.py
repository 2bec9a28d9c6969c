"""guided_step against the paper's seven steps in float64, for every implementation, dtype and CPU level."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COEFFICIENT_ROW = [0.9, 0.25, 0.1, 0.6, 1.25, 0.4, 7.5, 6.0, 9.0, 30.0]
SIMILARITY = [0.1, 0.45, 0.9, 0.4, 0.7]  # closed, open, open and clipped, closed (not above), open


@dataclass(frozen=True)
class StepInputs:
    sample: Tensor
    eps_uncond: Tensor
    eps_cond: Tensor
    eps_neighbour: Tensor
    similarity_grad: Tensor
    similarity: Tensor
    noise: Tensor
    coefficients: Tensor

    def arguments(self) -> tuple[tuple, dict]:
        names = ("eps_neighbour", "similarity_grad")
        tensors = [self.sample, self.eps_uncond, self.eps_cond, *(getattr(self, name) for name in names)]
        keywords = {name: getattr(self, name) for name in ("similarity", "noise", "coefficients")}
        return tuple(tensors), keywords

    def to(self, dtype: torch.dtype, scalars: torch.dtype) -> "StepInputs":
        fields = {name: getattr(self, name).to(dtype) for name in self.__dataclass_fields__}
        fields["similarity"], fields["coefficients"] = (
            self.similarity.to(scalars),
            self.coefficients.to(scalars),
        )
        return replace(self, **fields)


def make_inputs(dtype: torch.dtype, shape: tuple[int, ...] = (5, 4, 9, 7), seed: int = 0) -> StepInputs:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(6)]
    sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, noise = tensors
    similarity = torch.tensor([SIMILARITY[i % 5] for i in range(shape[0])])
    coefficients = torch.tensor(COEFFICIENT_ROW)
    return StepInputs(
        sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad * 0.1, similarity, noise, coefficients
    )


def oracle(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    """prev_sample, x0_hat, signals by the paper's seven steps, in the inputs' own dtype."""
    results = [oracle_sample(inputs, i) for i in range(len(inputs.sample))]
    prev_sample, x0_hat, signals = (torch.stack(parts) for parts in zip(*results, strict=True))
    return prev_sample, x0_hat, signals


def oracle_sample(inputs: StepInputs, i: int) -> tuple[Tensor, Tensor, Tensor]:
    coefficients = inputs.coefficients.expand(len(inputs.sample), 10)[i].tolist()
    k_sample, k_eps, k_noise, root, inv_root_alpha, threshold, s0, c1, c2, c3 = coefficients
    x_t, eps_u, eps_c = inputs.sample[i], inputs.eps_uncond[i], inputs.eps_cond[i]
    sigma = float(inputs.similarity[i])
    eps_guided = eps_u + s0 * (eps_c - eps_u)
    if sigma > threshold:
        s1 = max(min(c1 * sigma, s0 - 1), 0.0)
        s2 = max(min(c2 * sigma, s0 - s1 - 1), 0.0)
        g_spe = -s1 * (eps_c - eps_u)
        g_dup = -s2 * (inputs.eps_neighbour[i] - eps_u)
        g_sim = c3 * root * inputs.similarity_grad[i]
        eps_guided = eps_guided + g_spe + g_dup + g_sim
    x0_hat = (x_t - root * eps_guided) * inv_root_alpha
    prev_sample = k_sample * x_t + k_eps * eps_guided + k_noise * inputs.noise[i]
    delta = eps_c - eps_u
    signals = [delta.square().sum(), (eps_u * delta).sum(), eps_u.square().sum()]
    return prev_sample, x0_hat, torch.stack([*signals, (prev_sample - x_t).square().sum()])


def in_float64(inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor]:
    return oracle(inputs.to(torch.float64, torch.float64))


def run(inputs: StepInputs, impl: str | None) -> kernels.GuidedStep:
    tensors, keywords = inputs.arguments()
    return kernels.guided_step(*tensors, **keywords, impl=impl)


def assert_within_twice_eager(outputs, inputs: StepInputs) -> None:
    """Every output's largest error is at most twice what eager torch loses in the inputs' dtype.

    Eager may be lucky in a sum, so half a unit in the last place of the output's own dtype is always allowed.
    """
    exact, eager = in_float64(inputs), oracle(inputs)
    for name, output, truth, plain in zip(kernels.GuidedStep._fields, outputs, exact, eager, strict=True):
        error, allowed = ((tensor.double() - truth).abs().max() for tensor in (output, plain))
        allowed = allowed.maximum(truth.abs().max() * torch.finfo(output.dtype).eps / 2)
        assert error <= 2 * allowed, f"{name}: error {error:.3g}, eager torch loses {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5, 4, 9, 7), (1, 4, 64, 64), (3, 1, 1, 1), (10, 3, 32, 32)])
def test_error_is_at_most_twice_eager(impl, dtype, shape):
    inputs = make_inputs(dtype, shape)
    assert_within_twice_eager(run(inputs, impl), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_reference_in_float64_equals_the_oracle(impl):
    inputs = make_inputs(torch.float32).to(torch.float64, torch.float64)
    if impl == "cpp":
        with pytest.raises(ValueError, match="takes float32, float16, bfloat16 on cpu, got float64 on cpu"):
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
def test_a_non_finite_similarity_raises(impl, value):
    inputs = make_inputs(torch.float32)
    similarity = inputs.similarity.clone()
    similarity[3] = value
    with pytest.raises(ValueError, match=r"`similarity` must be finite, got \S+ for sample 3"):
        run(replace(inputs, similarity=similarity), impl)


def test_bad_arguments_are_named():
    inputs = make_inputs(torch.float32)
    cases = {
        r"`eps_cond` must be \[5, 4, 9, 7\] torch.float32 on cpu": {"eps_cond": inputs.eps_cond[:4]},
        r"`noise` must be .* got \[5, 4, 9, 7\] float16": {"noise": inputs.noise.half()},
        r"`coefficients` must be \[10\] or \[B, 10\]": {"coefficients": inputs.coefficients[:9]},
        r"`similarity` must be \[5\] float32": {"similarity": inputs.similarity.double()},
        r"`eps_neighbour` needs `similarity`": {"similarity": None},
        r"`noise` must be given where": {"noise": None},
        r"must not require grad": {"sample": inputs.sample.clone().requires_grad_()},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            run(replace(inputs, **change), None)


def test_unknown_and_missing_implementations_are_refused():
    inputs = make_inputs(torch.float32)
    with pytest.raises(ValueError, match="`impl` must be"):
        run(inputs, "fortran")
    with pytest.raises((RuntimeError, ValueError), match="impl='triton'"):
        run(inputs, "triton")
