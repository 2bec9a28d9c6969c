"""guided_step in Triton: one pass over the tensors, then a fixed-order sum of the programs' signals."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import NARROW, StepTensors

BLOCK = 2048  # elements a program takes of a large sample
WHOLE_BLOCK = 8192  # elements it takes at most at a time where a sample is one program's
ONE_PROGRAM = 2 * WHOLE_BLOCK  # largest such sample: its program's sums are the signals, one launch is enough
WARP_ELEMENTS = 512  # elements a warp takes: two 128-bit vectors a thread in half precision
STATE_WARP_ELEMENTS = 256  # with states: more would not fit the registers
COUNTS = [
    "uncond_rows",
    "cond_rows",
    "neighbour_rows",
    "grad_rows",
    "batches",
    "programs",
    "coefficient_stride",
]
SUM_PROGRAMS = 64  # programs whose sums are loaded at a time


@triton.jit
def short_sums(values):
    """Add every 32 neighbours, which one warp holds: short sums round least, in whatever order they run."""
    return tl.sum(tl.reshape(values, [values.shape[0] // 32, 32]), axis=1)


@triton.jit
def load_own(tensor, rows, number: tl.constexpr, count, wanted, batch, batches, size, first, offsets):
    """Return a block of what sample `batch` has of network tensor `number`, in fp32, and whether it has it.

    Zeros where it has none, or where it is not wanted: nothing is read then.
    """
    row, there = batch, wanted
    if rows is not None:
        row = tl.load(rows + number * batches + batch).to(tl.int64)
        there = wanted & (row >= 0) & (row < count)
        row = tl.where(there, row, 0)
    inside = offsets < tl.where(there, size - first, 0)
    return tl.load(tensor + row * size + first + offsets, inside, 0).to(tl.float32), there


@triton.jit
def gate_weights(row, similarity, output_scale, batch, WIDE: tl.constexpr):
    """Return what m_u, m_c − m_u and the two terms weigh; NaN where σ is not finite."""
    s0 = tl.load(row + 6)
    scale, guidance, caption, push = tl.full([], 1, tl.float32), s0, s0 * 0, s0 * 0
    if output_scale is not None:
        scale = tl.load(output_scale + batch)
        guidance = s0 * scale
    if similarity is not None:
        sigma = tl.load(similarity + batch)
        gate = sigma > tl.load(row + 5)
        s1 = tl.where(gate, tl.maximum(tl.minimum(tl.load(row + 7) * sigma, s0 - 1), 0), 0)
        caption = tl.where(gate, tl.maximum(tl.minimum(tl.load(row + 8) * sigma, s0 - s1 - 1), 0), 0)
        push = tl.where(gate, tl.load(row + 9) * tl.load(row + 3), 0)
        if WIDE:
            push = tl.where(push != 0, push / tl.load(row + 15), 0)
        guidance = tl.where(tl.abs(sigma) < float("inf"), guidance - s1, float("nan"))
    return scale, guidance, caption, push


@triton.jit
def guided_output(
    eps_uncond,
    eps_cond,
    eps_neighbour,
    similarity_grad,
    rows,
    counts,
    weights,
    batch,
    batches,
    size,
    first,
    offsets,
):
    """Return m_u, m_c − m_u and m̂ of a block. What weighs 0, as the terms of a closed sample, is not read."""
    scale, guidance, caption, push = weights
    m_uncond, has = load_own(eps_uncond, rows, 0, counts[0], True, batch, batches, size, first, offsets)
    m_cond, has_cond = load_own(eps_cond, rows, 1, counts[1], True, batch, batches, size, first, offsets)
    if rows is not None:
        m_uncond = tl.where(has, m_uncond, m_cond)
        guidance = tl.where(has_cond, guidance, float("nan"))
    delta = m_cond - m_uncond
    output = m_uncond * scale + guidance * delta
    if eps_neighbour is not None:
        m_neighbour, has = load_own(
            eps_neighbour, rows, 2, counts[2], caption != 0, batch, batches, size, first, offsets
        )
        output -= tl.where(has, caption, 0) * (m_neighbour - m_uncond)
    if similarity_grad is not None:
        gradient, has = load_own(
            similarity_grad, rows, 3, counts[3], push != 0, batch, batches, size, first, offsets
        )
        output += tl.where(has, push, 0) * gradient
    return m_uncond, delta, output


@triton.jit
def load_used(source, used, offsets, remaining):
    """Load a block in fp32, zeros where it is not used."""
    return tl.load(source + offsets, offsets < tl.where(used, remaining, 0), 0).to(tl.float32)


@triton.jit
def load_state(row, state, stride, number: tl.constexpr, offsets, remaining, STATES: tl.constexpr):
    """Load a state, not where its h and all its A are 0."""
    used = tl.load(row + 18 + number) != 0
    for i in tl.static_range(STATES):
        used |= tl.load(row + 21 + 3 * i + number) != 0
    return load_used(state + number * stride, used, offsets, remaining)


@triton.jit
def advance_states(row, state, stride, offsets, remaining, x_t, output, clipped, noise, STATES: tl.constexpr):
    """Return Σ h_j·state_j and put the next states in their places."""
    before0 = load_state(row, state, stride, 0, offsets, remaining, STATES)
    before1, before2 = before0, before0
    history = tl.load(row + 18) * before0
    if STATES > 1:
        before1 = load_state(row, state, stride, 1, offsets, remaining, STATES)
        history += tl.load(row + 19) * before1
    if STATES > 2:
        before2 = load_state(row, state, stride, 2, offsets, remaining, STATES)
        history += tl.load(row + 20) * before2
    for i in tl.static_range(STATES):
        of, past = row + 30 + 4 * i, row + 21 + 3 * i
        after = tl.load(of) * x_t + tl.load(of + 1) * output + tl.load(of + 2) * clipped
        after += tl.load(of + 3) * noise + tl.load(past) * before0
        if STATES > 1:
            after += tl.load(past + 1) * before1
        if STATES > 2:
            after += tl.load(past + 2) * before2
        tl.store(state + i * stride + offsets, after, offsets < remaining)
    return history


@triton.jit
def updated(
    row,
    weights,
    noise,
    state,
    start,
    stride,
    offsets,
    remaining,
    x_t,
    output,
    x0,
    WIDE: tl.constexpr,
    STATES: tl.constexpr,
):
    """Return x_{t−1} of a block and how far it moved in the network's input; advances the states."""
    k_sample, k_eps, k_noise = weights
    prev = k_sample * x_t + k_eps * output
    drawn = tl.zeros_like(x_t)
    if noise is not None:
        used = k_noise != 0
        for i in tl.static_range(STATES):
            used |= tl.load(row + 33 + 4 * i) != 0
        drawn = load_used(noise + start, used, offsets, remaining)
        prev += k_noise * drawn
    if not WIDE:
        return prev, prev - x_t
    else:
        clip = tl.load(row + 12)
        clipped = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))
        prev += tl.load(row + 13) * clipped
        if STATES > 0:
            past = state + start
            prev += advance_states(row, past, stride, offsets, remaining, x_t, output, clipped, drawn, STATES)
        return prev, tl.load(row + 17) * prev - tl.load(row + 16) * x_t


