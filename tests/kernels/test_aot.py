"""What the kernels need on GPUs that are not here, read from machine code and compared with the record.

After a change that is meant: `python -m tests.kernels.aot --write`, and look at the diff.
"""

import re
from dataclasses import replace

import pytest
import torch

from amg.kernels import Codes

from . import aot
from .aot_cases import CASES, CASES_GUIDED_STEP, CASES_TOP1
from .step_inputs import StepInputs, make_inputs
from .whole_step import WholeStep, make_step

COMPILATIONS = [(case, target) for case in CASES for target in case.targets]
NAMES = [f"{case.kernel}-{case.variant}-{target}" for case, target in COMPILATIONS]
STEP_TENSORS = ("sample", "eps_uncond", "eps_cond", "eps_neighbour", "similarity_grad")
SCREENING = [case for case in CASES if case.kernel.endswith("screen_blocks")]
compiles = pytest.mark.skipif(aot.why_not() is not None, reason=str(aot.why_not()))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(("case", "target"), COMPILATIONS, ids=NAMES)
def test_no_spills_wide_loads_and_no_more_registers_than_recorded(case, target):
    now, before = aot.measure(case, target), aot.recorded()[case.kernel, case.variant, target]
    assert now.spills == 0
    assert now.registers <= before.registers
    assert now.loads_128 >= before.loads_128
    if case.wide and target in aot.NVIDIA:
        assert now.loads_128 > 0, "global memory is not read 128 bits at a time"


@compiles
def test_a_size_that_16_does_not_divide_shows():
    case = next(case for case in CASES if case.arguments.get("size") == "i32:16")
    ragged = replace(case, arguments={**case.arguments, "size": "i32"})
    assert aot.measure(case, "sm_90").loads_128 > aot.measure(ragged, "sm_90").loads_128 == 0


def test_the_record_holds_these_cases_and_no_others():
    assert set(aot.recorded()) == {(case.kernel, case.variant, target) for case, target in COMPILATIONS}


@compiles
def test_guided_step_launches_the_recorded_specialisations(monkeypatch):
    """The real launcher against an absent GPU of type sm_90: kernels are compiled for it, never run."""
    from amg.kernels.guided_step import triton as launchers

    launched = []
    pretend_sm_90(monkeypatch, launched)
    inputs = make_inputs(torch.float16, (5, 4, 64, 64))
    rows = inputs.coefficients.repeat(5, 1)
    large = replace(
        inputs, **{name: getattr(inputs, name).repeat(1, 1, 2, 2) for name in (*STEP_TENSORS, "noise")}
    )
    launch_step(launchers, inputs)
    launch_step(launchers, inputs, terms=False)
    launch_step(launchers, replace(inputs, coefficients=rows), terms=False, update=False)
    launch_step(launchers, large)
    launch_step(launchers, large, terms=False)
    launch_engine_step(launchers, make_step(torch.float16, of_sample=(4, 64, 64), states=2))
    launch_engine_step(launchers, make_step(torch.float32, torch.float16, (4, 128, 128), states=2))
    cases = {case.variant: aot.compile_case(case, "sm_90") for case in CASES_GUIDED_STEP}
    variants = [
        "all terms fp16, whole samples",
        "plain guidance fp16, whole samples",
        "predict_x0 fp16, whole samples",
        *("all terms fp16", "4 signals"),
        *("plain guidance fp16", "4 signals"),
        "engine fp16, 2 states, whole samples",
        *("engine fp32 beside fp16, 2 states", "4 signals and flags"),
    ]
    assert len(launched) == len(variants), "a sample that is one program's needs no second launch"
    for compiled, variant in zip(launched, variants, strict=True):
        assert aot.specialisation(compiled) == aot.specialisation(cases[variant]), variant


def launch_step(launchers, inputs: StepInputs, terms: bool = True, update: bool = True) -> None:
    """What the functional forms launch."""
    tensors, keywords = inputs.arguments()
    terms_given = (*tensors[3:], keywords["similarity"], keywords["noise"]) if terms else (None,) * 4
    buffers = torch.empty_like(inputs.sample) if update else None, torch.empty_like(inputs.sample)
    signals = torch.empty(len(inputs.sample), 4 if update else 3)
    launchers.guided_step_into(
        *tensors[:3], *terms_given, inputs.coefficients, None, None, None, *buffers, signals, None
    )


def launch_engine_step(launchers, step: WholeStep) -> None:
    buffers = torch.empty_like(step.sample), torch.empty_like(step.sample), torch.empty(5, 4)
    launchers.guided_step_into(*vars(step).values(), *buffers, torch.zeros(5, dtype=torch.int32))


@compiles
@pytest.mark.parametrize("screened", [False, True])
def test_top1_cosine_launches_the_recorded_specialisations(screened, monkeypatch):
    from amg.kernels.top1_cosine import triton as launchers

    launched = []
    pretend_sm_90(monkeypatch, launched)
    rows, queries = torch.zeros(300, 512, dtype=torch.float16), torch.zeros(3, 512)
    codes = Codes(rows.to(torch.int8), torch.zeros(300), torch.zeros(300)) if screened else None
    launchers.topk_cosine(queries, rows, codes, 1)
    variants = [
        "fp32 to i8" if screened else "fp32 to fp16",
        "codes, 16 queries" if screened else "fp16, 16 queries",
        "cosine fp16",
        "any",
    ]
    kernels = ("encode_queries", "screen_blocks", "best_in_blocks", "best_of_shares")
    assert len(launched) == len(kernels)
    for compiled, kernel, variant in zip(launched, kernels, variants, strict=True):
        case = next(case for case in CASES_TOP1 if case.kernel.endswith(kernel) and case.variant == variant)
        assert aot.specialisation(compiled) == aot.specialisation(aot.compile_case(case, "sm_90"))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("case", SCREENING, ids=[f"{case.kernel}-{case.variant}" for case in SCREENING])
def test_no_dot_is_in_flight_where_its_rows_may_be_overwritten(case):
    """Triton gives rows that are also summed one buffer too few for a dot that the loop leaves running.

    A step's copy then goes to the buffer of the dot before it. So every dot must be waited for at once.
    """
    code = aot.compile_case(case, "sm_90").asm["ttgir"]
    assert "warp_group_dot " in code, "not an asynchronous dot: this test looks for the wrong thing"
    assert set(re.findall(r"warp_group_dot_wait.*pendings = (\d+)", code)) == {"0"}


def pretend_sm_90(monkeypatch: pytest.MonkeyPatch, launched: list) -> None:
    """Make Triton compile what is launched, list it in `launched`, and stop there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class AbsentGPU:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return -90  # a device of its own in Triton's cache of compiled kernels

        def get_current_stream(self, device):
            return 0

    original = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        launched.append(original(self, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(driver, "_active", AbsentGPU())
    monkeypatch.setattr(JITFunction, "run", compile_only)
