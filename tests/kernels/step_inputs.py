"""Inputs of guided_step, the paper's seven steps as its oracle, and how far outputs may lie from it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import amg.kernels as kernels

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
