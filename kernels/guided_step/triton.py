"""guided_step in Triton: one pass over the tensors, then a fixed-order sum of the programs' signals."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import COEFFICIENTS

BLOCK = 2048  # elements a program takes of a large sample
WHOLE_BLOCK = 8192  # elements it takes at most at a time where a sample is one program's
ONE_PROGRAM = 2 * WHOLE_BLOCK  # largest such sample: its program's sums are the signals, one launch is enough
WARP_ELEMENTS = 512  # elements a warp takes: two 128-bit vectors a thread in half precision
SUM_PROGRAMS = 64  # programs whose sums are loaded at a time


@triton.jit
def short_sums(values):
    """Add every 32 neighbours, which one warp holds: short sums round least, in whatever order they run."""
    return tl.sum(tl.reshape(values, [values.shape[0] // 32, 32]), axis=1)


@triton.jit(do_not_specialize=["programs", "coefficient_stride"])
def step_kernel(
    sample,
    eps_uncond,
    eps_cond,
    eps_neighbour,
    similarity_grad,
    similarity,
    noise,
    coefficients,
    prev_sample,
    x0_hat,
    sums,
    size,
    programs,
    coefficient_stride,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p = sample·programs + first updates every programs-th block of BLOCK elements of that sample.

    A tensor that is None is a term left out when the kernel is compiled. The first SUMS signals of what the
    program updated go to row p of `sums`.
    """
    program = tl.program_id(0)
    batch = (program // programs).to(tl.int64)
    row = coefficients + batch * coefficient_stride
    sqrt_one_minus_alpha_bar = tl.load(row + 3)
    inv_sqrt_alpha_bar = tl.load(row + 4)
    s0 = tl.load(row + 6)
    k_sample, k_eps, k_noise = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    gate = False
    if similarity is not None:
        sigma = tl.load(similarity + batch)
        gate = sigma > tl.load(row + 5)
        s1 = tl.maximum(tl.minimum(tl.load(row + 7) * sigma, s0 - 1), 0)
        s2 = tl.where(gate, tl.maximum(tl.minimum(tl.load(row + 8) * sigma, s0 - s1 - 1), 0), 0)
        push = tl.where(gate, tl.load(row + 9) * sqrt_one_minus_alpha_bar, 0)
        s0 = tl.where(gate, s0 - s1, s0)

    total = tl.zeros([2, 2], tl.float64)
    for block in range(program % programs, tl.cdiv(size, BLOCK), programs):
        first = block * tl.full([], BLOCK, tl.int64)
        start = batch * size + first
        offsets = tl.arange(0, BLOCK)
        remaining = size - first
        inside = offsets < remaining
        x_t = tl.load(sample + start + offsets, inside, 0).to(tl.float32)
        eps_u = tl.load(eps_uncond + start + offsets, inside, 0).to(tl.float32)
        delta = tl.load(eps_cond + start + offsets, inside, 0).to(tl.float32) - eps_u
        eps_guided = eps_u + s0 * delta
        if similarity is not None:
            opened = offsets < tl.where(gate, remaining, 0)  # a closed sample's terms are never read
            if eps_neighbour is not None:
                eps_n = tl.load(eps_neighbour + start + offsets, opened, 0).to(tl.float32)
                eps_guided -= s2 * (eps_n - eps_u)
            if similarity_grad is not None:
                eps_guided += push * tl.load(similarity_grad + start + offsets, opened, 0).to(tl.float32)
            eps_guided = tl.where(tl.abs(sigma) < float("inf"), eps_guided, float("nan"))
        x0 = (x_t - sqrt_one_minus_alpha_bar * eps_guided) * inv_sqrt_alpha_bar
        tl.store(x0_hat + start + offsets, x0, inside)
        moved = tl.zeros([BLOCK], tl.float32)
        if prev_sample is not None:
            prev = k_sample * x_t + k_eps * eps_guided
            if noise is not None:
                prev += k_noise * tl.load(noise + start + offsets, inside, 0).to(tl.float32)
            tl.store(prev_sample + start + offsets, prev, inside)
            moved = prev - x_t
        # Joined, the four sums cost one reduction: entry [i, j] of the last two axes is signal i + 2j.
        of_delta = tl.join(short_sums(delta * delta), short_sums(eps_u * delta))
        of_rest = tl.join(short_sums(eps_u * eps_u), short_sums(moved * moved))
        total += tl.sum(tl.join(of_delta, of_rest).to(tl.float64), axis=0)
    numbers = tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]
    tl.store(sums + program.to(tl.int64) * SUMS + numbers, total.to(tl.float32), numbers < SUMS)


