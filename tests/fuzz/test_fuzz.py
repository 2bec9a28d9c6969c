"""A few mutations of every file that is read; `python tests/fuzz/run.py` tries many."""

import pytest

from . import run, targets

COSTLY = "stopped: "  # a build each
MANY, FEW = 60, 12


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_wrong_file_gives_the_package_s_own_error(name):
    found = next(run.faults(name, FEW if name.startswith(COSTLY) else MANY, seed=1), None)
    assert found is None, f"{found.what}\n{found.content[:2000]!r}"


def test_a_fault_is_one(tmp_path):
    """The harness finds what it is there for."""

    def read(folder):
        return int((folder / "n").read_text()), 1 // int((folder / "n").read_text())

    def make(folder):
        (folder / "n").write_text("7")
        return folder / "n"

    fuzzed = run.Fuzzed(targets.Target(make, read, same=True), tmp_path)
    assert fuzzed.look(b"7") is None
    assert "another answer" in fuzzed.look(b"8").what
    assert "ZeroDivisionError" in fuzzed.look(b"0").what
    assert "names nothing: ValueError" in fuzzed.look(b"x").what
    assert fuzzed.file.read_text() == "7"
