"""Inputs of the whole step, its equations in float64, and how far outputs may lie from them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels import STEP_COEFFICIENTS

ULP = 2.0**-24  # relative error of one fp32 rounding
SIMILARITY = [0.1, 0.45, 0.9, 0.4, 0.7]  # closed, open, open and clipped, closed (not above), open
THRESHOLD = 0.4
ROWS = [[3, -1, 0, 5, -1], [1, 2, 3, 4, 6], [-1, 1, 0, 1, -1], [2, 0, -1, 1, 1]]
COUNTS = (7, 7, 2, 3)  # rows of eps_uncond, eps_cond (one tensor), eps_neighbour, similarity_grad
BATCH = len(SIMILARITY)


@dataclass(frozen=True)
class WholeStep:
    """Arguments of guided_step_into but for its buffers."""

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

    @property
    def states(self) -> int:
        return 0 if self.state is None else len(self.state)

    def column(self, name: str, i: int) -> float:
        row = self.coefficients.expand(len(self.sample), -1)[i]
        return float(row[STEP_COEFFICIENTS.index(name)])

    def with_column(self, **values: float | list[float]) -> "WholeStep":
        coefficients = self.coefficients.clone()
        for name, value in values.items():
            coefficients[..., STEP_COEFFICIENTS.index(name)] = torch.as_tensor(
                value, dtype=coefficients.dtype
            )
        return replace(self, coefficients=coefficients)

    def double(self) -> "WholeStep":
        fields = {
            name: tensor for name, tensor in vars(self).items() if tensor is not None and name != "rows"
        }
        return replace(self, **{name: tensor.double() for name, tensor in fields.items()})

    def arguments(self) -> tuple[tuple, dict]:
        """Positional and keyword arguments of the public functions, without the state."""
        tensors = (self.sample, self.eps_uncond, self.eps_cond, self.eps_neighbour, self.similarity_grad)
        names = ("similarity", "noise", "coefficients", "rows", "output_scale")
        return tensors, {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Outcome:
    """Everything a step writes; signals and flags as the op lays them out."""

    prev_sample: Tensor | None
    x0_hat: Tensor | None
    signals: Tensor | None
    flags: Tensor | None
    state: Tensor | None


def make_step(
    dtype: torch.dtype = torch.float32,
    network: torch.dtype | None = None,
    of_sample: tuple[int, ...] = (3, 7, 5),
    states: int = 2,
    seed: int = 0,
) -> WholeStep:
    """Five samples with every kind of gate and row, 42 random coefficients each, two of them with a clip."""
    generator = torch.Generator().manual_seed(seed)
    network = network or dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, *of_sample, generator=generator)

    output = normal(COUNTS[0]).to(network)
    coefficients = torch.rand(BATCH, len(STEP_COEFFICIENTS), generator=generator) * 1.5 + 0.2
    coefficients *= torch.where(torch.rand(coefficients.shape, generator=generator) < 0.3, -1, 1)
    step = WholeStep(
        normal(BATCH).to(dtype),
        output,
        output,
        normal(COUNTS[2]).to(network),
        (normal(COUNTS[3]) * 0.1).to(network),
        torch.tensor(SIMILARITY),
        normal(BATCH).to(dtype),
        coefficients,
        torch.tensor(ROWS, dtype=torch.int32),
        normal(states, BATCH) if states else None,
        torch.rand(BATCH, generator=generator) + 0.5,
    )
    clip = [0.8, torch.inf, 1.5, torch.inf, torch.inf]
    return step.with_column(threshold=THRESHOLD, s0=7.5, c1=6.0, c2=9.0, c3=30.0, clip=clip)


def oracle_sample(step: WholeStep, i: int) -> dict[str, Tensor]:
    """One sample by the README's equations; `step` in float64."""
    k = {name: step.column(name, i) for name in STEP_COEFFICIENTS}
    rows = [i] * 4 if step.rows is None else step.rows[:, i].tolist()
    x_t, m_cond = step.sample[i], step.eps_cond[rows[1]]
    m_uncond = m_cond if rows[0] < 0 else step.eps_uncond[rows[0]]
    scale = 1.0 if step.output_scale is None else float(step.output_scale[i])
    output = scale * (m_uncond + k["s0"] * (m_cond - m_uncond))
    sigma = -torch.inf if step.similarity is None else float(step.similarity[i])
    if sigma > k["threshold"]:
        s1 = max(min(k["c1"] * sigma, k["s0"] - 1), 0.0)
        s2 = max(min(k["c2"] * sigma, k["s0"] - s1 - 1), 0.0)
        output = output - s1 * (m_cond - m_uncond)
        if step.eps_neighbour is not None and rows[2] >= 0:
            output = output - s2 * (step.eps_neighbour[rows[2]] - m_uncond)
        if step.similarity_grad is not None and rows[3] >= 0:
            push = k["c3"] * k["sqrt_one_minus_alpha_bar"] / k["e_output"]
            output = output + push * step.similarity_grad[rows[3]]
    x0_hat = k["a"] * x_t + k["b"] * output
    clipped = x0_hat.clamp(-k["clip"], k["clip"])
    noise = torch.zeros_like(x_t) if step.noise is None else step.noise[i]
    before = [] if step.state is None else [state[i] for state in step.state]
    prev = k["k_sample"] * x_t + k["k_eps"] * output + k["k_clipped"] * clipped + k["k_noise"] * noise
    prev = prev + sum(k[f"h{j}"] * state for j, state in enumerate(before))
    after = [
        sum(k[f"A{n}{j}"] * state for j, state in enumerate(before))
        + (k[f"B{n}_sample"] * x_t + k[f"B{n}_output"] * output)
        + (k[f"B{n}_clipped"] * clipped + k[f"B{n}_noise"] * noise)
        for n in range(len(before))
    ]
    eps_u = k["e_sample"] * x_t + k["e_output"] * m_uncond
    delta = k["e_output"] * (m_cond - m_uncond)
    moved = k["next_scale"] * prev - k["scale"] * x_t
    products = (delta * delta, eps_u * delta, eps_u * eps_u, moved * moved)
    state = torch.stack(after) if after else x_t.new_zeros((0, *x_t.shape))
    signals = torch.stack([product.sum() for product in products])
    return {"prev_sample": prev, "x0_hat": x0_hat, "signals": signals, "state": state, "output": output}


