"""The torch.library registrations: opcheck, fullgraph compilation, and dispatch."""

from types import SimpleNamespace

import pytest
import torch

import amg.kernels as kernels
from amg.kernels import dispatch
from amg.kernels.extension import EXTENSION

needs_extension = pytest.mark.skipif(EXTENSION is None, reason="amg._C is not built")
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
@pytest.mark.parametrize("op", ["guided_step", "predict_x0", "encode_rows", "topk_cosine", "nl2"])
def test_opcheck(op, impl):
    torch.library.opcheck(getattr(torch.ops.amg, op).default, (*op_arguments()[op], impl))


def test_compile_fullgraph_keeps_the_op_and_its_numbers():
    sample, eps_uncond, eps_cond, *_ = op_arguments()["guided_step"]
    coefficients = op_arguments()["guided_step"][-1]

    def loop_body(sample):
        output = kernels.guided_step(sample * 2, eps_uncond, eps_cond, coefficients=coefficients)
        return output.prev_sample + 1, output.signals

    compiled = torch.compile(loop_body, fullgraph=True, backend="aot_eager")
    for output, truth in zip(compiled(sample), loop_body(sample), strict=True):
        assert torch.equal(output, truth)


def test_cuda_gets_triton_where_it_can_be_imported_and_the_dtype_fits(monkeypatch):
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    in_float64 = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    assert dispatch.default_impl("guided_step", on_cuda) == "triton"
    assert dispatch.default_impl("guided_step", in_float64) == "reference"
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "no module")
    assert dispatch.default_impl("guided_step", on_cuda) == "reference"
    with pytest.raises(RuntimeError, match="impl='triton' is not available: no module"):
        dispatch.choose("guided_step", on_cuda, "triton")


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
