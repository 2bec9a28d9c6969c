"""Every op on a CUDA device, by its public function and default implementation, against float64 on CPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import amg.kernels as kernels
from amg.kernels import dispatch

from .step_inputs import DTYPES, StepInputs, assert_within_twice_eager, make_inputs, run
from .whole_step import Outcome, WholeStep, assert_equals_oracle, assert_same, make_step
from .whole_step import run as run_whole

pytestmark = pytest.mark.gpu
TENSORS = ("sample", "eps_uncond", "eps_cond", "eps_neighbour", "similarity_grad", "noise")


def on_cuda(inputs: StepInputs, device: str = "cuda") -> StepInputs:
    return replace(inputs, **{name: getattr(inputs, name).to(device) for name in inputs.__dataclass_fields__})


def to_cpu(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [output.cpu() for output in outputs]


def assert_same_bits(outputs: tuple[Tensor, ...], truths: tuple[Tensor, ...]) -> None:
    for output, truth in zip(outputs, truths, strict=True):
        assert torch.equal(output, truth)


def test_triton_is_what_runs():
    assert dispatch.default_impl("guided_step_into", torch.empty(1, device="cuda")) == "triton"
    inputs = on_cuda(make_inputs(torch.float32))
    assert_same_bits(run(inputs, None), run(inputs, "triton"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(5, 4, 9, 7), (1, 4, 64, 64), (10, 3, 32, 32), (2, 1, 1, 1025), (4, 4, 128, 128)]
)
def test_step_error_is_at_most_twice_eager(shape, dtype):
    inputs = make_inputs(dtype, shape)
    assert_within_twice_eager(to_cpu(run(on_cuda(inputs), None)), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_with_a_row_of_coefficients_a_sample(dtype):
    inputs = make_inputs(dtype, (5, 4, 32, 32))
    rows = inputs.coefficients.repeat(5, 1)
    rows[:, 6] = torch.linspace(1.5, 9.0, 5)
    inputs = replace(inputs, coefficients=rows)
    assert_within_twice_eager(to_cpu(run(on_cuda(inputs), None)), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_predict_x0_is_the_first_half(dtype):
    inputs = on_cuda(make_inputs(dtype, (5, 4, 20, 20)))
    tensors = (inputs.sample, inputs.eps_uncond, inputs.eps_cond)
    first = kernels.predict_x0(*tensors, coefficients=inputs.coefficients)
    whole = kernels.guided_step(*tensors, noise=inputs.noise, coefficients=inputs.coefficients)
    torch.testing.assert_close(first.x0_hat, whole.x0_hat)
    torch.testing.assert_close(first.signals, whole.signals[:, :3], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_sample_never_reads_neighbour_or_gradient(dtype):
    inputs = on_cuda(make_inputs(dtype, (5, 4, 32, 32)))
    closed = (inputs.similarity <= inputs.coefficients[5]).view(-1, 1, 1, 1)
    names = ("eps_neighbour", "similarity_grad")
    nan = {name: getattr(inputs, name).masked_fill(closed, torch.nan) for name in names}
    assert_same_bits(run(replace(inputs, **nan), None), run(inputs, None))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_similarity_spoils_its_own_sample_only(value):
    inputs = on_cuda(make_inputs(torch.float16))
    similarity = inputs.similarity.clone()
    similarity[1] = value
    clean, spoilt = run(inputs, None), run(replace(inputs, similarity=similarity), None)
    rest = [0, 2, 3, 4]
    assert_same_bits([output[rest] for output in spoilt], [output[rest] for output in clean])
    assert spoilt.prev_sample[1].isnan().all() and spoilt.x0_hat[1].isnan().all()


def test_step_layouts_and_offsets_change_nothing():
    inputs = on_cuda(make_inputs(torch.float16, (5, 4, 16, 16)))
    layouts = {
        "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
        "strided": lambda tensor: tensor.repeat_interleave(2, dim=3)[..., ::2],
        "misaligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(
            tensor.shape
        ),
    }
    truth = run(inputs, None)
    for lay_out in layouts.values():
        moved = replace(inputs, **{name: lay_out(getattr(inputs, name)) for name in TENSORS})
        for output, expected in zip(run(moved, None), truth, strict=True):
            torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice(dtype):
    inputs = on_cuda(make_inputs(dtype, (8, 4, 128, 128)))
    assert_same_bits(run(inputs, None), run(inputs, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replay_equals_eager_also_after_gates_flip(dtype):
    inputs, other = (on_cuda(make_inputs(dtype, (5, 4, 64, 64), seed)) for seed in (0, 1))
    other = replace(other, similarity=other.similarity.flip(0), coefficients=other.coefficients * 0.9)
    graph, captured = capture(lambda: run(inputs, None))
    for source in (other, on_cuda(make_inputs(dtype, (5, 4, 64, 64)))):
        for name in inputs.__dataclass_fields__:
            getattr(inputs, name).copy_(getattr(source, name))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, run(source, None))


def capture(function: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles and loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    return graph, captured


def test_the_host_never_waits_in_a_step():
    inputs = on_cuda(make_inputs(torch.float16, (5, 4, 64, 64)))
    tensors = (inputs.sample, inputs.eps_uncond, inputs.eps_cond)

    def step() -> None:
        run(inputs, None)
        kernels.predict_x0(*tensors, coefficients=inputs.coefficients)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            inputs.similarity.max().item()  # the mode does notice
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits():
    """2³¹ elements and one sample more: that last sample is right."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    sample = torch.zeros(2**17 + 1, 4, 64, 64, dtype=torch.float16, device="cuda")
    sample[-1] = torch.randn(4, 64, 64)
    coefficients = make_inputs(torch.float16).coefficients.cuda()
    alone = kernels.guided_step(*[sample[-1:]] * 3, coefficients=coefficients)
    whole = kernels.guided_step(*[sample] * 3, coefficients=coefficients)
    assert_same_bits([output[-1:] for output in whole], alone)
    assert not whole.prev_sample[:-1].any() and not whole.signals[:-1].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current():
    inputs = make_inputs(torch.float32)
    assert torch.cuda.current_device() == 0
    assert_within_twice_eager(to_cpu(run(on_cuda(inputs, "cuda:1"), None)), inputs)