def oracle(step: WholeStep) -> dict[str, Tensor]:
    """Every sample's, stacked: state is [S, B, ...]."""
    exact = step.double()
    found = [oracle_sample(exact, i) for i in range(len(step.sample))]
    return {name: torch.stack([one[name] for one in found], dim=int(name == "state")) for name in found[0]}


def run(step: WholeStep, impl: str | None, update: bool = True, **changes: Tensor | None) -> Outcome:
    """Run the step into buffers full of NaN, flags 0; `changes` replace buffers, None leaves one out."""
    sample, wide = step.sample, torch.promote_types(step.sample.dtype, torch.float32)
    buffers: dict[str, Tensor | None] = {
        "prev_sample": torch.full_like(sample, torch.nan) if update else None,
        "x0_hat": torch.full_like(sample, torch.nan),
        "signals": torch.full((len(sample), 4 if update else 3), torch.nan, dtype=wide),
        "flags": torch.zeros(len(sample), dtype=torch.int32),
        **changes,
    }
    state = None if step.state is None else step.state.clone()
    tensors, keywords = step.arguments()
    kernels.guided_step_into(*tensors, **keywords, state=state, **buffers, impl=impl)
    return Outcome(**buffers, state=state)


def assert_equals_oracle(found: Outcome, step: WholeStep, truncates: bool = False) -> None:
    """A few fp32 roundings of the largest magnitude, one rounding to the output's dtype; no flag is set.

    `truncates`: fp32 is cut down to bf16, as Triton's interpreter does it, not rounded.
    """
    truth = oracle(step)
    exact = found.signals is not None and found.signals.dtype == torch.float64
    roundings = 64 * (2.0**-53 if exact else ULP)
    magnitude = max(float(truth[name].abs().max()) for name in ("prev_sample", "x0_hat", "output"))
    if step.states:
        magnitude = max(magnitude, float(truth["state"].abs().max()))
    for name in ["x0_hat", *["prev_sample", "state"] * (found.prev_sample is not None)]:
        output: Tensor | None = getattr(found, name)
        if output is None:
            continue
        rounding = torch.finfo(output.dtype).eps / (1 if truncates and output.dtype == torch.bfloat16 else 2)
        allowed = rounding * truth[name].abs() + roundings * magnitude
        error = (output.double() - truth[name]).abs()
        assert (error <= allowed).all(), f"{name}: error {error.max():.3g}"
    if found.signals is not None:
        expected = truth["signals"][:, : found.signals.shape[1]]
        largest = expected.abs().max(dim=1, keepdim=True).values
        assert ((found.signals.double() - expected).abs() <= 4 * roundings * largest).all()
    if found.flags is not None:
        assert not found.flags.any()


def assert_same(found: Outcome, truth: Outcome) -> None:
    """Equal to the bit, NaN where the other has NaN."""
    for name, expected in vars(truth).items():
        output = getattr(found, name)
        assert (output is None) == (expected is None), name
        if output is not None:
            torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
