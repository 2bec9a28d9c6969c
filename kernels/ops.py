"""The kernels as torch ops: schemas, fakes, and the public functions that call them."""

import torch
from torch import Tensor

from .dispatch import choose
from .guided_step import contract as step_contract
from .guided_step.contract import GuidedStep, PredictX0, StepTensors
from .near_pairs import contract as pairs_contract
from .near_pairs.contract import NearPairs
from .nl2 import contract as nl2_contract
from .nl2.contract import NL2
from .top1_cosine import contract as cosine_contract
from .top1_cosine.contract import Codes, Panels, Top1, TopK
from .top1_cosine.panels import encode_panels as panels_of

LIBRARY = torch.library.Library("amg", "DEF")
LIBRARY.define(
    "guided_step_into(Tensor sample, Tensor eps_uncond, Tensor eps_cond, Tensor? eps_neighbour, "
    "Tensor? similarity_grad, Tensor? similarity, Tensor? noise, Tensor coefficients, Tensor? rows, "
    "Tensor(a!)? state, Tensor? output_scale, Tensor(b!)? prev_sample, Tensor(c!)? x0_hat, "
    "Tensor(d!)? signals, Tensor(e!)? flags, str? impl) -> ()"
)
LIBRARY.define("encode_rows(Tensor rows, str? impl) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "topk_cosine(Tensor queries, Tensor rows, Tensor? codes, Tensor? scales, Tensor? errors, int k, "
    "str? impl, Tensor? squares=None, Tensor? rotation=None, Tensor? limit=None) -> (Tensor, Tensor)"
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
    rows: Tensor | None = None,
    state: Tensor | None = None,
    output_scale: Tensor | None = None,
    impl: str | None = None,
) -> GuidedStep:
    """Classifier-free guidance, the three AMG terms and the scheduler update in one pass (arXiv 2404.00922).

    For a network that predicts noise and ten coefficients in the order of COEFFICIENTS: for a sample with
    σ > threshold (its gate is open)
        ε̂ = ε_u + (s0 − s1)(ε_c − ε_u) − s2(ε_N − ε_u) + c3·√(1−ᾱ)·∇σ,
        s1 = max(min(c1·σ, s0 − 1), 0),  s2 = max(min(c2·σ, s0 − s1 − 1), 0),
    otherwise ε̂ = ε_u + s0(ε_c − ε_u). A term whose tensor is None is left out; without similarity every gate
    is closed.
        prev_sample = k_sample·x_t + k_eps·ε̂ + k_noise·noise,  x0_hat = (x_t − √(1−ᾱ)·ε̂)/√ᾱ.
    Arguments, other networks, schedulers with a history, and errors: guided_step_into. Returns
    GuidedStep(prev_sample, x0_hat, signals) in new tensors; `state` is advanced in place.
    """
    prev_sample, x0_hat = sample.new_empty(sample.shape), sample.new_empty(sample.shape)
    signals = sample.new_empty((*sample.shape[:1], 4), dtype=wide(sample))
    guided_step_into(
        *(sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad),
        similarity=similarity,
        noise=noise,
        coefficients=coefficients,
        rows=rows,
        state=state,
        output_scale=output_scale,
        prev_sample=prev_sample,
        x0_hat=x0_hat,
        signals=signals,
        impl=impl,
    )
    return GuidedStep(prev_sample, x0_hat, signals)


def predict_x0(
    sample: Tensor, eps_uncond: Tensor, eps_cond: Tensor, *, coefficients: Tensor, impl: str | None = None
) -> PredictX0:
    """First half of guided_step: x0_hat of the plain CFG estimate, for when σ must be known first.

    Arguments, arithmetic and errors as in guided_step. Returns PredictX0(x0_hat like sample,
    signals [B, 3] fp32: ‖ε_c − ε_u‖², ⟨ε_u, ε_c − ε_u⟩, ‖ε_u‖²).
    """
    x0_hat = sample.new_empty(sample.shape)
    signals = sample.new_empty((*sample.shape[:1], 3), dtype=wide(sample))
    guided_step_into(
        *(sample, eps_uncond, eps_cond), coefficients=coefficients, x0_hat=x0_hat, signals=signals, impl=impl
    )
    return PredictX0(x0_hat, signals)


def guided_step_into(
    sample: Tensor,
    eps_uncond: Tensor,
    eps_cond: Tensor,
    eps_neighbour: Tensor | None = None,
    similarity_grad: Tensor | None = None,
    *,
    similarity: Tensor | None = None,
    noise: Tensor | None = None,
    coefficients: Tensor,
    rows: Tensor | None = None,
    state: Tensor | None = None,
    output_scale: Tensor | None = None,
    prev_sample: Tensor | None = None,
    x0_hat: Tensor | None = None,
    signals: Tensor | None = None,
    flags: Tensor | None = None,
    impl: str | None = None,
) -> None:
    """The whole step of a batch, written into the buffers that are given; the maths: guided_step/README.md.

    sample [B, ...] fp32, fp16 or bf16 (fp64 in the reference), rank 2 at least; eps_* the network's outputs
    m in its own parameterisation, [B, ...] of one dtype: the sample's, or fp16 or bf16 beside fp32;
    similarity_grad ∇_{x_t}σ alike or fp32; similarity σ [B] fp32; noise like sample. coefficients fp32 [K] or
    [B, K]: K = 10 in the order of COEFFICIENTS, or K = 42 in that of STEP_COEFFICIENTS.
    rows int32 [4, B]: which row of eps_uncond, eps_cond, eps_neighbour, similarity_grad belongs to sample b;
    each then has any number N ≥ 1 of rows, and two may be one tensor. −1: the sample has none, so that
    m_u = m_c or the term is left out; its eps_cond must be there.
    output_scale [B] fp32 multiplies plain guidance. state [S ≤ 3, B, ...] fp32 is the scheduler's history.
    Buffers, contiguous: prev_sample and x0_hat like sample, signals fp32 [B, 4]: ‖ε_c − ε_u‖²,
    ⟨ε_u, ε_c − ε_u⟩, ‖ε_u‖² and ‖x_{t−1} − x_t‖² in the network's input, the same from run to run; flags
    int32 [B]: 1 where a sample's signals are not finite, otherwise untouched. What is None is not written;
    without prev_sample there is no update: state stays and signals are [B, 3]. prev_sample may be sample
    itself outside torch.compile; no other buffer may overlap an input.
    Arithmetic is fp32. What a coefficient of 0 multiplies is not read: a closed sample's eps_neighbour and
    similarity_grad, noise, states. No value is looked at on the host: a non-finite σ, or a row number outside
    eps_cond, makes that sample's outputs NaN (elsewhere such a number counts as −1); missing noise counts
    as 0. ValueError on a wrong shape, dtype, device or layout and, where gradients are recorded, on a tensor
    that requires one.
    `impl` names the implementation: "reference", "cpp" or "triton"; None takes the fastest there is.
    """
    tensors = (sample, eps_uncond, eps_cond, eps_neighbour, similarity_grad, similarity, noise, coefficients)
    buffers = (rows, state, output_scale, prev_sample, x0_hat, signals, flags)
    if torch.is_grad_enabled():
        refuse_grad(*tensors, *buffers)
    if nobody_listens(sample):
        guided_step_into_op(*tensors, *buffers, impl)
    else:
        torch.ops.amg.guided_step_into.default(*tensors, *buffers, impl)


def encode_rows(rows: Tensor, *, impl: str | None = None) -> Codes:
    """int8 screening codes of rows [N, D] (fp32, fp16, bf16): Codes(codes [N, D], scales [N], errors [N]).

    ‖r − scales·codes‖₂ ≤ errors holds exactly for every row (the error is rounded up). ValueError on a
    wrong shape or dtype and on non-finite rows: rows are checked here, once, and in no search.
    """
    refuse_grad(rows)
    return Codes(*torch.ops.amg.encode_rows(rows, impl))


def encode_panels(rows: Tensor, *, rotation: Tensor | None = None, impl: str | None = None) -> Panels:
    """int8 screening codes of rows [N, D] (fp32, fp16, bf16) for searches on the CPU, by columns: see Panels.

    rotation float64 [D, D], orthonormal: codes are of rows @ rotation, so that the first columns may hold
    what tells rows apart. ValueError on a wrong shape, dtype or rotation and on non-finite rows. `impl`: of
    encode_rows.
    """
    refuse_grad(rows, rotation)
    return panels_of(rows, rotation, impl)


def top1_cosine(
    queries: Tensor,
    rows: Tensor,
    *,
    codes: Codes | Panels | None = None,
    limit: float | Tensor | None = None,
    impl: str | None = None,
) -> Top1:
    """The nearest of N unit rows to each query, exactly: Top1(similarity [B] fp32, row [B] int64).

    queries [B, D] floating, normalised here; rows [N, D] fp32, fp16 or bf16, unit by contract and used as
    stored. The similarity is the float64 dot product rounded to fp32; ties go to the lowest row. codes
    (from encode_rows, or encode_panels on the CPU) only save work: they screen, the rows decide. limit, a
    number or fp32 [B]: rows of a smaller similarity are of no interest; where there is no other, similarity
    is −inf and row −1, all else is as without it. No value is looked at on the host: a
    query that is zero (of norm < 1e-150) or not finite has similarity NaN and row 0, others are untouched;
    rows must be finite (and below 1e18 in the C++), else similarity NaN and row 0 where a search meets one
    that is not. ValueError on a wrong shape, dtype or device.
    """
    similarity, row = topk_cosine(queries, rows, 1, codes=codes, limit=limit, impl=impl)
    return Top1(similarity.squeeze(1), row.squeeze(1))


def topk_cosine(
    queries: Tensor,
    rows: Tensor,
    k: int,
    *,
    codes: Codes | Panels | None = None,
    limit: float | Tensor | None = None,
    impl: str | None = None,
) -> TopK:
    """The k ≤ min(1024, N) nearest rows, best first, ties to the lowest row; otherwise as top1_cosine."""
    refuse_grad(queries, rows)
    if limit is not None and not isinstance(limit, Tensor):
        limit = torch.full(queries.shape[:1], limit, dtype=torch.float32, device=queries.device)
    parts = (None, None, None) if codes is None else codes[:3]
    further = codes[3:] if isinstance(codes, Panels) else (None, None)
    return TopK(*torch.ops.amg.topk_cosine(queries, rows, *parts, k, impl, *further, limit))


def nl2(queries: Tensor, rows: Tensor, *, k: int = 50, alpha: float = 0.5, impl: str | None = None) -> NL2:
    """nL2 (Carlini et al. 2023): ℓ2(q, n0) / (α · mean ℓ2 to the k nearest rows), ℓ2 = √mean((a−b)²).

    queries [B, P] floating in [0, 1]; rows [N, P] uint8 (read as fp32 r/255) or floating; k is capped at N.
    Returns NL2(value [B], row [B] int64 of the nearest n0, distance = ℓ2(q, n0), denominator = α·mean),
    fp32, from float64 direct differences; ties go to the lowest row; 0/0 (k copies) is 0. Smaller is closer:
    σ = −value. No value is looked at on the host: value, distance and denominator are NaN and row 0 for a
    query that is not finite, others are untouched, and where a search meets a row that is not finite (the C++
    takes values below 1e18). ValueError on a wrong shape, dtype, device, k, alpha.
    """
    refuse_grad(queries, rows)
    return NL2(*torch.ops.amg.nl2(queries, rows, k, alpha, impl))


def near_pairs(
    rows: Tensor,
    others: Tensor,
    *,
    sketches: Tensor,
    codes: Codes,
    least: float,
    earlier: bool = False,
    impl: str | None = None,
) -> NearPairs:
    """Every pair of rows [n, D] and others [m, D] of closeness ≥ least; the maths: near_pairs/README.md.

    fp32, fp16 or bf16 unit rows: closeness is ⟨a, b⟩; uint8: −√mean((a − b)²) of bytes on [0, 1], so that
    `least` is negative. sketches fp32 [n, 64] of the rows; codes: encode_rows() of the others' sketches
    [m, 64]; a sketch may never lengthen a difference (‖Pa − Pb‖ ≤ ‖a − b‖, of bytes on [0, 1]); fewer
    elements are padded with zeros. earlier: others are the rows, and only pairs with right < left are found.
    On the CPU. ValueError on a wrong shape, dtype or device, and for a sketch that is not finite.
    `impl`: "reference", "cpp" or None.
    """
    pairs_contract.check_pairs(rows, others, sketches, codes)
    return choose("near_pairs", rows, impl)(rows, others, sketches, codes, least, earlier)


def nobody_listens(tensor: Tensor) -> bool:
    """Return whether torch's dispatcher would only pass a call on: real memory, nothing traced or compiled.

    Then an op may be called directly. The dispatcher takes as long as a small step.
    """
    plain = type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()
    return plain and not torch._C._len_torch_dispatch_stack()


def refuse_grad(*tensors: Tensor | None) -> None:
    """Raise ValueError for an input that requires grad: the kernels have no backward."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            raise ValueError("inputs must not require grad (the kernels have no backward): detach them")


def guided_step_into_op(*arguments):
    *tensors, impl = arguments
    step_contract.check_step(StepTensors(*tensors))
    choose("guided_step_into", tensors[0], impl)(*tensors)


def encode_rows_op(rows, impl):
    cosine_contract.check_rows(rows)
    return choose("encode_rows", rows, impl)(rows)


def topk_cosine_op(queries, rows, codes, scales, errors, k, impl, squares=None, rotation=None, limit=None):
    cosine_contract.check_rows(rows)
    cosine_contract.check_queries(queries, rows)
    cosine_contract.check_k(k, len(rows))
    parts = None if codes is None else Codes(codes, scales, errors)
    if parts is not None and squares is not None:
        parts = Panels(codes, scales, errors, squares, rotation)
    cosine_contract.check_codes(parts, rows)
    cosine_contract.check_limit(limit, queries)
    return choose("topk_cosine", rows, impl)(queries, rows, parts, k, limit)


def nl2_op(queries, rows, k, alpha, impl):
    nl2_contract.check_rows(rows)
    nl2_contract.check_queries(queries, rows)
    nl2_contract.check_parameters(k, alpha)
    return choose("nl2", rows, impl)(queries, rows, min(k, len(rows)), alpha)


def wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def guided_step_into_fake(*arguments):
    step_contract.check_step(StepTensors(*arguments[:-1]))


def encode_rows_fake(rows, impl):
    per_row = [rows.new_empty(rows.shape[:1], dtype=torch.float32) for _ in range(2)]
    return rows.new_empty(rows.shape, dtype=torch.int8), *per_row


def topk_cosine_fake(queries, rows, codes, scales, errors, k, impl, squares=None, rotation=None, limit=None):
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def nl2_fake(queries, rows, k, alpha, impl):
    value, distance, denominator = (
        queries.new_empty(queries.shape[:1], dtype=torch.float32) for _ in range(3)
    )
    return value, queries.new_empty(queries.shape[:1], dtype=torch.int64), distance, denominator


for name in ("guided_step_into", "encode_rows", "topk_cosine", "nl2"):
    LIBRARY.impl(name, globals()[f"{name}_op"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"amg::{name}", globals()[f"{name}_fake"], lib=LIBRARY)