@triton.jit
def not_finite(total, numbers, SUMS: tl.constexpr):
    """Return how many of the first SUMS signals are not finite in fp32."""
    bad = (numbers < SUMS) & ~(tl.abs(total.to(tl.float32)) < float("inf"))
    return tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0)


@triton.jit(do_not_specialize=COUNTS)
def step_kernel(
    sample,
    eps_uncond,
    eps_cond,
    eps_neighbour,
    similarity_grad,
    similarity,
    noise,
    coefficients,
    rows,
    state,
    output_scale,
    prev_sample,
    x0_hat,
    sums,
    flags,
    size,
    uncond_rows,
    cond_rows,
    neighbour_rows,
    grad_rows,
    batches,
    programs,
    coefficient_stride,
    WIDE: tl.constexpr,
    STATES: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p = sample·programs + first updates every programs-th block of BLOCK elements of that sample.

    A tensor that is None is a term left out, or a buffer not written, when the kernel is compiled. The first
    SUMS signals of what the program updated go to row p of `sums`.
    """
    program = tl.program_id(0)
    batch = (program // programs).to(tl.int64)
    row = coefficients + batch * coefficient_stride
    counts = (uncond_rows, cond_rows, neighbour_rows, grad_rows)
    weights = gate_weights(row, similarity, output_scale, batch, WIDE)
    update_weights = (tl.load(row), tl.load(row + 1), tl.load(row + 2))
    sqrt_one_minus_alpha_bar, inv_sqrt_alpha_bar = tl.load(row + 3), tl.load(row + 4)

    total = tl.zeros([2, 2], tl.float64)
    for block in range(program % programs, tl.cdiv(size, BLOCK), programs):
        first = block * tl.full([], BLOCK, tl.int64)
        start = batch * size + first
        offsets = tl.arange(0, BLOCK)
        remaining = size - first
        inside = offsets < remaining
        x_t = tl.load(sample + start + offsets, inside, 0).to(tl.float32)
        m_uncond, delta, output = guided_output(
            *(eps_uncond, eps_cond, eps_neighbour, similarity_grad, rows, counts, weights),
            *(batch, batches, size, first, offsets),
        )
        eps_u = m_uncond
        if WIDE:
            x0 = tl.load(row + 10) * x_t + tl.load(row + 11) * output
            eps_u = tl.load(row + 14) * x_t + tl.load(row + 15) * m_uncond
            delta *= tl.load(row + 15)
        else:
            x0 = (x_t - sqrt_one_minus_alpha_bar * output) * inv_sqrt_alpha_bar
        if x0_hat is not None:
            tl.store(x0_hat + start + offsets, x0, inside)
        moved = tl.zeros([BLOCK], tl.float32)
        if prev_sample is not None:
            stride = batches.to(tl.int64) * size
            prev, moved = updated(
                *(row, update_weights, noise, state, start, stride, offsets, remaining),
                *(x_t, output, x0, WIDE, STATES),
            )
            tl.store(prev_sample + start + offsets, prev, inside)
        # Joined, the four sums cost one reduction: entry [i, j] of the last two axes is signal i + 2j.
        of_delta = tl.join(short_sums(delta * delta), short_sums(eps_u * delta))
        of_rest = tl.join(short_sums(eps_u * eps_u), short_sums(moved * moved))
        total += tl.sum(tl.join(of_delta, of_rest).to(tl.float64), axis=0)
    numbers = tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]
    if sums is not None:
        tl.store(sums + program.to(tl.int64) * SUMS + numbers, total.to(tl.float32), numbers < SUMS)
    if flags is not None:
        tl.store(flags + batch, 1, not_finite(total, numbers, SUMS) > 0)


@triton.jit(do_not_specialize=["programs"])
def signals_kernel(sums, signals, flags, programs, SIGNALS: tl.constexpr, SUM_PROGRAMS: tl.constexpr):
    """Program b adds sample b's programs in a fixed order, in float64, and keeps SIGNALS of four signals."""
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, SUM_PROGRAMS)[:, None]
    numbers = tl.arange(0, 4)[None, :]
    total = tl.zeros([SUM_PROGRAMS, 4], tl.float64)
    for start in range(0, programs, SUM_PROGRAMS):
        entries = (batch * programs + start + rows) * 4 + numbers
        total += tl.load(sums + entries, start + rows < programs, 0).to(tl.float64)
    total = tl.sum(total, axis=0)
    numbers = tl.arange(0, 4)
    if signals is not None:
        tl.store(signals + batch * SIGNALS + numbers, total.to(tl.float32), numbers < SIGNALS)
    if flags is not None:
        bad = (numbers < SIGNALS) & ~(tl.abs(total.to(tl.float32)) < float("inf"))
        tl.store(flags + batch, 1, tl.sum(bad.to(tl.int32), axis=0) > 0)


