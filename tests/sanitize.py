"""`make sanitize`: the C++ kernels' tests on a build with AddressSanitizer and UBSan, at every CPU level.

Without arguments: compiles csrc/ into build/sanitize and runs itself once a level, the sanitizers' runtime
preloaded. With `--inside <extension>`: puts that extension in amg._C's place and runs pytest; a fault aborts.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
LEVELS = ("scalar", "avx2", "avx512")
NAMES = ("guided_step", "top1_cosine", "nl2", "near_pairs", "hammer")
FILES = [f"tests/kernels/test_{name}.py" for name in NAMES]
SELECTION = [*FILES, "-q", "-m", "not slow and not gpu", "-k", "not reference and not triton"]
# A fault must reach the terminal in the sanitizer's own words.
SELECTION += ["--capture=sys", "-p", "no:faulthandler", "-p", "no:cacheprovider"]


def build(compiler: str) -> Path:
    """Compile the extension with sanitizers and return its path."""
    import pybind11

    options = {
        "AMG_SANITIZE": "ON",
        "CMAKE_CXX_COMPILER": compiler,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    cmake = str(Path(sys.executable).with_name("cmake"))
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([cmake, "-S", ROOT, "-B", BUILD, "--log-level=WARNING", *defines], check=True)
    subprocess.run([cmake, "--build", BUILD, "-j", str(os.cpu_count())], check=True)
    (extension,) = BUILD.glob("_C*.so")
    return extension


def library(compiler: str, name: str) -> str:
    """Return where the compiler finds one of its libraries."""
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_level(level: str, extension: Path, compiler: str) -> int:
    """Run the tests at one CPU level in a process with the runtimes preloaded → its exit status."""
    # libstdc++ too: the runtime looks for the function that throws when it starts, before Python loads C++.
    runtimes = [library(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    environment = {
        **os.environ,
        "AMG_CPU_LEVEL": level,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    inside = [sys.executable, "-P", __file__, "--inside", str(extension)]
    return subprocess.run(inside, cwd=ROOT, env=environment, check=False).returncode


def run_tests(extension: Path) -> int:
    """Run the tests of tests/kernels with `extension` as amg._C."""
    import pytest
    import torch  # noqa: F401  before the extension, as in amg.kernels.extension

    spec = importlib.util.spec_from_file_location("amg._C", extension)
    assert spec is not None and spec.loader is not None
    module = sys.modules["amg._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if importlib.import_module("amg.kernels.extension").EXTENSION is not module:
        raise RuntimeError(f"amg.kernels does not use {extension}")
    print(f"sanitize: {extension} at level {module.cpu_level()}", flush=True)
    return int(pytest.main(SELECTION))


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        return run_tests(Path(sys.argv[2]))
    compiler = shutil.which("g++")
    ordinary = importlib.import_module("amg.kernels.extension").EXTENSION
    if compiler is None or ordinary is None:
        print("sanitize: skipped, the C++ kernels are not built here (no g++)")
        return 0
    extension = build(compiler)
    levels = LEVELS[: LEVELS.index(ordinary.detected_level()) + 1]
    return max(abs(run_level(level, extension, compiler)) for level in levels)


if __name__ == "__main__":
    sys.exit(main())
