"""Installs kernels/ as amg.kernels and compiles csrc/ into amg._C where a C++ compiler is at hand."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

PROBE = "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>{}.size(); }\n"


def cxx_missing() -> str | None:
    """Return why the extension cannot be compiled here, or None when a small C++ file compiles."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    command = next((shlex.split(name) for name in candidates if shutil.which(shlex.split(name)[0])), None)
    if command is None:
        return f"no C++ compiler found (looked for {', '.join(candidates)})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        include = sysconfig.get_path("include")
        arguments = ["-std=c++17", f"-I{include}", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    lines = (line for line in result.stderr.splitlines() if "error" in line)
    return f"{command[0]} cannot compile a Python extension: {next(lines, 'unknown error').strip()}"


def kernel_packages() -> list[str]:
    """Return amg.kernels and its sub-packages."""
    return ["amg.kernels", *(f"amg.kernels.{name}" for name in find_packages("kernels"))]


reason = cxx_missing()
if reason is not None:
    print(f"amg: extension skipped, {reason}; the plain PyTorch kernels will be used", file=sys.stderr)

setup(
    packages=[*find_packages(include=["amg", "amg.*"]), *kernel_packages()],
    package_dir={"amg.kernels": "kernels"},
    package_data={
        "amg": [
            *(f"zoo/**/*.{suffix}" for suffix in ("json", "safetensors", "txt", "md")),
            *(f"report/*.{suffix}" for suffix in ("html", "j2", "css", "js")),
        ],
        "amg.kernels": ["*/README.md"],
    },
    **({"cmake_source_dir": "."} if reason is None else {}),
)