def guided_step_into(*tensors: Tensor | None) -> None:
    """Compute the step into the buffers that are given; tensors in the order of StepTensors.

    What is launched depends on shapes alone, never on data.
    """
    t = StepTensors._make([None if tensor is None else tensor.contiguous() for tensor in tensors])
    batch, signal_count = t.sample.shape[0], 3 if t.prev_sample is None else 4
    if t.sample.numel() == 0:
        if t.signals is not None:
            t.signals.zero_()
        return
    size, width = t.sample.numel() // batch, t.coefficients.shape[-1]
    states = 0 if t.state is None or t.prev_sample is None else t.state.shape[0]
    programs, block, warps = share_out(size, states)
    alone = programs == 1  # a sample's only program has its signals
    wanted = t.signals is not None or t.flags is not None
    sums = (
        t.signals
        if alone
        else t.sample.new_empty((batch * programs, 4), dtype=torch.float32)
        if wanted
        else None
    )
    counts = [0 if t.rows is None or tensor is None else tensor.shape[0] for tensor in t[1:5]]
    step_kernel[(batch * programs,)](
        *t[:-2],
        sums,
        t.flags if alone else None,
        size,
        *counts,
        batch,
        programs,
        width if t.coefficients.dim() == 2 else 0,
        width > NARROW,
        states,
        signal_count if alone else 4,
        block,
        num_warps=warps,
    )
    if not alone and wanted:
        signals_kernel[(batch,)](sums, t.signals, t.flags, programs, signal_count, SUM_PROGRAMS, num_warps=1)


def share_out(size: int, states: int) -> tuple[int, int, int]:
    """Return how many programs take a sample, how many elements each takes at a time, and its warps."""
    a_warp = STATE_WARP_ELEMENTS if states else WARP_ELEMENTS
    if size > ONE_PROGRAM:
        return -(-size // BLOCK), BLOCK, BLOCK // a_warp
    whole = WHOLE_BLOCK * a_warp // WARP_ELEMENTS
    block = min(whole, max(BLOCK, 1 << (size - 1).bit_length()))
    return 1, block, block // a_warp
