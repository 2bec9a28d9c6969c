"""guided_step_into as a torch op: names, refusals, the meta device, opcheck and compilation."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

from .whole_step import Outcome, WholeStep, assert_same, make_step, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see test_interpreted.py
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension), *["triton"] * INTERPRETED]
each_impl = pytest.mark.parametrize("impl", IMPLS)


@each_impl
def test_functional_forms_are_the_same_step(impl):
    step = make_step()
    state = step.state.clone()
    tensors, keywords = step.arguments()
    found = kernels.guided_step(*tensors, **keywords, state=state, impl=impl)
    assert_same(Outcome(*found, flags=None, state=state), run(step, impl, flags=None))


def test_names_of_coefficients():
    assert kernels.STEP_COEFFICIENTS[:10] == kernels.COEFFICIENTS and len(kernels.STEP_COEFFICIENTS) == 42
    places = {"c3": 9, "a": 10, "clip": 12, "e_sample": 14, "next_scale": 17, "h0": 18, "A00": 21, "A22": 29}
    places |= {"B0_sample": 30, "B0_noise": 33, "B2_clipped": 40, "B2_noise": 41}
    assert {name: kernels.coefficient_index(name) for name in places} == places
    with pytest.raises(ValueError, match="`name` must be one of STEP_COEFFICIENTS, got 'h3'"):
        kernels.coefficient_index("h3")


WRONG = {
    r"`sample` must be floating \[B, \.\.\.\], got \[5\]": {"sample": torch.zeros(5)},
    r"`eps_cond` must be \[N >= 1, 3, 7, 5\] float32 or float16 or bfloat16 on cpu": {
        "eps_cond": torch.zeros(2, 3, 7)
    },
    r"`eps_uncond` must be \[N >= 1, 3, 7, 5\] .* got \[0, 3, 7, 5\]": {
        "eps_uncond": torch.zeros(0, 3, 7, 5)
    },
    r"`eps_uncond` must be .* float32 on cpu, got .* float16": {"eps_uncond": torch.zeros(2, 3, 7, 5).half()},
    r"`eps_neighbour` must be .* float32 on cpu, got .* meta": {
        "eps_neighbour": torch.zeros(2, 3, 7, 5, device="meta")
    },
    r"`similarity` must be \[5\] float32 on cpu, got \[4\]": {"similarity": torch.zeros(4)},
    r"`similarity_grad` needs `similarity`": {"similarity": None, "eps_neighbour": None},
    r"`coefficients` must be \[K\] or \[B, K\] float32 .* K = 10 or 42 and B = 5": {
        "coefficients": torch.zeros(5, 41)
    },
    r"`rows` must be \[4, 5\] int32 on cpu, got \[4, 5\] int64": {
        "rows": torch.zeros(4, 5, dtype=torch.int64)
    },
    r"`output_scale` must be \[5\] float32": {"output_scale": torch.zeros(5, 1)},
    r"`noise` must be \[5, 3, 7, 5\] float32": {"noise": torch.zeros(5, 3, 7, 5).half()},
    r"`state` must be \[S <= 3, 5, 3, 7, 5\], got \[4,": {"state": torch.zeros(4, 5, 3, 7, 5)},
    r"`state` must be \[2, 5, 3, 7, 5\] float32": {"state": torch.zeros(2, 4, 3, 7, 5)},
    r"`state` needs `coefficients` of 42 columns": {"coefficients": torch.zeros(10)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        run(replace(make_step(), **WRONG[message]), None)


WRONG_BUFFERS = {
    r"`prev_sample` must be \[5, 3, 7, 5\] float32": {"prev_sample": torch.zeros(4, 3, 7, 5)},
    r"`x0_hat` must be contiguous \(it is written\)": {"x0_hat": torch.zeros(5, 3, 5, 7).transpose(2, 3)},
    r"`signals` must be \[5, 4\] float32": {"signals": torch.zeros(5, 3)},
    r"`signals` must be \[5, 3\] float32": {"prev_sample": None},
    r"`flags` must be \[5\] int32": {"flags": torch.zeros(5)},
    r"must not require grad": {"x0_hat": torch.zeros(5, 3, 7, 5, requires_grad=True)},
}


@pytest.mark.parametrize("message", WRONG_BUFFERS)
def test_wrong_buffers_are_named(message):
    with pytest.raises(ValueError, match=message):
        run(make_step(), None, **WRONG_BUFFERS[message])


def on_meta(step: WholeStep) -> WholeStep:
    return replace(
        step, **{name: tensor.to("meta") for name, tensor in vars(step).items() if tensor is not None}
    )


@pytest.mark.parametrize("update", [True, False])
def test_meta_tensors_are_checked_and_never_read(update):
    step = on_meta(make_step(torch.float32, torch.float16))
    buffers = {"x0_hat": torch.empty(5, 3, 7, 5), "signals": torch.empty(5, 4 if update else 3)}
    buffers |= {"flags": torch.zeros(5, dtype=torch.int32)}
    buffers = {name: buffer.to("meta") for name, buffer in buffers.items()}
    assert run(step, None, update, **buffers).x0_hat.device.type == "meta"
    with pytest.raises(ValueError, match=r"`flags` must be .* on meta"):
        run(step, None, update, **buffers | {"flags": torch.zeros(5, dtype=torch.int32)})


def op_arguments(step: WholeStep, update: bool) -> tuple:
    """Positional arguments of the op, with buffers."""
    empty = (
        torch.zeros_like(step.sample),
        torch.zeros(5, 4 if update else 3),
        torch.zeros(5, dtype=torch.int32),
    )
    return (*vars(step).values(), torch.zeros_like(step.sample) if update else None, *empty)


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("update", [True, False])
def test_opcheck(impl, update):
    names = [argument.name for argument in torch.ops.amg.guided_step_into.default._schema.arguments]
    step = make_step(torch.float32, torch.float16)
    assert names[: len(vars(step))] == list(vars(step)) and names[-1] == "impl"
    torch.library.opcheck(torch.ops.amg.guided_step_into.default, (*op_arguments(step, update), impl))


@each_impl
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compilation_keeps_the_op_its_numbers_and_its_mutations(impl, dynamic):
    step = make_step()

    def around(sample, state, prev_sample, flags):
        more = replace(step, sample=sample * 2, state=None)
        x0_hat, signals = torch.empty_like(sample), sample.new_empty((5, 4))
        tensors, keywords = more.arguments()
        buffers = {"prev_sample": prev_sample, "x0_hat": x0_hat, "signals": signals, "flags": flags}
        kernels.guided_step_into(*tensors, **keywords, **buffers, state=state, impl=impl)
        return prev_sample * 2, x0_hat + 1, signals, state + flags.sum()

    def fresh() -> tuple:
        return (
            step.sample,
            step.state.clone(),
            torch.zeros_like(step.sample),
            torch.zeros(5, dtype=torch.int32),
        )

    eager, compiled = fresh(), fresh()
    torch._dynamo.reset()
    truth = around(*eager)
    found = torch.compile(around, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*compiled)
    for output, expected in zip((*found, *compiled), (*truth, *eager), strict=True):
        assert torch.equal(output, expected)


def test_who_listens_to_the_dispatcher_hears_the_op():
    """Otherwise it is passed by on CPU: see ops.nobody_listens."""
    heard = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    step, truth = make_step(), run(make_step(), None)
    with Listener():
        found = run(step, None)
    assert heard.count("amg.guided_step_into.default") == 1
    assert_same(found, truth)


GUARDED = """
import ctypes, mmap, torch, amg.kernels as kernels

