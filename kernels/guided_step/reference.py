"""guided_step in plain torch: the form a reader checks against the equations, on any device and dtype."""

import torch
from torch import Tensor


def guided_step(
    sample: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    eps_neighbour: Tensor | None,
    similarity_grad: Tensor | None,
    similarity: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return prev_sample, x0_hat and signals [B, 4]; arguments as in amg.kernels.guided_step."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    columns = per_sample_columns(coefficients, sample, dtype)
    k_sample, k_eps, k_noise, sqrt_one_minus_alpha_bar, inv_sqrt_alpha_bar = columns[:5]
    threshold, s0, c1, c2, c3 = columns[5:]
    x_t, eps_u = sample.to(dtype), eps_uncond.to(dtype)
    delta = eps_cond.to(dtype) - eps_u

    if similarity is None:
        eps_guided = eps_u + s0 * delta
    else:
        sigma = similarity.to(dtype).view(-1, *[1] * (sample.dim() - 1))
        gate = sigma > threshold
        s1 = (c1 * sigma).minimum(s0 - 1).clamp(min=0)
        s2 = (c2 * sigma).minimum(s0 - s1 - 1).clamp(min=0)
        eps_guided = eps_u + torch.where(gate, s0 - s1, s0) * delta
        if eps_neighbour is not None:
            caption = s2 * (eps_neighbour.to(dtype) - eps_u)
            eps_guided = torch.where(gate, eps_guided - caption, eps_guided)
        if similarity_grad is not None:
            push = c3 * sqrt_one_minus_alpha_bar * similarity_grad.to(dtype)
            eps_guided = torch.where(gate, eps_guided + push, eps_guided)
        eps_guided = torch.where(sigma.isfinite(), eps_guided, torch.nan)

    x0_hat = (x_t - sqrt_one_minus_alpha_bar * eps_guided) * inv_sqrt_alpha_bar
    prev_sample = k_sample * x_t + k_eps * eps_guided
    if noise is not None:
        prev_sample = prev_sample + k_noise * noise.to(dtype)
    signals = cfg_signals(eps_u, delta)
    signals.append((prev_sample - x_t).square().flatten(1).sum(1))
    return prev_sample.to(sample.dtype), x0_hat.to(sample.dtype), torch.stack(signals, dim=1)


def predict_x0(
    sample: Tensor, eps_uncond: Tensor, eps_cond: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x0_hat of the plain CFG estimate and signals [B, 3]; arguments as in amg.kernels.predict_x0."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    columns = per_sample_columns(coefficients, sample, dtype)
    sqrt_one_minus_alpha_bar, inv_sqrt_alpha_bar, s0 = columns[3], columns[4], columns[6]
    eps_u = eps_uncond.to(dtype)
    delta = eps_cond.to(dtype) - eps_u
    eps_guided = eps_u + s0 * delta
    x0_hat = (sample.to(dtype) - sqrt_one_minus_alpha_bar * eps_guided) * inv_sqrt_alpha_bar
    return x0_hat.to(sample.dtype), torch.stack(cfg_signals(eps_u, delta), dim=1)


def per_sample_columns(coefficients: Tensor, sample: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the ten coefficients, each shaped to broadcast over `sample`."""
    rows = coefficients.to(dtype).expand(sample.shape[0], -1)
    return tuple(column.view(-1, *[1] * (sample.dim() - 1)) for column in rows.unbind(1))


def cfg_signals(eps_u: Tensor, delta: Tensor) -> list[Tensor]:
    """Return ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩ and ‖ε_u‖², each [B]."""
    return [product.flatten(1).sum(1) for product in (delta * delta, eps_u * delta, eps_u * eps_u)]