@triton.jit(do_not_specialize=["programs"])
def signals_kernel(sums, signals, programs, SIGNALS: tl.constexpr, SUM_PROGRAMS: tl.constexpr):
    """Program b adds sample b's programs in a fixed order, in float64, and keeps SIGNALS of four signals."""
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, SUM_PROGRAMS)[:, None]
    numbers = tl.arange(0, 4)[None, :]
    total = tl.zeros([SUM_PROGRAMS, 4], tl.float64)
    for start in range(0, programs, SUM_PROGRAMS):
        entries = (batch * programs + start + rows) * 4 + numbers
        total += tl.load(sums + entries, start + rows < programs, 0).to(tl.float64)
    numbers = tl.arange(0, 4)
    tl.store(signals + batch * SIGNALS + numbers, tl.sum(total, axis=0).to(tl.float32), numbers < SIGNALS)


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
    inputs = [sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, noise, coefficients]
    prev_sample, x0_hat = (torch.empty_like(sample, memory_format=torch.contiguous_format) for _ in range(2))
    signals = sample.new_empty((sample.shape[0], 4), dtype=torch.float32)
    launch(inputs, prev_sample, x0_hat, signals)
    return prev_sample, x0_hat, signals


def predict_x0(
    sample: Tensor, eps_uncond: Tensor, eps_cond: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x0_hat of the plain CFG estimate and signals [B, 3]; arguments as in amg.kernels.predict_x0."""
    x0_hat = torch.empty_like(sample, memory_format=torch.contiguous_format)
    signals = sample.new_empty((sample.shape[0], 3), dtype=torch.float32)
    launch([sample, eps_uncond, eps_cond, None, None, None, None, coefficients], None, x0_hat, signals)
    return x0_hat, signals


def launch(inputs: list[Tensor | None], prev_sample: Tensor | None, x0_hat: Tensor, signals: Tensor) -> None:
    """Run the kernels; inputs in the op's order. What is launched depends on shapes alone, never on data."""
    batch, signal_count = signals.shape
    if x0_hat.numel() == 0:
        signals.zero_()
        return
    *tensors, coefficients = (None if tensor is None else tensor.contiguous() for tensor in inputs)
    assert coefficients is not None
    stride = len(COEFFICIENTS) if coefficients.dim() == 2 else 0
    size = x0_hat.numel() // batch
    programs, block = share_out(size)
    sums = signals if programs == 1 else signals.new_empty((batch * programs, 4))
    step_kernel[(batch * programs,)](
        *tensors,
        coefficients,
        prev_sample,
        x0_hat,
        sums,
        size,
        programs,
        stride,
        sums.shape[1],
        block,
        num_warps=block // WARP_ELEMENTS,
    )
    if programs > 1:
        signals_kernel[(batch,)](sums, signals, programs, signal_count, SUM_PROGRAMS, num_warps=1)


def share_out(size: int) -> tuple[int, int]:
    """Return how many programs take a sample of this size, and how many elements each takes at a time."""
    if size > ONE_PROGRAM:
        return -(-size // BLOCK), BLOCK
    return 1, min(WHOLE_BLOCK, max(BLOCK, 1 << (size - 1).bit_length()))
