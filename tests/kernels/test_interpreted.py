"""Runs Triton's kernels on the CPU: the tests in interpreted/, and guided_step's own with "triton".

They need processes of their own, where TRITON_INTERPRET=1 was set before triton was imported.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amg.kernels.triton_backend import triton_missing

HERE = Path(__file__).parent
STEPS = [HERE / f"test_{name}.py" for name in ("guided_step", "whole_step", "whole_step_op")]
FILES = [*sorted((HERE / "interpreted").glob("test_*.py"), reverse=True), *STEPS]  # the longest first


def interpreted(file: Path) -> subprocess.CompletedProcess[str]:
    chosen = [] if file.parent.name == "interpreted" else ["-k", "triton"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def runs():
    """All files, two at a time: an interpreter keeps one core busy."""
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(interpreted, file) for file in FILES}


@pytest.mark.slow
@pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing()))
@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(HERE)) for file in FILES])
def test_kernels_pass_the_oracle_tests_interpreted(file, runs):
    result = runs[file].result()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 0, result.stdout[-1000:]
