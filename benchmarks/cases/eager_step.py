"""The step as one writes it in torch: what guided_step is compared with, eager and compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from amg.kernels import STEP_COEFFICIENTS


def step(
    sample: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    eps_neighbour: Tensor | None,
    similarity_grad: Tensor | None,
    similarity: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return prev_sample, x0_hat and signals; with a state (42 coefficients) the next state too."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    rows = coefficients.to(dtype).expand(sample.shape[0], -1)
    columns = [column.view(-1, *[1] * (sample.dim() - 1)) for column in rows.unbind(1)]
    k_sample, k_eps, k_noise, root, inv_root_alpha, threshold, s0, c1, c2, c3 = columns[:10]
    x_t, m_uncond = sample.to(dtype), eps_uncond.to(dtype)
    delta = eps_cond.to(dtype) - m_uncond
    if similarity is None:
        output = m_uncond + s0 * delta
    else:
        sigma = similarity.to(dtype).view(-1, *[1] * (sample.dim() - 1))
        gate = sigma > threshold
        s1 = (c1 * sigma).minimum(s0 - 1).clamp(min=0)
        s2 = (c2 * sigma).minimum(s0 - s1 - 1).clamp(min=0)
        output = m_uncond + torch.where(gate, s0 - s1, s0) * delta
        if eps_neighbour is not None:
            output = torch.where(gate, output - s2 * (eps_neighbour.to(dtype) - m_uncond), output)
        if similarity_grad is not None:
            output = torch.where(gate, output + c3 * root * similarity_grad.to(dtype), output)
    if state is not None:
        return with_history(
            dict(zip(STEP_COEFFICIENTS, columns, strict=True)), x_t, m_uncond, delta, output, state
        )
    x0_hat = (x_t - root * output) * inv_root_alpha
    prev_sample = k_sample * x_t + k_eps * output
    if noise is not None:
        prev_sample = prev_sample + k_noise * noise.to(dtype)
    signals = (delta * delta, m_uncond * delta, m_uncond * m_uncond, (prev_sample - x_t).square())
    return prev_sample.to(sample.dtype), x0_hat.to(sample.dtype), sums(signals)


def with_history(
    k: dict[str, Tensor], x_t: Tensor, m_uncond: Tensor, delta: Tensor, output: Tensor, state: Tensor
) -> tuple[Tensor, ...]:
    """The update of a scheduler with states, without noise; signals of the noise prediction."""
    x0_hat = k["a"] * x_t + k["b"] * output
    clipped = x0_hat.clamp(-k["clip"], k["clip"])
    prev_sample = k["k_sample"] * x_t + k["k_eps"] * output + k["k_clipped"] * clipped
    before = state.unbind(0)
    after = []
    for i in range(len(before)):
        prev_sample = prev_sample + k[f"h{i}"] * before[i]
        new = k[f"B{i}_sample"] * x_t + k[f"B{i}_output"] * output + k[f"B{i}_clipped"] * clipped
        for j in range(len(before)):
            new = new + k[f"A{i}{j}"] * before[j]
        after.append(new)
    eps_u, delta = k["e_sample"] * x_t + k["e_output"] * m_uncond, k["e_output"] * delta
    moved = k["next_scale"] * prev_sample - k["scale"] * x_t
    signals = sums((delta * delta, eps_u * delta, eps_u * eps_u, moved * moved))
    return prev_sample, x0_hat, signals, torch.stack(after)


def sums(products: tuple[Tensor, ...]) -> Tensor:
    """Return each product's sum by sample, [B, 4]."""
    return torch.stack([product.flatten(1).sum(1) for product in products], dim=1)
