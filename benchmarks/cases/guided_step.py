"""guided_step against eager torch and torch.compile, which compute the same maths, signals included."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from protocol import OURS, Bar, Case, Provider
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.guided_step.reference import guided_step as eager

from . import bandwidth

CACHE_MIB = 64  # input sets together exceed this: twice the last-level cache of the machines we know
COEFFICIENTS = (0.98, -0.1, 0.0, 0.6, 1.25, 0.4, 7.5, 6.0, 9.0, 3.0)
Arguments = tuple[Tensor | None, ...]  # in the order of amg.kernels.guided_step.reference


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str, terms: bool) -> Arguments:
    """Random inputs; with `terms` all of AMG's tensors and every other gate open, without them plain CFG."""
    sample, eps_uncond, eps_cond = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    coefficients = torch.tensor(COEFFICIENTS, device=device)
    if not terms:
        return sample, eps_uncond, eps_cond, None, None, None, None, coefficients
    eps_neighbour, similarity_grad = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    similarity = torch.where(torch.arange(shape[0], device=device) % 2 == 0, 0.2, 0.7)
    return sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, None, coefficients


def ours(sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, noise, coefficients):
    return kernels.guided_step(
        *(sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad),
        similarity=similarity,
        noise=noise,
        coefficients=coefficients,
    )


def bytes_moved(inputs: Arguments, gates_open: float) -> int:
    """Tensors read and written once: five, and the share `gates_open` of two more."""
    sample = inputs[0]
    assert sample is not None
    return round((5 + 2 * gates_open) * sample.numel() * sample.element_size())


def input_sets(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, terms: bool, mib: int
) -> list[Arguments]:
    """As many different inputs as exceed `mib` MiB together, and two at least."""
    one = arguments(shape, dtype, device, terms)
    size = sum(tensor.numel() * tensor.element_size() for tensor in one if tensor is not None)
    count = max(2, math.ceil(mib * 2**20 / size))
    return [one, *(arguments(shape, dtype, device, terms) for _ in range(count - 1))]


def errors(outputs: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Return the largest relative error of prev_sample, x0_hat and signals against float64."""
    return [
        float((output.double() - exact).abs().max() / exact.abs().max())
        for output, exact in zip(outputs, truth, strict=True)
    ]


def check(inputs: Arguments, compiled: Callable | None) -> dict[str, str]:
    """Hold ours to twice eager torch's own error, and to the same bits in two runs; note the errors."""
    truth = eager(*(None if tensor is None else tensor.double() for tensor in inputs))
    lost = errors(eager(*inputs), truth)
    outputs, again = ours(*inputs), ours(*inputs)
    floor = torch.finfo(inputs[0].dtype).eps / 2
    for name, error, eagers in zip(outputs._fields, errors(outputs, truth), lost, strict=True):
        if not error <= 2 * max(eagers, floor):
            raise AssertionError(f"guided_step: {name} is off by {error:.2g}, eager torch by {eagers:.2g}")
    if not all(map(torch.equal, outputs, again)):
        raise AssertionError("guided_step: two runs differ")
    notes = {OURS: f"error {max(errors(outputs, truth)):.1e}", "eager": f"error {max(lost):.1e}"}
    if compiled is not None:
        notes["torch.compile"] = f"error {max(errors(compiled(*inputs), truth)):.1e}"
    return notes


def providers(sets: list[Arguments], gates_open: float, compiled: Callable | None) -> list[Provider]:
    """Ours, eager torch and, where it works, torch.compile."""
    moved = bytes_moved(sets[0], gates_open)
    found = [
        Provider(OURS, lambda i: ours(*sets[i]), moved),
        Provider("eager", lambda i: eager(*sets[i]), moved),
    ]
    if compiled is not None:
        found.append(Provider("torch.compile", lambda i: compiled(*sets[i]), moved))
    return found


def try_compile(inputs: Arguments, **options: str) -> Callable | None:
    """Compile eager torch for these shapes; None, with the reason printed, where that fails."""
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False, **options)
    try:
        compiled(*inputs)
    except Exception as error:  # whatever inductor or its compiler raises
        print(f"torch.compile left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return compiled


def fused(shape: tuple[int, ...], terms: bool, bars: tuple[Bar, ...], threads: int) -> Case:
    """One shape in fp32 on the CPU, inputs rotated past the caches."""
    sets = input_sets(shape, torch.float32, "cpu", terms, CACHE_MIB)
    compiled = try_compile(sets[0])
    name = f"fp32 {'x'.join(map(str, shape))} {'AMG, half open' if terms else 'CFG'}"
    found = tuple(providers(sets, 0.5 if terms else 0.0, compiled))
    return Case("guided_step", name, threads, len(sets), found, bars, partial(check, sets[0], compiled))


def streamed(shape: tuple[int, ...], threads: int) -> Case:
    """Tensors far beyond the caches, against copying: plain CFG, five tensors moved."""
    sets = input_sets(shape, torch.float32, "cpu", False, CACHE_MIB)
    step = providers(sets, 0.0, None)[0]
    mib = sets[0][0].numel() * 4 // 2**20
    bar = Bar("of copy bandwidth", bandwidth.COPIERS, 0.75, "GB/s")
    name = f"fp32 {'x'.join(map(str, shape))} CFG, {mib} MiB a tensor"
    found = (step, *bandwidth.copiers(2 * mib, 2, threads))
    return Case("guided_step", name, threads, len(sets), found, (bar,), partial(check, sets[0], None))


def cases() -> dict[str, tuple[int, Callable[[int], Case]]]:
    """Threads and builder by name; built one at a time, so that only one case's tensors live.

    The bars are for the whole op; plain CFG, a third of the work for eager torch, completes the picture.
    """
    eager3 = (Bar("x eager", ("eager",), 3),)
    larger = (Bar("x eager", ("eager",), 10), Bar("x torch.compile", ("torch.compile",), 1.5))
    plain = (
        Bar("x eager (plain CFG)", ("eager",), 1),
        Bar("x torch.compile (plain CFG)", ("torch.compile",), 1),
    )
    return {
        "step-small": (1, partial(fused, (8, 4, 64, 64), True, eager3)),
        "step-small-cfg": (1, partial(fused, (8, 4, 64, 64), False, plain)),
        "step-batch": (2, partial(fused, (256, 3, 32, 32), True, larger)),
        "step-batch-cfg": (2, partial(fused, (256, 3, 32, 32), False, plain)),
        "step-stream": (2, partial(streamed, (256, 4, 64, 64))),
    }
