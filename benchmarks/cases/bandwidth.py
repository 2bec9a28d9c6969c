"""Measured bandwidths, the yardsticks of memory-bound kernels: the fastest of several readers or copiers.

Bytes are counted as the program asks for them: a copy reads and writes n, a reader reads n. Reading a line in
order to overwrite it (write-allocate) is counted for nobody.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from protocol import Provider

COPIERS = ("copy: torch", "copy: memcpy")
READERS = ("read: torch sum", "read: numpy dot", "read: C++ loads")


def copiers(mib: int, sets: int, threads: int) -> tuple[Provider, ...]:
    """Copies of `mib` MiB: torch's, and the C library's memcpy on each thread's share."""
    sources, target = [torch.ones(mib * 2**18) for _ in range(sets)], torch.zeros(mib * 2**18)
    into, shared = target.numpy(), in_threads(threads, len(target))

    def memcpy(i: int) -> None:
        source = sources[i % sets].numpy()
        shared(lambda part: np.copyto(into[part], source[part]))

    moved = 2 * 4 * len(target)
    return (
        Provider(COPIERS[0], lambda i: target.copy_(sources[i % sets]), moved),
        Provider(COPIERS[1], memcpy, moved),
    )


def readers(mib: int, threads: int) -> tuple[Provider, ...]:
    """Readers of `mib` MiB: torch's sum, a dot product with itself, and a loop that only ORs."""
    buffer = torch.ones(mib * 2**18)
    values, shared = buffer.numpy(), in_threads(threads, len(buffer))
    moved = 4 * len(buffer)
    found = [
        Provider(READERS[0], lambda i: buffer.sum(), moved),
        Provider(READERS[1], lambda i: shared(lambda part: np.dot(values[part], values[part])), moved),
    ]
    read_words = compiled_reader()
    if read_words is not None:
        start = buffer.data_ptr()

        def read(part: slice) -> object:
            return read_words(start + 4 * part.start, (part.stop - part.start) // 2)

        found.append(Provider(READERS[2], lambda i: shared(read), moved))
    return tuple(found)


def in_threads(threads: int, length: int) -> Callable[[Callable[[slice], object]], None]:
    """Return a function that runs its argument on `threads` equal slices of `length` at once."""
    bounds = [length * share // threads // 64 * 64 for share in range(threads)] + [length]
    slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
    pool = ThreadPoolExecutor(threads)

    def run(job: Callable[[slice], object]) -> None:
        if threads == 1:
            job(slices[0])
        else:
            list(pool.map(job, slices))

    return run


def compiled_reader() -> Callable[[int, int], int] | None:
    """Build read.cpp for this CPU; None where there is no compiler. ctypes releases the GIL in it."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        source = Path(__file__).with_name("read.cpp")
        if subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=False).returncode != 0:
            return None
        function = ctypes.CDLL(str(library)).read_words
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
    return function