def test_fullgraph():
    inputs = on_cuda(make_inputs(torch.float32))
    compiled = torch.compile(lambda: run(inputs, None), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(), run(inputs, None))


WHOLE_DTYPES = [*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.float16)]


def whole_on_cuda(step: WholeStep) -> WholeStep:
    return replace(step, **{name: tensor.cuda() for name, tensor in vars(step).items() if tensor is not None})


def run_on_cuda(step: WholeStep, update: bool = True, in_place: bool = False) -> Outcome:
    """The step on the device, its outcome on the CPU."""
    moved = whole_on_cuda(step)
    sample, batch = moved.sample, len(moved.sample)
    buffers = {
        "prev_sample": (sample if in_place else torch.full_like(sample, torch.nan)) if update else None,
        "x0_hat": torch.full_like(sample, torch.nan),
        "signals": torch.full((batch, 4 if update else 3), torch.nan, device="cuda"),
        "flags": torch.zeros(batch, dtype=torch.int32, device="cuda"),
    }
    found = run_whole(moved, None, update, **buffers)
    return Outcome(**{name: None if part is None else part.cpu() for name, part in vars(found).items()})


@pytest.mark.parametrize("states", [0, 1, 2, 3])
@pytest.mark.parametrize("of_sample", [(3, 7, 5), (4, 64, 64), (33, 1027)])
@pytest.mark.parametrize(("dtype", "network"), WHOLE_DTYPES)
def test_whole_step_equals_the_oracle(dtype, network, of_sample, states):
    step = make_step(dtype, network, of_sample, states)
    assert_equals_oracle(run_on_cuda(step), step)
    assert_equals_oracle(run_on_cuda(step, update=False), step)


@pytest.mark.parametrize("of_sample", [(4, 64, 64), (33, 1027)])
@pytest.mark.parametrize(("dtype", "network"), WHOLE_DTYPES)
def test_prev_sample_may_be_the_sample(dtype, network, of_sample):
    step = make_step(dtype, network, of_sample)
    assert_same(run_on_cuda(step, in_place=True), run_on_cuda(step))


