"""The C++ kernels under random shapes, dtypes, layouts and values, against float64.

`pytest --hypothesis-profile=search tests/kernels/test_hammer.py` looks for new failures at random.
"""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import amg.kernels as kernels
from amg.kernels.extension import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ULP = 2.0**-24  # relative error of one fp32 rounding
KINDS = ("normal", "coarse", "near ties", "copies", "negative", "spikes", "tiny", "huge", "zeros among them")
MATRIX_LAYOUTS = ("contiguous", "transposed", "strided", "offset")
IMAGE_LAYOUTS = ("contiguous", "channels_last", "strided", "offset")
seeds = st.integers(0, 2**31)


def matrix(count: int, width: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Values that make ties, cancellation, underflow and near overflow the rule."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if kind == "coarse":
        values = (values * 2).round() / 8
    elif kind == "near ties":
        steps = torch.logspace(-9, -3, count, dtype=torch.float64)[:, None]
        values = torch.randn(1, width, generator=generator, dtype=torch.float64) + steps * values
    elif kind == "copies":
        values = values[torch.randint(max(1, count // 5), (count,), generator=generator)]
    elif kind == "negative":
        values = -values.abs()
    elif kind == "spikes":
        values = torch.where(values.abs() > 1.5, values, values * 1e-4)
    elif kind == "tiny":
        values *= 1e-7 if dtype == torch.float16 else 1e-24
    elif kind == "huge":
        values *= 1e4 if dtype == torch.float16 else 1e15
    elif kind == "zeros among them":
        values[::3] = 0
    return values.to(dtype)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides, or starting one element beyond where torch starts a tensor."""
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "channels_last":
        return tensor.to(memory_format=torch.channels_last)
    if layout == "strided":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor


# ---------------------------------------------------------------- guided_step, predict_x0


@st.composite
def step_arguments(draw) -> tuple[tuple[Tensor, ...], dict]:
    """Arguments of guided_step: every tensor in its own layout, some left out, gates on the edge."""
    shape = tuple(draw(st.integers(1, largest)) for largest in (5, 4, 20, 20))
    dtype, generator = draw(st.sampled_from(FLOATS)), torch.Generator().manual_seed(draw(seeds))
    magnitude = draw(st.sampled_from([1.0, 1e-6, 100.0]))
    tensors = [(torch.randn(shape, generator=generator) * magnitude).to(dtype) for _ in range(6)]
    if draw(st.booleans()):
        tensors[4] = tensors[4].float()
    tensors = [lay_out(tensor, draw(st.sampled_from(IMAGE_LAYOUTS))) for tensor in tensors]
    sample, eps_uncond, eps_cond, *optional, noise = tensors
    rows = torch.rand(shape[0], 10, generator=generator) * torch.tensor([2, 2, 1, 1, 3, 1, 9, 8, 8, 50])
    coefficients = lay_out(rows, "transposed") if draw(st.booleans()) else rows[0]
    threshold = coefficients[..., 5].expand(shape[0])
    edge = torch.randint(-1, 2, (shape[0],), generator=generator)
    similarity = torch.where(edge == 0, threshold, torch.nextafter(threshold, edge.float() * 9))
    far = torch.rand(shape[0], generator=generator)
    similarity = torch.where(far < 0.5, similarity, 2 * torch.rand(shape[0], generator=generator) - 0.5)
    optional = [tensor if draw(st.booleans()) else None for tensor in optional]
    keywords = {"similarity": similarity, "noise": noise, "coefficients": coefficients}
    return (sample, eps_uncond, eps_cond, *optional), keywords


def widest(tensors: tuple[Tensor | None, ...], keywords: dict, cfg_only: bool = False) -> Tensor:
    """For every element the sum of the magnitudes that rounding errors of the step are relative to."""
    coefficients = keywords["coefficients"].double().abs().expand(len(tensors[0]), 10)
    columns = [column.view(-1, 1, 1, 1) for column in coefficients.unbind(1)]
    k_sample, k_eps, k_noise, root, inv_root_alpha, _, s0, c1, c2, c3 = columns
    sigma = 0 if cfg_only else keywords["similarity"].double().abs().view(-1, 1, 1, 1)
    wide = [0 if tensor is None else tensor.double().abs() for tensor in tensors]
    sample, eps_uncond, eps_cond, neighbour, gradient = [*wide, 0, 0][:5]
    scales = 1 + s0 + (c1 + c2) * sigma
    eps = scales * (eps_uncond + eps_cond + neighbour) + c3 * root * gradient
    noise = 0 if cfg_only else k_noise * keywords["noise"].double().abs()
    return (k_sample + inv_root_alpha) * sample + (k_eps + root * inv_root_alpha) * eps + noise


def assert_close(output: Tensor, truth: Tensor, allowed: Tensor) -> None:
    """|output − truth| ≤ allowed + one rounding to the output's dtype; infinite where that overflows."""
    limits = torch.finfo(output.dtype)
    fits = truth.abs() + allowed <= limits.max
    allowed = allowed + truth.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps
    error = (output.double() - truth).abs()
    assert (error <= allowed)[fits].all(), f"error {error[fits].max():.3g}, allowed {allowed[fits].max():.3g}"
    assert (output.abs() >= limits.max * 0.99)[~fits].all()


def assert_signals(signals: Tensor, truth: Tensor, tensors: tuple[Tensor, ...], moved: Tensor) -> None:
    eps = tensors[1].double().abs() + tensors[2].double().abs()
    sums = eps.square().flatten(1).sum(1, keepdim=True).expand(-1, 3)
    if signals.shape[1] == 4:
        sums = torch.cat([sums, moved.square().flatten(1).sum(1, keepdim=True)], dim=1)
    assert ((signals.double() - truth).abs() <= 100 * ULP * sums + 1e-40).all()


@given(step_arguments())
def test_cpp_guided_step(arguments):
    tensors, keywords = arguments
    exact = [None if tensor is None else tensor.double() for tensor in tensors]
    wide = {name: tensor.double() for name, tensor in keywords.items()}
    truth = kernels.guided_step(*exact, **wide, impl="reference")
    output = kernels.guided_step(*tensors, **keywords, impl="cpp")
    magnitude = widest(tensors, keywords)
    assert_close(output.prev_sample, truth.prev_sample, 16 * ULP * magnitude)
    assert_close(output.x0_hat, truth.x0_hat, 16 * ULP * magnitude)
    assert_signals(output.signals, truth.signals, tensors, magnitude + tensors[0].double().abs())


@given(step_arguments())
def test_cpp_predict_x0(arguments):
    tensors, coefficients = arguments[0][:3], arguments[1]["coefficients"]
    exact = [tensor.double() for tensor in tensors]
    truth = kernels.predict_x0(*exact, coefficients=coefficients.double(), impl="reference")
    output = kernels.predict_x0(*tensors, coefficients=coefficients, impl="cpp")
    magnitude = widest(tensors, {"coefficients": coefficients}, cfg_only=True)
    assert_close(output.x0_hat, truth.x0_hat, 16 * ULP * magnitude)
    assert_signals(output.signals, truth.signals, tensors, magnitude)


# ---------------------------------------------------------------- the searches


@st.composite
def search_arguments(draw) -> tuple[Tensor, Tensor, int]:
    """Queries [B, D], rows [N, D] and k of a cosine search."""
    batch, count, width = draw(st.integers(1, 40)), draw(st.integers(1, 300)), draw(st.integers(1, 150))
    dtype, kind, seed = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(KINDS)), draw(seeds)
    rows = matrix(count, width, dtype, kind, seed)
    choice = torch.randint(count, (batch,), generator=torch.Generator().manual_seed(seed))
    queries = -rows[choice].float() if kind == "negative" else rows[choice].float()
    if draw(st.booleans()):
        queries = matrix(batch, width, torch.float32, "coarse", seed + 1)
    queries[(queries == 0).all(1)] = 1
    queries = queries.to(draw(st.sampled_from([torch.float32, torch.float64])))
    queries, rows = (lay_out(tensor, draw(st.sampled_from(MATRIX_LAYOUTS))) for tensor in (queries, rows))
    return queries, rows, draw(st.integers(1, min(count, 60)))


def brute_force_cosine(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dots = torch.stack([(rows.double() * query).sum(1) for query in queries.double()])
    scores = (dots / queries.double().square().sum(1, keepdim=True).sqrt()).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), order


@given(search_arguments(), st.booleans(), st.sampled_from(MATRIX_LAYOUTS))
def test_cpp_topk_cosine(arguments, screened, code_layout):
    queries, rows, k = arguments
    codes = kernels.encode_rows(rows, impl="cpp") if screened else None
    if codes is not None:
        codes = codes._replace(
            codes=lay_out(codes.codes, code_layout), scales=lay_out(codes.scales, "strided")
        )
    similarity, row = brute_force_cosine(queries, rows, k)
    result = kernels.topk_cosine(queries, rows, k, codes=codes, impl="cpp")
    assert torch.equal(result.row, row)
    torch.testing.assert_close(result.similarity, similarity, rtol=1.2e-7, atol=1e-45)
    nearest = kernels.top1_cosine(queries, rows, codes=codes, impl="cpp")
    assert torch.equal(nearest.row, row[:, 0]) and torch.equal(nearest.similarity, result.similarity[:, 0])


@given(search_arguments())
def test_cpp_encode_rows(arguments):
    rows = arguments[1]
    codes = kernels.encode_rows(rows, impl="cpp")
    lost = (rows.double() - codes.scales.double()[:, None] * codes.codes.double()).norm(dim=1)
    assert (lost <= codes.errors.double()).all()
    assert (codes.errors.double() <= lost * (1 + 3e-7) + 3e-45).all()
    truth = kernels.encode_rows(rows, impl="reference")
    assert torch.equal(codes.codes, truth.codes) and torch.equal(codes.scales, truth.scales)


@st.composite
def pixel_arguments(draw) -> tuple[Tensor, Tensor, int, float]:
    """Queries [B, P], rows [N, P], k and alpha of an nL2 search; queries lie on rows or near them."""
    batch, count, width = draw(st.integers(1, 15)), draw(st.integers(1, 250)), draw(st.integers(1, 150))
    dtype, kind, seed = (
        draw(st.sampled_from([torch.uint8, *FLOATS])),
        draw(st.sampled_from(KINDS)),
        draw(seeds),
    )
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        rows = (matrix(count, width, torch.float32, kind, seed).nan_to_num() * 40 + 128).clamp(0, 255).byte()
    else:
        rows = matrix(count, width, dtype, kind, seed)
    nearby = as_pixels(rows)[torch.randint(count, (batch,), generator=generator)]
    spread = draw(st.sampled_from([0.0, 1e-9, 1e-3, 1.0])) * nearby.abs().max()
    queries = nearby + spread * torch.randn(nearby.shape, generator=generator)
    queries = queries.to(draw(st.sampled_from([torch.float32, torch.float64])))
    queries, rows = (lay_out(tensor, draw(st.sampled_from(MATRIX_LAYOUTS))) for tensor in (queries, rows))
    return queries, rows, draw(st.integers(1, 60)), draw(st.sampled_from([0.5, 1.0, 0.3]))


def as_pixels(rows: Tensor) -> Tensor:
    return (rows.float() / 255).double() if rows.dtype == torch.uint8 else rows.double()


@given(pixel_arguments())
def test_cpp_nl2(arguments):
    queries, rows, k, alpha = arguments
    result = kernels.nl2(queries, rows, k=k, alpha=alpha, impl="cpp")
    distances = (queries.double()[:, None] - as_pixels(rows)).square().mean(2).sqrt().float()
    ordered, order = distances.sort(dim=1, stable=True)
    assert torch.equal(result.row, order[:, 0])
    denominator = alpha * ordered[:, :k].double().mean(1)
    value = torch.where(ordered[:, 0] == 0, 0.0, ordered[:, 0].double() / denominator)
    torch.testing.assert_close(result.distance, ordered[:, 0], rtol=1.2e-7, atol=1e-45)
    torch.testing.assert_close(result.denominator.double(), denominator, rtol=2.5e-7, atol=1e-45)
    torch.testing.assert_close(result.value.double(), value, rtol=4e-7, atol=0)


# ---------------------------------------------------------------- one case each


def result_of(op: str, tensors: list[Tensor], impl: str = "cpp") -> tuple[Tensor, ...]:
    """Run an op on [4, 60] (or as many rows) tensors: two matrices, or three images and more."""
    coefficients = torch.tensor([0.9, 0.25, 0.1, 0.6, 1.25, 0.4, 7.5, 6.0, 9.0, 30.0])
    similarity = torch.linspace(0.1, 0.9, len(tensors[0]))
    if op == "guided_step":
        keywords = {"similarity": similarity, "noise": tensors[5], "coefficients": coefficients}
        return kernels.guided_step(*tensors[:5], **keywords, impl=impl)
    if op == "predict_x0":
        return kernels.predict_x0(*tensors[:3], coefficients=coefficients, impl=impl)
    if op == "encode_rows":
        return kernels.encode_rows(tensors[1], impl=impl)
    if op == "nl2":
        return kernels.nl2(*tensors[:2], k=3, impl=impl)
    codes = kernels.encode_rows(tensors[1], impl=impl) if op == "topk_cosine screened" else None
    return kernels.topk_cosine(*tensors[:2], 3, codes=codes, impl=impl)


STEPS = ["guided_step", "predict_x0"]
SEARCHES = ["encode_rows", "topk_cosine", "topk_cosine screened", "nl2"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("op", "layout"),
    [(op, layout) for op in STEPS for layout in IMAGE_LAYOUTS[1:]]
    + [(op, layout) for op in SEARCHES for layout in MATRIX_LAYOUTS[1:]],
)
def test_cpp_layouts_change_nothing(op, layout, dtype):
    tensors = [torch.rand((7, 3, 5, 9) if op in STEPS else (7, 37)).to(dtype) for _ in range(6)]
    moved = [lay_out(tensor, layout) for tensor in tensors]
    assert all(torch.equal(one, other) for one, other in zip(tensors, moved, strict=True))
    assert not moved[0].is_contiguous() or moved[0].data_ptr() % 64 != 0
    for output, truth in zip(result_of(op, moved), result_of(op, tensors), strict=True):
        assert torch.equal(output, truth)


@pytest.mark.parametrize("op", SEARCHES[1:])
def test_cpp_bytes_and_codes_may_start_anywhere(op):
    queries, rows = torch.rand(3, 37), torch.randint(0, 256, (50, 37), dtype=torch.uint8)
    if op == "nl2":
        outputs, truths = (
            kernels.nl2(queries, lay_out(rows, at), impl="cpp") for at in ("offset", "contiguous")
        )
    else:
        codes = kernels.encode_rows(rows.float())
        moved = kernels.Codes(*(lay_out(part, "offset") for part in codes))
        outputs, truths = (kernels.topk_cosine(queries, rows.float(), 5, codes=c) for c in (moved, codes))
    assert all(torch.equal(output, truth) for output, truth in zip(outputs, truths, strict=True))


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 8, 0)])
def test_cpp_empty_images(op, shape):
    outputs = result_of(op, [torch.rand(shape)] * 6)
    assert outputs[-1].shape == (shape[0], 4 if op == "guided_step" else 3)
    assert all(output.shape == shape for output in outputs[:-1]) and not outputs[-1].any()


