"""guided_step in Triton: one pass over the tensors, then a fixed-order sum of the blocks' signals."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import COEFFICIENTS

BLOCK = 1024  # elements a program: two 128-bit vectors a thread in fp32, one in half precision
SUM_BLOCKS = 64  # blocks whose signals are loaded at a time


@triton.jit
def short_sums(values):
    """Add every 32 neighbours, which one warp holds: short sums round least, in whatever order they run."""
    return tl.sum(tl.reshape(values, [values.shape[0] // 32, 32]), axis=1)


@triton.jit(do_not_specialize=["blocks", "coefficient_stride"])
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
    block_signals,
    size,
    blocks,
    coefficient_stride,
    BLOCK: tl.constexpr,
):
    """Program p updates elements [b·BLOCK, (b + 1)·BLOCK) of one sample, where p = sample·blocks + b.

    A tensor that is None is a term left out when the kernel is compiled.
    """
    program = tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK
    start = batch * size + first
    offsets = tl.arange(0, BLOCK)
    remaining = size - first
    inside = offsets < remaining

    row = coefficients + batch * coefficient_stride
    sqrt_one_minus_alpha_bar = tl.load(row + 3)
    s0 = tl.load(row + 6)
    x_t = tl.load(sample + start + offsets, inside, 0).to(tl.float32)
    eps_u = tl.load(eps_uncond + start + offsets, inside, 0).to(tl.float32)
    delta = tl.load(eps_cond + start + offsets, inside, 0).to(tl.float32) - eps_u
    if similarity is not None:
        sigma = tl.load(similarity + batch)
        gate = sigma > tl.load(row + 5)
        s1 = tl.maximum(tl.minimum(tl.load(row + 7) * sigma, s0 - 1), 0)
        s2 = tl.maximum(tl.minimum(tl.load(row + 8) * sigma, s0 - s1 - 1), 0)
        opened = offsets < tl.where(gate, remaining, 0)  # a closed sample's terms are masked off, never read
        eps_guided = eps_u + tl.where(gate, s0 - s1, s0) * delta
        if eps_neighbour is not None:
            eps_n = tl.load(eps_neighbour + start + offsets, opened, 0).to(tl.float32)
            eps_guided -= tl.where(gate, s2, 0) * (eps_n - eps_u)
        if similarity_grad is not None:
            push = tl.where(gate, tl.load(row + 9) * sqrt_one_minus_alpha_bar, 0)
            eps_guided += push * tl.load(similarity_grad + start + offsets, opened, 0).to(tl.float32)
        eps_guided = tl.where(tl.abs(sigma) < float("inf"), eps_guided, float("nan"))
    else:
        eps_guided = eps_u + s0 * delta

    x0 = (x_t - sqrt_one_minus_alpha_bar * eps_guided) * tl.load(row + 4)
    tl.store(x0_hat + start + offsets, x0, inside)
    moved = tl.zeros([BLOCK], tl.float32)
    if prev_sample is not None:
        prev = tl.load(row) * x_t + tl.load(row + 1) * eps_guided
        if noise is not None:
            prev += tl.load(row + 2) * tl.load(noise + start + offsets, inside, 0).to(tl.float32)
        tl.store(prev_sample + start + offsets, prev, inside)
        moved = prev - x_t
    # Joined, the four sums cost one reduction: entry [i, j] of the last two axes is signal i + 2j.
    of_delta = tl.join(short_sums(delta * delta), short_sums(eps_u * delta))
    of_rest = tl.join(short_sums(eps_u * eps_u), short_sums(moved * moved))
    numbers = tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]
    block_sums = tl.sum(tl.join(of_delta, of_rest), axis=0)
    tl.store(block_signals + program.to(tl.int64) * 4 + numbers, block_sums)


@triton.jit(do_not_specialize=["blocks"])
def signals_kernel(block_signals, signals, blocks, SIGNALS: tl.constexpr, SUM_BLOCKS: tl.constexpr):
    """Program b adds sample b's blocks in a fixed order, in float64, and keeps the first SIGNALS signals."""
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, SUM_BLOCKS)[:, None]
    numbers = tl.arange(0, 4)[None, :]
    total = tl.zeros([SUM_BLOCKS, 4], tl.float64)
    for start in range(0, blocks, SUM_BLOCKS):
        entries = (batch * blocks + start + rows) * 4 + numbers
        total += tl.load(block_signals + entries, start + rows < blocks, 0).to(tl.float64)
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
    prev_sample, x0_hat = (sample.new_empty(sample.shape) for _ in range(2))
    signals = sample.new_empty((sample.shape[0], 4), dtype=torch.float32)
    launch(inputs, prev_sample, x0_hat, signals)
    return prev_sample, x0_hat, signals


def predict_x0(
    sample: Tensor, eps_uncond: Tensor, eps_cond: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x0_hat of the plain CFG estimate and signals [B, 3]; arguments as in amg.kernels.predict_x0."""
    x0_hat = sample.new_empty(sample.shape)
    signals = sample.new_empty((sample.shape[0], 3), dtype=torch.float32)
    launch([sample, eps_uncond, eps_cond, None, None, None, None, coefficients], None, x0_hat, signals)
    return x0_hat, signals


def launch(inputs: list[Tensor | None], prev_sample: Tensor | None, x0_hat: Tensor, signals: Tensor) -> None:
    """Run both kernels; inputs in the op's order. What is launched depends on shapes alone, never on data."""
    batch = x0_hat.shape[0]
    if x0_hat.numel() == 0:
        signals.zero_()
        return
    *tensors, coefficients = (None if tensor is None else tensor.contiguous() for tensor in inputs)
    assert coefficients is not None
    stride = len(COEFFICIENTS) if coefficients.dim() == 2 else 0
    size = x0_hat.numel() // batch
    blocks = triton.cdiv(size, BLOCK)
    block_signals = signals.new_empty((batch, blocks, 4))
    outputs = (prev_sample, x0_hat, block_signals)
    step_kernel[(batch * blocks,)](*tensors, coefficients, *outputs, size, blocks, stride, BLOCK)
    signals_kernel[(batch,)](block_signals, signals, blocks, signals.shape[1], SUM_BLOCKS, num_warps=1)