@pytest.mark.parametrize("of_sample", [(3, 7, 5), (33, 1027)])
@pytest.mark.parametrize("row", [-1, -(2**31), 7, 2**31 - 1])
def test_row_numbers_outside_the_output_spoil_and_flag_their_own_sample(row, of_sample):
    step = make_step(of_sample=of_sample)
    clean = run_on_cuda(step)
    step.rows[1, 2] = row
    found, rest = run_on_cuda(step), [0, 1, 3, 4]
    assert found.flags.tolist() == [0, 0, 1, 0, 0] and found.prev_sample[2].isnan().all()
    assert torch.equal(found.prev_sample[rest], clean.prev_sample[rest])
    assert torch.equal(found.state[:, rest], clean.state[:, rest])


def test_whole_step_in_a_graph_advances_its_buffers():
    step = whole_on_cuda(make_step(torch.float16, of_sample=(33, 1027)))
    tensors, keywords = step.arguments()
    signals, flags = torch.zeros(5, 4, device="cuda"), torch.zeros(5, dtype=torch.int32, device="cuda")
    buffers = {"state": step.state, "prev_sample": step.sample, "signals": signals, "flags": flags}
    start = [buffer.clone() for buffer in buffers.values()]
    graph, _ = capture(lambda: kernels.guided_step_into(*tensors, **keywords, **buffers) or ())
    advanced = []
    for advance in (graph.replay, lambda: kernels.guided_step_into(*tensors, **keywords, **buffers)):
        for buffer, value in zip(buffers.values(), start, strict=True):
            buffer.copy_(value)
        advance()
        advance()
        advanced.append([buffer.clone() for buffer in buffers.values()])
    assert_same_bits(*map(tuple, advanced))


def unit_rows(count: int, dimension: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dimension), dim=1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "dimension"), [(1, 1), (257, 64), (1003, 100), (20_000, 512)])
def test_codes_equal_the_reference_and_bound_what_they_lose(count, dimension, dtype):
    rows = unit_rows(count, dimension, dtype)
    codes, truth = kernels.encode_rows(rows.cuda()), kernels.encode_rows(rows, impl="reference")
    assert_same_bits(to_cpu(codes[:2]), truth[:2])
    lost = (rows.double() - truth.scales.double()[:, None] * truth.codes.double()).norm(dim=1)
    assert (lost <= codes.errors.cpu().double()).all()
    assert (codes.errors.cpu().double() <= lost * (1 + 3e-7) + 1e-40).all(), "the bound is tight"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references_run_there_too(dtype):
    """Whatever a reference makes on the way is made where its tensors are."""
    rows, queries = unit_rows(1003, 100, dtype), torch.randn(3, 100)
    codes, truth = (kernels.encode_rows(there, impl="reference") for there in (rows.cuda(), rows))
    assert_same_bits(to_cpu(codes[:2]), truth[:2])
    for k in (1, 7):
        found = kernels.topk_cosine(queries.cuda(), rows.cuda(), k, impl="reference")
        assert torch.equal(found.row.cpu(), kernels.topk_cosine(queries, rows, k, impl="reference").row)
    found = kernels.nl2(queries.cuda(), rows.cuda(), impl="reference")
    assert torch.equal(found.row.cpu(), kernels.nl2(queries, rows, impl="reference").row)
    inputs = make_inputs(dtype)
    assert_within_twice_eager(to_cpu(run(on_cuda(inputs), "reference")), inputs)


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "count", "dimension", "k"),
    [
        (1, 1, 1, 1),
        (5, 257, 64, 5),
        (17, 1003, 100, 1),
        (8, 20_000, 512, 1),
        (64, 20_000, 512, 10),
        (3, 5000, 65, 100),
        (40, 70_000, 24, 1),
        (1, 300_000, 16, 1),
    ],
)
def test_search_finds_the_reference_s_rows(batch, count, dimension, k, dtype, screened):
    rows, queries = unit_rows(count, dimension, dtype), 3 * torch.randn(batch, dimension)
    truth = kernels.topk_cosine(queries, rows, k, impl="reference")
    codes = kernels.encode_rows(rows.cuda()) if screened else None
    result = kernels.topk_cosine(queries.cuda(), rows.cuda(), k, codes=codes)
    assert torch.equal(result.row.cpu(), truth.row)
    torch.testing.assert_close(result.similarity.cpu(), truth.similarity, rtol=1.2e-7, atol=1e-12)
    assert_same_bits(result, kernels.topk_cosine(queries.cuda(), rows.cuda(), k, codes=codes))