@pytest.mark.parametrize("op", SEARCHES[1:])
def test_cpp_no_queries(op):
    outputs = result_of(op, [torch.rand(0, 8), torch.rand(5, 8)])
    assert [output.shape for output in outputs] == [(0,)] * 4 if op == "nl2" else [(0, 3)] * 2


@pytest.mark.parametrize("op", SEARCHES)
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 0)])
def test_cpp_no_rows_is_an_error(op, shape):
    with pytest.raises(ValueError, match=r"`rows` must be \[N >= 1, .*got \[\d, \d\] float32 on cpu"):
        result_of(op, [torch.rand(2, shape[1]), torch.rand(shape)])


def test_cpp_one_row_of_one_element():
    rows, queries = torch.tensor([[-0.5]]), torch.tensor([[3.0], [-2.0]])
    for codes in (None, kernels.encode_rows(rows, impl="cpp")):
        nearest = kernels.top1_cosine(queries, rows, codes=codes, impl="cpp")
        assert nearest.similarity.tolist() == [-0.5, 0.5] and nearest.row.tolist() == [0, 0]
    value, row, distance, denominator = kernels.nl2(queries, rows, impl="cpp")
    assert (value.tolist(), row.tolist()) == ([2.0, 2.0], [0, 0])
    assert (distance.tolist(), denominator.tolist()) == ([3.5, 1.5], [1.75, 0.75])


