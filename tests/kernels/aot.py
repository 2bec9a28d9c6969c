"""Compiles Triton kernels for GPUs that are not here and reads what they need out of the machine code.

`python -m tests.kernels.aot --write` records it in benchmarks/results/triton_resources.csv.
"""

import argparse
import csv
import importlib
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "triton_resources.csv"
RECORDED_WITH = "3.7.1"  # another compiler allocates other registers
NVIDIA, AMD = ("sm_80", "sm_90"), ("gfx942",)


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel, named "<module>.<function>" as seen from amg.kernels.

    arguments, by name: a str is a type in Triton's notation ("*fp16", "i32"), ":16" behind an integer's says
    that 16 divides it (pointers are always aligned so); anything else is a compile-time constant. `wide` says
    that global memory is read 128 bits at a time.
    """

    kernel: str
    variant: str
    arguments: dict[str, object]
    warps: int = 4
    stages: int = 3
    targets: tuple[str, ...] = NVIDIA
    wide: bool = True


@dataclass(frozen=True)
class Resources:
    """A row of the record: registers a thread, spilled bytes (AMD: registers), shared bytes a program."""

    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    shared: int
    loads_128: int


def why_not() -> str | None:
    """Return why nothing can be compiled or compared in this process, None if it can."""
    from amg.kernels.triton_backend import triton_devices, triton_missing

    if reason := triton_missing():
        return reason
    if "cpu" in triton_devices():
        return "interpreted kernels cannot be compiled"
    installed = metadata.version("triton")
    return None if installed == RECORDED_WITH else f"triton is {installed}, recorded was {RECORDED_WITH}"


def measure(case: Case, target: str) -> Resources:
    """Compile a case and read its resources."""
    compiled = compile_case(case, target)
    read = read_amd if target in AMD else read_nvidia
    registers, spills, loads_128 = read(compiled.asm)
    return Resources(
        case.kernel, case.variant, target, registers, spills, compiled.metadata.shared, loads_128
    )


def compile_case(case: Case, target: str):
    """Return triton's compiled kernel; no driver and no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = case.kernel.rpartition(".")
    function = getattr(importlib.import_module(f"amg.kernels.{module}"), name)
    assert list(case.arguments) == function.arg_names, f"{case.kernel} takes {function.arg_names}"
    signature, constants, attributes = {}, {}, {}
    for position, (argument, kind) in enumerate(case.arguments.items()):
        type_name, _, divisor = kind.partition(":") if isinstance(kind, str) else ("constexpr", "", "")
        signature[argument] = type_name
        if type_name == "constexpr":
            constants[argument] = kind
        elif divisor or type_name.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("hip", target, 64) if target in AMD else GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(ASTSource(function, signature, constants, attributes), target=gpu, options=options)


def specialisation(compiled) -> tuple:
    """Return what makes a compiled kernel the one it is: name, types, constants, alignment, warps."""
    aligned = {position for position, attributes in compiled.src.attrs.items() if attributes}
    return (
        compiled.src.name,
        compiled.src.signature,
        compiled.src.constants,
        aligned,
        compiled.metadata.num_warps,
    )


def read_nvidia(asm: dict) -> tuple[int, int, int]:
    """Return registers, spilled bytes and 128-bit global loads by cuobjdump and nvdisasm, as in triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = run(str(tools / "cuobjdump"), "-res-usage", cubin.name)
        sass = run(str(tools / "nvdisasm"), "-c", cubin.name)
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"\bLDG(?:STS)?\.\S*128", sass)
    return counts["REG"], counts["STACK"] + counts["LOCAL"], len(loads)


def read_amd(asm: dict) -> tuple[int, int, int]:
    """Return vector registers, spilled registers and 128-bit global loads of AMD assembly."""
    counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", asm["amdgcn"]))
    loads = re.findall(r"(?:global|buffer|flat)_load_(?:dwordx4|b128)", asm["amdgcn"])
    spills = int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"])
    return int(counts["vgpr_count"]), spills, len(loads)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def recorded() -> dict[tuple[str, str, str], Resources]:
    """Return the record's rows by (kernel, variant, target)."""
    with RECORD.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [Resources(*(field.type(line[field.name]) for field in fields(Resources))) for line in lines]
    return {(row.kernel, row.variant, row.target): row for row in rows}


def write_record(cases: list[Case]) -> None:
    """Measure every case for every target it names and write the record anew."""
    with RECORD.open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(measure(case, target)) for case in cases for target in case.targets)


if __name__ == "__main__":
    from tests.kernels.aot_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help=f"write {RECORD.name} anew")
    parser.parse_args()
    write_record(CASES)