def test_search_ties_go_to_the_lowest_row():
    rows = unit_rows(1, 96, torch.float32).repeat(3000, 1)
    queries = torch.randn(4, 96)
    result = kernels.topk_cosine(queries.cuda(), rows.cuda(), 7)
    assert torch.equal(result.row.cpu(), torch.arange(7).repeat(4, 1))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_query_without_a_direction_is_nan_and_no_other_is_touched(value, k):
    rows, queries = unit_rows(600, 20, torch.float16).cuda(), torch.randn(3, 20).cuda()
    truth = kernels.topk_cosine(queries, rows, k)
    queries[1] = value
    for codes in (None, kernels.encode_rows(rows)):
        found = kernels.topk_cosine(queries, rows, k, codes=codes)
        assert_same_bits([part[[0, 2]] for part in found], [part[[0, 2]] for part in truth])
        assert found.similarity[1].isnan().all() and found.row[1].tolist() == [0] * k


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_search_takes_queries_of_any_floating_dtype(dtype):
    rows, queries = unit_rows(5000, 100, torch.float16), torch.randn(4, 100).to(dtype)
    found, truth = (
        kernels.top1_cosine(queries.cuda(), rows.cuda()),
        kernels.top1_cosine(queries, rows, impl="reference"),
    )
    assert torch.equal(found.row.cpu(), truth.row)


def test_rows_that_are_not_finite_are_nan_and_refused_where_they_are_encoded():
    rows = unit_rows(600, 20, torch.float32)
    rows[417, 3] = torch.nan
    for k in (1, 5):
        found = kernels.topk_cosine(torch.randn(3, 20).cuda(), rows.cuda(), k)
        assert found.similarity.isnan().all() and not found.row.any()
    with pytest.raises(ValueError, match="`rows` must be finite, got a non-finite value in row 417"):
        kernels.encode_rows(rows.cuda())


@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES])
@pytest.mark.parametrize(
    ("batch", "count", "pixels", "k"),
    [(1, 1, 1, 50), (3, 60, 7, 50), (13, 130, 1000, 3), (5, 4000, 3072, 50), (32, 2000, 192, 1)],
)
def test_nl2_equals_the_reference(batch, count, pixels, k, dtype):
    bytes_ = torch.randint(0, 256, (count, pixels))
    rows = bytes_.to(torch.uint8) if dtype == torch.uint8 else (bytes_ / 255).to(dtype)
    near = (bytes_ / 255)[torch.randint(count, (batch,))] + 0.02 * torch.randn(batch, pixels)
    for queries in (torch.rand(batch, pixels), near):
        truth = kernels.nl2(queries, rows, k=k, impl="reference")
        result = kernels.nl2(queries.cuda(), rows.cuda(), k=k)
        assert torch.equal(result.row.cpu(), truth.row)
        for name, rtol in (("distance", 1.2e-7), ("denominator", 2.5e-7), ("value", 4e-7)):
            actual, expected = getattr(result, name).cpu(), getattr(truth, name)
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)
        assert_same_bits(result, kernels.nl2(queries.cuda(), rows.cuda(), k=k))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 50])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_nl2_of_a_query_that_is_not_finite_is_nan_and_no_other_is_touched(dtype, k, value):
    rows, queries = torch.randint(0, 256, (900, 192)), torch.rand(3, 192).cuda()
    rows = (rows.to(torch.uint8) if dtype == torch.uint8 else (rows / 255).to(dtype)).cuda()
    truth = kernels.nl2(queries, rows, k=k)
    queries[1, 100] = value
    found = kernels.nl2(queries, rows, k=k)
    assert_same_bits([part[[0, 2]] for part in found], [part[[0, 2]] for part in truth])
    assert all(part[1].isnan() for part in (found.value, found.distance, found.denominator))
    assert found.row[1] == 0