def test_cpp_numbers_beyond_what_fp32_can_square_are_nan():
    rows, queries = torch.rand(300, 20), torch.rand(3, 20)
    rows[77] = 1e25
    similarity, row = brute_force_cosine(queries, rows, 3)
    result = kernels.topk_cosine(queries, rows, 3, impl="cpp")
    assert torch.equal(result.row, row) and torch.equal(result.similarity, similarity)
    assert_no_answer(kernels.nl2(queries, rows, impl="cpp"))
    rows[77] = 3e38
    assert_no_answer(kernels.top1_cosine(queries, rows, impl="cpp"))
    rows[77] = 0.5
    assert_no_answer(kernels.nl2(queries.double() * 1e200, rows, impl="cpp"))
    for scale in (1e-200, 1e-152, 1e200):
        assert_no_answer(kernels.top1_cosine(queries.double() * scale, rows, impl="cpp"))
    for scale in (1e-148, 1e150):
        scaled = kernels.top1_cosine(queries.double() * scale, rows, impl="cpp")
        truth = kernels.top1_cosine(queries, rows, impl="cpp")
        assert torch.equal(scaled.row, truth.row)
        torch.testing.assert_close(scaled.similarity, truth.similarity, rtol=1.2e-7, atol=0)


def assert_no_answer(result):
    floating = [part for part in result if part.is_floating_point()]
    assert all(part.isnan().all() for part in floating) and not result.row.any()


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

