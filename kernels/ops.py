"""The kernels as torch ops: schemas, fakes, and the public functions that call them."""

import torch
from torch import Tensor

from .dispatch import choose
from .guided_step import contract as step_contract
from .guided_step.contract import GuidedStep, PredictX0
from .nl2 import contract as nl2_contract
from .nl2.contract import NL2
from .top1_cosine import contract as cosine_contract
from .top1_cosine.contract import Codes, Top1, TopK

LIBRARY = torch.library.Library("amg", "DEF")
LIBRARY.define(
    "guided_step(Tensor sample, Tensor eps_uncond, Tensor eps_cond, Tensor? eps_neighbour, "
    "Tensor? similarity_grad, Tensor? similarity, Tensor? noise, Tensor coefficients, str? impl) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "predict_x0(Tensor sample, Tensor eps_uncond, Tensor eps_cond, Tensor coefficients, str? impl) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define("encode_rows(Tensor rows, str? impl) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "topk_cosine(Tensor queries, Tensor rows, Tensor? codes, Tensor? scales, Tensor? errors, int k, "
    "str? impl) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "nl2(Tensor queries, Tensor rows, int k, float alpha, str? impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


def guided_step(
    sample: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    eps_neighbour: Tensor | None = None,
    similarity_grad: Tensor | None = None,
    *,
    similarity: Tensor | None = None,
    noise: Tensor | None = None,
    coefficients: Tensor,
    impl: str | None = None,
) -> GuidedStep:
    """Classifier-free guidance, the three AMG terms and the scheduler update in one pass (arXiv 2404.00922).

    Shapes: sample, eps_* and noise [B, C, H, W] of one dtype (fp32, fp16, bf16; fp64 in the reference);
    similarity_grad ∇_{x_t}σ alike or fp32; similarity σ [B] fp32; coefficients fp32 [10] or [B, 10] in the
    order of COEFFICIENTS. Arithmetic is fp32 inside. For a sample with σ > threshold (its gate is open)
        ε̂ = ε_u + (s0 − s1)(ε_c − ε_u) − s2(ε_N − ε_u) + c3·√(1−ᾱ)·∇σ,
        s1 = max(min(c1·σ, s0 − 1), 0),  s2 = max(min(c2·σ, s0 − s1 − 1), 0),
    otherwise ε̂ = ε_u + s0(ε_c − ε_u), and neither its eps_neighbour nor its similarity_grad is read.
    A term whose tensor is None is left out; without similarity every gate is closed.
        prev_sample = k_sample·x_t + k_eps·ε̂ + k_noise·noise,  x0_hat = (x_t − √(1−ᾱ)·ε̂)/√ᾱ.
    Returns GuidedStep(prev_sample, x0_hat, signals); signals [B, 4] fp32 are ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩,
    ‖ε_u‖² and ‖x_{t−1} − x_t‖², the same from run to run. ValueError on a wrong shape, dtype, device,
    an input that requires grad, and on CPU a non-finite similarity or a missing noise; on a GPU, where
    looking would stall, a non-finite similarity makes that sample's outputs NaN.
    `impl` names the implementation: "reference", "cpp" or "triton"; None takes the fastest there is.
    """
    tensors = (eps_neighbour, similarity_grad, similarity, noise)
    refuse_grad(sample, eps_uncond, eps_cond, *tensors, coefficients)
    return GuidedStep(*torch.ops.amg.guided_step(sample, eps_uncond, eps_cond, *tensors, coefficients, impl))


def predict_x0(
    sample: Tensor, eps_uncond: Tensor, eps_cond: Tensor, *, coefficients: Tensor, impl: str | None = None
) -> PredictX0:
    """First half of guided_step: x0_hat of the plain CFG estimate, for when σ must be known first.

    Arguments, arithmetic and errors as in guided_step. Returns PredictX0(x0_hat like sample,
    signals [B, 3] fp32: ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩, ‖ε_u‖²).
    """
    refuse_grad(sample, eps_uncond, eps_cond, coefficients)
    return PredictX0(*torch.ops.amg.predict_x0(sample, eps_uncond, eps_cond, coefficients, impl))


def encode_rows(rows: Tensor, *, impl: str | None = None) -> Codes:
    """int8 screening codes of rows [N, D] (fp32, fp16, bf16): Codes(codes [N, D], scales [N], errors [N]).

    ‖r − scales·codes‖₂ ≤ errors holds exactly for every row (the error is rounded up). ValueError on a
    wrong shape or dtype and on non-finite rows.
    """
    refuse_grad(rows)
    return Codes(*torch.ops.amg.encode_rows(rows, impl))


def top1_cosine(
    queries: Tensor, rows: Tensor, *, codes: Codes | None = None, impl: str | None = None
) -> Top1:
    """The nearest of N unit rows to each query, exactly: Top1(similarity [B] fp32, row [B] int64).

    queries [B, D] floating, normalised here; rows [N, D] fp32, fp16 or bf16, unit by contract and used as
    stored. The similarity is the float64 dot product rounded to fp32; ties go to the lowest row. codes
    (from encode_rows) only save work: they screen, the rows decide. ValueError on a wrong shape, dtype or
    device, on a zero or non-finite query and on non-finite rows.
    """
    similarity, row = topk_cosine(queries, rows, 1, codes=codes, impl=impl)
    return Top1(similarity.squeeze(1), row.squeeze(1))


def topk_cosine(
    queries: Tensor, rows: Tensor, k: int, *, codes: Codes | None = None, impl: str | None = None
) -> TopK:
    """The k ≤ min(1024, N) nearest rows, best first, ties to the lowest row; otherwise as top1_cosine."""
    refuse_grad(queries, rows)
    parts = (None, None, None) if codes is None else codes
    return TopK(*torch.ops.amg.topk_cosine(queries, rows, *parts, k, impl))


def nl2(queries: Tensor, rows: Tensor, *, k: int = 50, alpha: float = 0.5, impl: str | None = None) -> NL2:
    """nL2 (Carlini et al. 2023): ℓ2(q, n0) / (α · mean ℓ2 to the k nearest rows), ℓ2 = √mean((a−b)²).

    queries [B, P] floating in [0, 1]; rows [N, P] uint8 (read as fp32 r/255) or floating; k is capped at N.
    Returns NL2(value [B], row [B] int64 of the nearest n0, distance = ℓ2(q, n0), denominator = α·mean),
    fp32, from float64 direct differences; ties go to the lowest row; 0/0 (k copies) is 0. Smaller is closer:
    σ = −value. ValueError on a wrong shape, dtype, device, k, alpha, and on non-finite queries or rows.
    """
    refuse_grad(queries, rows)
    return NL2(*torch.ops.amg.nl2(queries, rows, k, alpha, impl))


def refuse_grad(*tensors: Tensor | None) -> None:
    """Raise ValueError for an input that requires grad: the kernels have no backward."""
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("inputs must not require grad (the kernels have no backward): detach them")


def guided_step_op(
    sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, noise, coefficients, impl
):
    eps = (("eps_uncond", eps_uncond), ("eps_cond", eps_cond), ("eps_neighbour", eps_neighbour))
    step_contract.check_sample(sample, *eps)
    step_contract.check_like_sample("similarity_grad", similarity_grad, sample, torch.float32)
    step_contract.check_coefficients(coefficients, sample)
    needs_it = {"eps_neighbour": eps_neighbour, "similarity_grad": similarity_grad}
    step_contract.check_similarity(similarity, sample, **needs_it)
    step_contract.check_noise(noise, coefficients, sample)
    run = choose("guided_step", sample, impl)
    return run(sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, noise, coefficients)


def predict_x0_op(sample, eps_uncond, eps_cond, coefficients, impl):
    step_contract.check_sample(sample, ("eps_uncond", eps_uncond), ("eps_cond", eps_cond))
    step_contract.check_coefficients(coefficients, sample)
    return choose("predict_x0", sample, impl)(sample, eps_uncond, eps_cond, coefficients)


def encode_rows_op(rows, impl):
    cosine_contract.check_rows(rows)
    return choose("encode_rows", rows, impl)(rows)


def topk_cosine_op(queries, rows, codes, scales, errors, k, impl):
    cosine_contract.check_rows(rows)
    cosine_contract.check_queries(queries, rows)
    cosine_contract.check_k(k, len(rows))
    parts = None if codes is None else Codes(codes, scales, errors)
    cosine_contract.check_codes(parts, rows)
    return choose("topk_cosine", rows, impl)(queries, rows, parts, k)


def nl2_op(queries, rows, k, alpha, impl):
    nl2_contract.check_rows(rows)
    nl2_contract.check_queries(queries, rows)
    nl2_contract.check_parameters(k, alpha)
    return choose("nl2", rows, impl)(queries, rows, min(k, len(rows)), alpha)


def wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def guided_step_fake(
    sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, noise, coefficients, impl
):
    outputs = [sample.new_empty(sample.shape) for _ in range(2)]
    return *outputs, sample.new_empty((sample.shape[0], 4), dtype=wide(sample))


def predict_x0_fake(sample, eps_uncond, eps_cond, coefficients, impl):
    return sample.new_empty(sample.shape), sample.new_empty((sample.shape[0], 3), dtype=wide(sample))


def encode_rows_fake(rows, impl):
    per_row = [rows.new_empty(rows.shape[:1], dtype=torch.float32) for _ in range(2)]
    return rows.new_empty(rows.shape, dtype=torch.int8), *per_row


def topk_cosine_fake(queries, rows, codes, scales, errors, k, impl):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def nl2_fake(queries, rows, k, alpha, impl):
    value, distance, denominator = (
        queries.new_empty(queries.shape[:1], dtype=torch.float32) for _ in range(3)
    )
    return value, queries.new_empty(queries.shape[:1], dtype=torch.int64), distance, denominator


for name in ("guided_step", "predict_x0", "encode_rows", "topk_cosine", "nl2"):
    LIBRARY.impl(name, globals()[f"{name}_op"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"amg::{name}", globals()[f"{name}_fake"], lib=LIBRARY)