def at_the_end(tensor):
    # A copy whose last byte is the last of its page; the page after it may not be touched.
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
    moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return moved.view(tensor.shape).copy_(tensor)

torch.manual_seed(0)
rows = torch.tensor([[0, -1], [3, 2], [0, 1], [2, -1]], dtype=torch.int32)
for width in (1, 3, 7, 9, 16, 17, 65, 1000):
    for dtype, network in ((torch.float32,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)):
        for count in (1, 2, 3):
            output, neighbour, gradient = (torch.rand(n, width).to(network) for n in (4, 2, 3))
            sample, noise = torch.rand(2, 2, width).to(dtype)
            keywords = dict(similarity=torch.tensor([0.8, 0.9]), noise=noise, coefficients=torch.rand(2, 42),
                            rows=rows, state=torch.rand(count, 2, width), output_scale=torch.rand(2),
                            prev_sample=sample.clone(), x0_hat=sample.clone(), signals=torch.rand(2, 4),
                            flags=torch.zeros(2, dtype=torch.int32))
            tensors = (sample, output, output, neighbour, gradient)
            moved = {name: at_the_end(value) for name, value in keywords.items()}
            kernels.guided_step_into(*map(at_the_end, tensors), **moved, impl="cpp")
            kernels.guided_step_into(*tensors, **keywords, impl="cpp")
            assert all(torch.equal(value, keywords[name]) for name, value in moved.items())
print("nothing beyond the end was touched")
"""


@needs_extension
def test_cpp_touches_nothing_beyond_the_last_byte():
    """In its own process, because a fault ends it."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", GUARDED], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "nothing beyond the end was touched\n"
