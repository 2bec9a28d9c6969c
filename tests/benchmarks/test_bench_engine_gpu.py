"""The GPU benchmark of the engine, on a CPU and tiny: what it writes. No time is asserted."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["diffusers", "amg off", "amg main"]


@pytest.fixture(scope="module")
def bench():
    """benchmarks/bench_engine_gpu.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("bench_engine_gpu")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_every_contestant_makes_two_evaluations_a_step_and_gets_a_line(bench, tmp_path):
    assert bench.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "engine-cpu-plumbing-only.csv"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    wanted = [("1", name) for name in (*NAMES, *(f"{name}, compiled" for name in NAMES))]
    wanted += [("2", name) for name in NAMES]
    assert [(line["batch"], line["contestant"]) for line in lines] == wanted
    for line in lines:
        assert float(line["evaluations"]) == 2 * int(line["steps"]) and not line["note"]
        assert 0 < float(line["p20_s"]) <= float(line["p50_s"]) <= float(line["p80_s"])
        assert line["peak_mib"] == "", "a CPU has no such figure"


def test_a_call_out_of_memory_is_a_note_and_the_rest_go_on(bench):
    import torch

    def full():
        raise torch.OutOfMemoryError("no room")

    run = bench.Run("cpu", 3, 8, 2, "eager", ())
    found = bench.measured({"full": full, "fits": lambda: None}, run)
    assert found["full"] == {"note": "out of memory"}
    assert found["fits"]["evaluations"] == 6 and float(found["fits"]["p50_s"]) > 0


def test_what_cannot_be_run_is_refused(bench, capsys):
    for arguments, message in ((["--device", "cpu"], "needs --tiny"), (["--models", "sd3"], "got sd3")):
        with pytest.raises(SystemExit):
            bench.parse([*arguments, *([] if "cpu" in arguments else ["--device", "cpu", "--tiny"])])
        assert message in capsys.readouterr().err
