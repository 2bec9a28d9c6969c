"""The torch.library registrations: opcheck, fullgraph compilation, and dispatch."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import amg.kernels as kernels
from amg.kernels import dispatch
from amg.kernels.extension import EXTENSION

from .. import reads
from .whole_step import make_step

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
STEPS = ("guided_step", "predict_x0")  # public functions of one op
IMPLS = [None, "reference", pytest.param("cpp", marks=needs_extension)]


def op_arguments() -> dict[str, tuple]:
    tensors = [torch.randn(2, 3, 4, 4) for _ in range(5)]
    coefficients = torch.tensor([0.9, 0.2, 0.0, 0.6, 1.25, 0.4, 7.5, 6.0, 9.0, 3.0])
    rows = torch.nn.functional.normalize(torch.randn(40, 24), dim=1)
    codes = kernels.encode_rows(rows)
    return {
        "guided_step": (*tensors, torch.tensor([0.2, 0.7]), None, coefficients),
        "predict_x0": (*tensors[:3], coefficients),
        "encode_rows": (rows,),
        "topk_cosine": (torch.randn(3, 24), rows, *codes, 4),
        "nl2": (torch.rand(3, 24), torch.rand(40, 24), 7, 0.5),
    }


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("op", ["encode_rows", "topk_cosine", "nl2"])  # guided_step's: test_whole_step.py
def test_opcheck(op, impl):
    torch.library.opcheck(getattr(torch.ops.amg, op).default, (*op_arguments()[op], impl))


def call_public(op: str, first: torch.Tensor, arguments: tuple, impl: str | None) -> tuple:
    """Call the op through its public function, its first tensor replaced by `first`."""
    if op == "guided_step":
        similarity, noise, coefficients = arguments[5:]
        more = {"similarity": similarity, "noise": noise, "coefficients": coefficients}
        return kernels.guided_step(first, *arguments[1:5], **more, impl=impl)
    if op == "predict_x0":
        return kernels.predict_x0(first, *arguments[1:3], coefficients=arguments[3], impl=impl)
    if op == "encode_rows":
        return kernels.encode_rows(first, impl=impl)
    if op == "nl2":
        return kernels.nl2(first, arguments[1], k=arguments[2], alpha=arguments[3], impl=impl)
    codes = kernels.Codes(*arguments[2:5])
    if op == "top1_cosine":
        return kernels.top1_cosine(first, arguments[1], codes=codes, impl=impl)
    return kernels.topk_cosine(first, arguments[1], arguments[5], codes=codes, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["encode_rows", "topk_cosine", "nl2"])
def test_what_an_implementation_makes_lies_where_its_tensors_do(op, impl):
    """With another default device, as on a GPU, a tensor that is made without saying where shows.

    Called directly: the default device does not reach into a torch op.
    """
    arguments = op_arguments()[op]
    if op == "topk_cosine":
        arguments = (*arguments[:2], kernels.Codes(*arguments[2:5]), arguments[5])
    run = dispatch.choose(op, arguments[0], impl)
    truth = run(*arguments)
    with torch.device("meta"):
        found = run(*arguments)
    assert all(map(torch.equal, found, truth))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["top1_cosine", "topk_cosine", "nl2"])
def test_a_search_reads_no_value(op, impl, monkeypatch):
    arguments = op_arguments()[op.replace("top1", "topk")]
    arguments[0][1, 3] = torch.nan
    found = reads.watch(monkeypatch)
    call_public(op, arguments[0], arguments, impl)
    assert found == []


@pytest.mark.parametrize("op", ["topk_cosine", "nl2"])
def test_the_reference_s_shapes_depend_on_no_value(op):
    """It runs on tensors that have none, and gives the shapes that the op promises."""
    arguments = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in op_arguments()[op]]
    promised = getattr(torch.ops.amg, op)(*arguments, None)
    if op == "topk_cosine":
        arguments[2:5] = [None]
    made = dispatch.choose(op, arguments[0], "reference")(*arguments)
    for own, other in zip(made, promised, strict=True):
        assert own.is_meta and other.is_meta and (own.shape, own.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_step_makes_on_the_way_lies_where_its_tensors_do(impl):
    outcomes = []
    for default_device in ("cpu", "meta"):
        step = make_step()
        buffers = step.state, step.output_scale, torch.zeros_like(step.sample), torch.zeros_like(step.sample)
        launch = dispatch.choose("guided_step_into", step.sample, impl)
        with torch.device(default_device):
            launch(*list(vars(step).values())[:-2], *buffers, None, None)
        outcomes.append((buffers[0], *buffers[2:]))
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "op", ["guided_step", "predict_x0", "encode_rows", "top1_cosine", "topk_cosine", "nl2"]
)
def test_compile_fullgraph_keeps_the_op_and_its_numbers(op, impl, dynamic):
    graphs = []

    def keep_graph(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def around(first):
        outputs = call_public(op, first * 2, arguments, impl)
        return tuple(output + 1 for output in outputs)

    arguments = op_arguments()[op.replace("top1", "topk")]
    compiled = torch.compile(around, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for output, truth in zip(compiled(arguments[0]), around(arguments[0]), strict=True):
        assert output.dtype == truth.dtype and torch.equal(output, truth)
    torch._dynamo.reset()
    torch.compile(around, fullgraph=True, dynamic=dynamic, backend=keep_graph)(arguments[0])
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    target = "guided_step_into.default" if op in STEPS else op.replace("top1", "topk")
    assert len(graphs) == 1 and targets.count(f"amg.{target}") == 1


def test_cuda_gets_triton_where_it_can_be_imported_and_the_dtype_fits(monkeypatch):
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    in_float64 = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    assert dispatch.default_impl("guided_step_into", on_cuda) == "triton"
    assert dispatch.default_impl("guided_step_into", in_float64) == "reference"
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "no module")
    assert dispatch.default_impl("guided_step_into", on_cuda) == "reference"
    with pytest.raises(RuntimeError, match="impl='triton' is not available: no module"):
        dispatch.choose("guided_step_into", on_cuda, "triton")


def test_triton_named_on_cpu_is_refused():
    pytest.importorskip("triton")
    message = "impl='triton' of nl2 takes uint8, float32, float16, bfloat16 on cuda, got float32 on cpu"
    with pytest.raises(ValueError, match=message):
        kernels.nl2(torch.rand(1, 8), torch.rand(3, 8), impl="triton")


@needs_extension
@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_lower_cpu_levels_pass_the_oracle_tests(level):
    """Each level is chosen once a process, so each runs the oracle tests in its own."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    order = ["scalar", "avx2", "avx512"]
    if order.index(level) > order.index(EXTENSION.detected_level()):
        pytest.skip(f"this CPU does not offer {level}")
    if level == EXTENSION.cpu_level():
        pytest.skip(f"{level} is what the other files run at")
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "cpp"]
    result = subprocess.run(
        [*command, *files],
        env={**os.environ, "AMG_CPU_LEVEL": level, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@needs_extension
def test_an_unknown_cpu_level_is_refused():
    import os
    import subprocess
    import sys

    program = "import torch, amg._C as c; c.cpu_level()"
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "AMG_CPU_LEVEL": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "AMG_CPU_LEVEL must be scalar, avx2 or avx512, got sse9" in result.stderr


@needs_extension
@pytest.mark.skipif(
    torch.get_num_threads() == 1 or not Path("/proc/self/task").is_dir(), reason="needs threads to count"
)
def test_released_threads_are_gone_and_come_back():
    """On a thread of its own, whose parallel regions have workers of their own."""
    found = []

    def work() -> None:
        values = torch.zeros(2**22)
        for _ in range(2):
            values.add_(1)
            before = threads()
            kernels.release_threads()
            found.append((before, wait_for_fewer(before)))
        found.append(values.unique().tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (first, fewer), (again, fewer_again), values = found
    assert fewer < first and fewer_again < again and values == [2.0]


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def wait_for_fewer(count: int) -> int:
    deadline = time.monotonic() + 5
    while threads() >= count and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads()