def compare(op, *tensors, **keywords):
    moved = {name: at_the_end(value) if torch.is_tensor(value) else value for name, value in keywords.items()}
    outputs = op(*map(at_the_end, tensors), **moved, impl="cpp")
    for output, truth in zip(outputs, op(*tensors, **keywords, impl="cpp"), strict=True):
        assert torch.equal(output, truth)

def search(queries, rows, codes=None, scales=None, errors=None, impl=None):
    parts = None if codes is None else kernels.Codes(codes, scales, errors)
    return kernels.topk_cosine(queries, rows, 2, codes=parts, impl=impl)

row = torch.tensor([0.9, 0.25, 0.1, 0.6, 1.25, 0.4, 7.5, 6.0, 9.0, 30.0])
for width in (1, 3, 15, 17, 63, 64, 65, 130, 1000):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        images = [torch.rand(2, width, 1, 1).to(dtype) for _ in range(6)]
        more = dict(noise=images[5], similarity=torch.tensor([0.1, 0.8]), coefficients=row)
        compare(kernels.guided_step, *images[:5], **more)
        compare(kernels.predict_x0, *images[:3], coefficients=row)
        for count in (2, 7, 300):
            rows = torch.rand(count, width).to(dtype)
            compare(kernels.encode_rows, rows)
            for batch in (1, 3, 20):
                queries = torch.rand(batch, width, dtype=torch.float64)
                compare(kernels.nl2, queries, rows)
                compare(kernels.nl2, queries, (rows * 255).byte())
                compare(search, queries, rows)
                compare(search, queries, rows, *kernels.encode_rows(rows))
print("nothing beyond the end was read")
"""


def test_cpp_nothing_beyond_the_last_byte_is_read():
    """In its own process, because a fault ends it. AddressSanitizer does not see AVX-512's masked loads."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", GUARDED], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "nothing beyond the end was read\n"
