"""guided_step against eager torch and torch.compile, which compute the same maths, signals included."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from protocol import OURS, Bar, Case, Provider
from torch import Tensor

import amg.kernels as kernels

from . import bandwidth
from .eager_step import step as eager

CACHE_MIB = 64  # input sets together exceed this: twice the last-level cache of the machines we know
COEFFICIENTS = (0.98, -0.1, 0.0, 0.6, 1.25, 0.4, 7.5, 6.0, 9.0, 3.0)
MULTISTEP = {  # predicts from the clean sample of this and the last two steps, which are its states
    **{
        "a": 1.25,
        "b": -0.75,
        "clip": 9.0,
        "k_clipped": 0.06,
        "e_output": 1.0,
        "scale": 1.0,
        "next_scale": 1.0,
    },
    **{"h0": -0.02, "h1": 0.01, "B0_clipped": 1.0, "A10": 1.0, "A21": 1.0},
}
Arguments = tuple[Tensor | None, ...]  # in the order of eager_step.step


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, terms: bool, states: int = 0
) -> Arguments:
    """Random inputs; with `terms` all of AMG's tensors and every other gate open, without them plain CFG."""
    sample, eps_uncond, eps_cond = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    coefficients, state = torch.tensor(COEFFICIENTS, device=device), None
    if states:
        wide = [MULTISTEP.get(name, 0.0) for name in kernels.STEP_COEFFICIENTS[len(COEFFICIENTS) :]]
        coefficients = torch.tensor([*COEFFICIENTS, *wide], device=device)
        state = torch.randn(states, *shape, device=device)
    if not terms:
        return sample, eps_uncond, eps_cond, None, None, None, None, coefficients, state
    eps_neighbour, similarity_grad = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    similarity = torch.where(torch.arange(shape[0], device=device) % 2 == 0, 0.2, 0.7)
    return sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, None, coefficients, state


def ours(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """The fused step in new tensors; a state is advanced in place."""
    *tensors, similarity, noise, coefficients, state = inputs
    keywords = {"similarity": similarity, "noise": noise, "coefficients": coefficients, "state": state}
    return kernels.guided_step(*tensors, **keywords)


def bytes_moved(inputs: Arguments, gates_open: float) -> int:
    """Tensors read and written once: five, the share `gates_open` of two more, and each state twice."""
    sample, state = inputs[0], inputs[-1]
    assert sample is not None
    history = 0 if state is None else 2 * state.numel() * state.element_size()
    return round((5 + 2 * gates_open) * sample.numel() * sample.element_size()) + history


def input_sets(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, terms: bool, mib: int, states: int = 0
) -> list[Arguments]:
    """As many different inputs as exceed `mib` MiB together, and two at least."""
    one = arguments(shape, dtype, device, terms, states)
    size = sum(tensor.numel() * tensor.element_size() for tensor in one if tensor is not None)
    count = max(2, math.ceil(mib * 2**20 / size))
    return [one, *(arguments(shape, dtype, device, terms, states) for _ in range(count - 1))]


def errors(outputs: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Return the largest relative error of prev_sample, x0_hat and signals against float64."""
    return [
        float((output.double() - exact).abs().max() / exact.abs().max())
        for output, exact in zip(outputs, truth, strict=True)
    ]


def run_once(inputs: Arguments) -> dict[str, Tensor]:
    """Ours by name, on a copy of the state; the state it leaves last."""
    state = None if inputs[-1] is None else inputs[-1].clone()
    found = dict(ours(*inputs[:-1], state)._asdict())
    return found if state is None else {**found, "state": state}


def check(inputs: Arguments, compiled: Callable | None) -> dict[str, str]:
    """Hold ours to twice eager torch's own error, and to the same bits in two runs; note the errors."""
    truth = eager(*(None if tensor is None else tensor.double() for tensor in inputs))
    lost = errors(eager(*inputs), truth)
    outputs, again = run_once(inputs), run_once(inputs)
    floor, found = torch.finfo(inputs[0].dtype).eps / 2, errors(tuple(outputs.values()), truth)
    for name, error, eagers in zip(outputs, found, lost, strict=True):
        if not error <= 2 * max(eagers, floor):
            raise AssertionError(f"guided_step: {name} is off by {error:.2g}, eager torch by {eagers:.2g}")
    if not all(map(torch.equal, outputs.values(), again.values())):
        raise AssertionError("guided_step: two runs differ")
    notes = {OURS: f"error {max(found):.1e}", "eager": f"error {max(lost):.1e}"}
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


def fused(shape: tuple[int, ...], terms: bool, bars: tuple[Bar, ...], threads: int, states: int = 0) -> Case:
    """One shape in fp32 on the CPU, inputs rotated past the caches."""
    sets = input_sets(shape, torch.float32, "cpu", terms, CACHE_MIB, states)
    compiled = try_compile(sets[0])
    found = tuple(providers(sets, 0.5 if terms else 0.0, compiled))
    name = case_name(shape, terms, states)
    return Case("guided_step", name, threads, len(sets), found, bars, partial(check, sets[0], compiled))


def case_name(shape: tuple[int, ...], terms: bool, states: int) -> str:
    history = f", {states} states" if states else ""
    return f"fp32 {'x'.join(map(str, shape))} {'AMG, half open' if terms else 'CFG'}{history}"


def called(shape: tuple[int, ...], bars: tuple[Bar, ...], threads: int) -> Case:
    """What an engine calls at every step, into its buffers, rows numbered: mostly what a call costs."""
    states = 2
    inputs = arguments(shape, torch.float32, "cpu", False, states)
    sample, eps_uncond, eps_cond, coefficients, state = *inputs[:3], *inputs[-2:]
    batch = shape[0]
    output = torch.cat([eps_uncond, eps_cond])
    given = {
        "coefficients": coefficients.expand(batch, -1).contiguous(),
        "rows": torch.stack([torch.arange(batch) + start for start in (0, batch, -batch, -batch)]).int(),
        "state": state.clone(),
        "prev_sample": torch.empty_like(sample),
        "signals": torch.empty(batch, 4),
        "flags": torch.zeros(batch, dtype=torch.int32),
    }

    def into(i: int) -> None:
        kernels.guided_step_into(sample, output, output, **given)

    moved = bytes_moved(inputs, 0.0) - sample.numel() * sample.element_size()
    found = (Provider(OURS, into, moved), Provider("eager", lambda i: eager(*inputs), moved))
    name = f"{case_name(shape, False, states)}, into buffers"
    return Case("guided_step", name, threads, 1, found, bars, partial(check, inputs, None))


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
        "step-small-states": (1, partial(fused, (8, 4, 64, 64), True, eager3, states=2)),
        "step-batch-states": (2, partial(fused, (256, 3, 32, 32), True, larger, states=2)),
        "step-batch-states-cfg": (2, partial(fused, (256, 3, 32, 32), False, eager3, states=2)),
        "step-call": (1, partial(called, (1, 4, 8, 8), eager3)),
    }
