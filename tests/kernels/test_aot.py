"""What the kernels need on GPUs that are not here, read from machine code and compared with the record.

After a change that is meant: `python -m tests.kernels.aot --write`, and look at the diff.
"""

from dataclasses import replace

import pytest

from . import aot
from .aot_cases import CASES

COMPILATIONS = [(case, target) for case in CASES for target in case.targets]
NAMES = [f"{case.kernel}-{case.variant}-{target}" for case, target in COMPILATIONS]
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
