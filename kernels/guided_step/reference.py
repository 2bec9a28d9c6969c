"""guided_step in plain torch: the form a reader checks against the equations, on any device and dtype."""

import torch
from torch import Tensor

from .contract import NARROW, NETWORK, STEP_COEFFICIENTS, StepTensors

Columns = dict[str, Tensor]  # of STEP_COEFFICIENTS, each shaped to broadcast over the sample


def guided_step_into(*tensors: Tensor | None) -> None:
    """Compute the step and write what has a buffer; tensors in the order of StepTensors."""
    t = StepTensors(*tensors)  # type: ignore[arg-type]
    dtype = torch.promote_types(t.sample.dtype, torch.float32)
    columns = named_columns(t, dtype)
    x_t = t.sample.to(dtype)
    m_uncond, delta, present = uncond_and_delta(t, dtype)
    output = guided_output(t, columns, m_uncond, delta)
    output = torch.where(per_sample(present, x_t), output, torch.nan)
    x0_hat = columns["a"] * x_t + columns["b"] * output
    signals = cfg_signals(columns, x_t, m_uncond, delta)
    if t.prev_sample is not None:
        prev_sample, next_state = update(t, columns, x_t, output, x0_hat)
        moved = columns["next_scale"] * prev_sample - columns["scale"] * x_t
        signals.append(moved.square().flatten(1).sum(1))
        t.prev_sample.copy_(prev_sample)
        if t.state is not None:
            t.state.copy_(next_state)
    if t.x0_hat is not None:
        t.x0_hat.copy_(x0_hat)
    stacked = torch.stack(signals, dim=1)
    if t.signals is not None:
        t.signals.copy_(stacked)
    if t.flags is not None:
        t.flags.masked_fill_(~stacked.isfinite().all(dim=1), 1)


def named_columns(t: StepTensors, dtype: torch.dtype) -> Columns:
    """Return the 42 coefficients by name; ten mean the noise prediction of an unscaled network."""
    rows = t.coefficients.to(dtype).expand(t.sample.shape[0], -1)
    parts = dict(zip(STEP_COEFFICIENTS, (per_sample(row, t.sample) for row in rows.unbind(1)), strict=False))
    if rows.shape[1] == NARROW:
        inverse, zero = parts["inv_sqrt_alpha_bar"], torch.zeros_like(parts["s0"])
        defaults = {name: zero for name in STEP_COEFFICIENTS[NARROW:]}
        parts = defaults | parts | dict.fromkeys(("e_output", "scale", "next_scale"), zero + 1)
        parts |= {"a": inverse, "b": -parts["sqrt_one_minus_alpha_bar"] * inverse, "clip": zero + torch.inf}
    return parts


def per_sample(values: Tensor, sample: Tensor) -> Tensor:
    """Return [B] values shaped to broadcast over `sample`."""
    return values.view(-1, *[1] * (sample.dim() - 1))


def rows_of(t: StepTensors, number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what each sample has of network tensor `number` (of `rows`), and whether it has anything [B]."""
    tensor: Tensor = getattr(t, NETWORK[number])
    if t.rows is None:
        return tensor.to(dtype), torch.ones(t.sample.shape[0], dtype=torch.bool, device=t.sample.device)
    row, last = t.rows[number], max(len(tensor) - 1, 0)
    values = tensor.index_select(0, row.clamp(0, last)).to(dtype)
    return values, (row >= 0) & (row <= last)


def uncond_and_delta(t: StepTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return m_u (m_c where a sample has none), m_c − m_u and whether the sample has an m_c [B]."""
    m_cond, present = rows_of(t, 1, dtype)
    m_uncond, guided = rows_of(t, 0, dtype)
    m_uncond = torch.where(per_sample(guided, t.sample), m_uncond, m_cond)
    return m_uncond, m_cond - m_uncond, present


def guided_output(t: StepTensors, columns: Columns, m_uncond: Tensor, delta: Tensor) -> Tensor:
    """Return m̂: guidance with the terms whose weight is not 0; NaN where σ is not finite."""
    dtype, s0 = m_uncond.dtype, columns["s0"]
    scaled = m_uncond
    strength = s0
    if t.output_scale is not None:
        output_scale = per_sample(t.output_scale.to(dtype), t.sample)
        scaled, strength = output_scale * m_uncond, output_scale * s0
    if t.similarity is None:
        return scaled + strength * delta
    sigma = per_sample(t.similarity.to(dtype), t.sample)
    gate = sigma > columns["threshold"]
    s1 = torch.where(gate, (columns["c1"] * sigma).minimum(s0 - 1).clamp(min=0), 0)
    s2 = torch.where(gate, (columns["c2"] * sigma).minimum(s0 - s1 - 1).clamp(min=0), 0)
    output = scaled + (strength - s1) * delta
    if t.eps_neighbour is not None:
        m_neighbour, told = rows_of(t, 2, dtype)
        output = torch.where(
            per_sample(told, t.sample) & (s2 != 0), output - s2 * (m_neighbour - m_uncond), output
        )
    if t.similarity_grad is not None:
        gradient, pushed = rows_of(t, 3, dtype)
        push = columns["c3"] * columns["sqrt_one_minus_alpha_bar"]
        acting = per_sample(pushed, t.sample) & gate & (push != 0)
        output = torch.where(acting, output + push / columns["e_output"] * gradient, output)
    return torch.where(sigma.isfinite(), output, torch.nan)


def update(
    t: StepTensors, columns: Columns, x_t: Tensor, output: Tensor, x0_hat: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_{t−1} and the next states [S, B, ...]."""
    dtype, count = x_t.dtype, 0 if t.state is None else len(t.state)
    clipped = x0_hat.clamp(-columns["clip"], columns["clip"])
    prev_sample = columns["k_sample"] * x_t + columns["k_eps"] * output + columns["k_clipped"] * clipped
    weights = [columns["k_noise"], *(columns[f"B{i}_noise"] for i in range(count))]
    noise: Tensor | float = 0.0
    if t.noise is not None:
        noise = torch.where(any_nonzero(weights), t.noise.to(dtype), 0)
        prev_sample = prev_sample + columns["k_noise"] * noise
    states = [] if t.state is None else list(t.state.to(dtype))
    for j, state in enumerate(states):
        weights = [columns[f"h{j}"], *(columns[f"A{i}{j}"] for i in range(count))]
        states[j] = torch.where(any_nonzero(weights), state, 0)
        prev_sample = prev_sample + columns[f"h{j}"] * states[j]
    next_state = x_t.new_empty((count, *x_t.shape))
    for i in range(count):
        inputs = {"sample": x_t, "output": output, "clipped": clipped, "noise": noise}
        next_state[i] = sum(columns[f"B{i}_{name}"] * values for name, values in inputs.items())
        for j, state in enumerate(states):
            next_state[i] += columns[f"A{i}{j}"] * state
    return prev_sample, next_state


def any_nonzero(weights: list[Tensor]) -> Tensor:
    """Return where any of the weights is not 0: elsewhere what they multiply is not read."""
    return torch.stack([weight != 0 for weight in weights]).any(0)


def cfg_signals(columns: Columns, x_t: Tensor, m_uncond: Tensor, delta: Tensor) -> list[Tensor]:
    """Return ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩ and ‖ε_u‖² of the noise predictions, each [B]."""
    eps_u = columns["e_sample"] * x_t + columns["e_output"] * m_uncond
    delta = columns["e_output"] * delta
    return [product.flatten(1).sum(1) for product in (delta * delta, eps_u * delta, eps_u * eps_u)]
