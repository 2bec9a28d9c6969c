"""Contract of guided_step: coefficients, result types and argument checks shared by every implementation."""

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import describe

MAX_STATES = 3
COEFFICIENTS = (
    "k_sample",
    "k_eps",
    "k_noise",
    "sqrt_one_minus_alpha_bar",
    "inv_sqrt_alpha_bar",
    "threshold",
    "s0",
    "c1",
    "c2",
    "c3",
)
STEP_COEFFICIENTS = (
    *COEFFICIENTS,
    *("a", "b", "clip", "k_clipped"),
    *("e_sample", "e_output", "scale", "next_scale"),
    *(f"h{j}" for j in range(MAX_STATES)),
    *(f"A{i}{j}" for i in range(MAX_STATES) for j in range(MAX_STATES)),
    *(f"B{i}_{of}" for i in range(MAX_STATES) for of in ("sample", "output", "clipped", "noise")),
)
NARROW, WIDE = len(COEFFICIENTS), len(STEP_COEFFICIENTS)
WIDTHS = (NARROW, WIDE)
HALF = (torch.float16, torch.bfloat16)
SINGLE, DOUBLE, COUNTS = (torch.float32,), (torch.float32, torch.float64), (torch.int32,)


def coefficient_index(name: str) -> int:
    """Return the column of a coefficient of STEP_COEFFICIENTS; ValueError for a name it does not have."""
    if name not in STEP_COEFFICIENTS:
        raise ValueError(f"`name` must be one of STEP_COEFFICIENTS, got {name!r}")
    return STEP_COEFFICIENTS.index(name)


class GuidedStep(NamedTuple):
    """x_{t-1}, x̂0 (both like `sample`) and the free signals [B, 4]; the signals are described in ops.py."""

    prev_sample: Tensor
    x0_hat: Tensor
    signals: Tensor


class PredictX0(NamedTuple):
    """x̂0 of the plain CFG estimate (like `sample`) and its free signals [B, 3]."""

    x0_hat: Tensor
    signals: Tensor


class StepTensors(NamedTuple):
    """Every tensor of one call in the op's order, the last four and `state` written; see ops.py."""

    sample: Tensor
    eps_uncond: Tensor
    eps_cond: Tensor
    eps_neighbour: Tensor | None
    similarity_grad: Tensor | None
    similarity: Tensor | None
    noise: Tensor | None
    coefficients: Tensor
    rows: Tensor | None
    state: Tensor | None
    output_scale: Tensor | None
    prev_sample: Tensor | None
    x0_hat: Tensor | None
    signals: Tensor | None
    flags: Tensor | None


NETWORK = StepTensors._fields[1:5]  # the tensors that `rows` numbers, in its order


def check_step(t: StepTensors) -> None:
    """Raise ValueError unless shapes, dtypes, devices and layouts are the op's. Looks at no value.

    An engine calls this at every step, so the tensors are gone through in as few Python operations as can be.
    """
    sample, coefficients, state = t.sample, t.coefficients, t.state
    shape, dtype, device = sample.shape, sample.dtype, sample.device
    if len(shape) < 2 or not dtype.is_floating_point:
        raise ValueError(f"`sample` must be floating [B, ...], got {describe(sample)}")
    batch, like = shape[:1], (dtype,)
    scalars = DOUBLE if dtype == torch.float64 else SINGLE
    exact = scalars[-1:]
    check_network(t, shape, dtype, device)
    check_coefficients(coefficients, shape[0], scalars, device)
    if t.similarity is None:
        check_gateless(t)
    history = shape if state is None else states_shape(state, shape, coefficients)
    written = (
        ("state", state, history, exact),
        ("prev_sample", t.prev_sample, shape, like),
        ("x0_hat", t.x0_hat, shape, like),
        ("signals", t.signals, (shape[0], 3 if t.prev_sample is None else 4), exact),
        ("flags", t.flags, batch, COUNTS),
    )
    for name, tensor, expected, dtypes in (
        ("similarity", t.similarity, batch, scalars),
        ("noise", t.noise, shape, like),
        ("rows", t.rows, (4, shape[0]), COUNTS),
        ("output_scale", t.output_scale, batch, scalars),
        *written,
    ):
        if tensor is None:
            continue
        if tensor.shape != expected or tensor.dtype not in dtypes or tensor.device != device:
            refuse(name, tensor, expected, dtypes, device)
    for name, tensor, _, _ in written:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous (it is written), got strides {tensor.stride()}")


def refuse(
    name: str, tensor: Tensor, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], device: torch.device
) -> NoReturn:
    """Raise ValueError saying what `name` must be and what it is."""
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
    dimensions = ", ".join(map(str, shape))
    raise ValueError(f"`{name}` must be [{dimensions}] {allowed} on {device}, got {describe(tensor)}")


def check_network(t: StepTensors, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless the network's tensors are like `sample`, or of half precision beside fp32.

    Without rows they have the sample's shape, with them any number of rows of its shape, one at least.
    """
    output, numbered, of_row = t.eps_cond.dtype, t.rows is not None, shape[1:]
    beside = HALF if dtype == torch.float32 else ()
    like = (output,) if output in beside else (dtype,)
    for name, tensor, dtypes in (
        ("eps_cond", t.eps_cond, like),
        ("eps_uncond", None if t.eps_uncond is t.eps_cond else t.eps_uncond, like),
        ("eps_neighbour", t.eps_neighbour, like),
        ("similarity_grad", t.similarity_grad, (*like, torch.float32)),
    ):
        if tensor is None:
            continue
        found = tensor.shape
        right = found[1:] == of_row and (found[0] > 0 or not shape[0]) if numbered else found == shape
        if not right or tensor.dtype not in dtypes or tensor.device != device:
            wanted = (dtype, *beside) if name == "eps_cond" else dtypes
            refuse(name, tensor, ("N >= 1", *of_row) if numbered else shape, wanted, device)


def check_coefficients(
    coefficients: Tensor, batch: int, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise ValueError unless `coefficients` is one row of 10 or 42, or one a sample."""
    shape = coefficients.shape
    right_shape = (len(shape) == 1 or (len(shape) == 2 and shape[0] == batch)) and shape[-1] in WIDTHS
    if right_shape and coefficients.dtype in dtypes and coefficients.device == device:
        return
    raise ValueError(
        f"`coefficients` must be [K] or [B, K] float32 on {device} with K = {NARROW} or {WIDE} and "
        f"B = {batch}, got {describe(coefficients)}"
    )


def check_gateless(t: StepTensors) -> None:
    """Raise ValueError for tensors of an open gate where there is no similarity to open it."""
    for name, tensor in (("eps_neighbour", t.eps_neighbour), ("similarity_grad", t.similarity_grad)):
        if tensor is not None:
            raise ValueError(f"`{name}` needs `similarity` to open or close the gate, got None")


def states_shape(state: Tensor, shape: torch.Size, coefficients: Tensor) -> Sequence[int]:
    """Return what the shape of `state` must be; ValueError for over three, or beside ten coefficients."""
    found = state.shape
    if len(found) != len(shape) + 1 or found[0] > MAX_STATES:
        expected = ", ".join(map(str, (f"S <= {MAX_STATES}", *shape)))
        raise ValueError(f"`state` must be [{expected}], got {describe(state)}")
    if found[0] > 0 and coefficients.shape[-1] == NARROW:
        raise ValueError(f"`state` needs `coefficients` of {WIDE} columns, got {describe(coefficients)}")
    return (found[0], *shape)
