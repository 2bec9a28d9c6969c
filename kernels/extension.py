"""The compiled extension amg._C, or why it is not there."""

import importlib
from types import ModuleType

import torch  # loaded first, so that the extension shares torch's OpenMP runtime

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}  # csrc/dtype.h
EXTENSION: ModuleType | None
REASON: str | None
try:
    EXTENSION = importlib.import_module("amg._C")
    REASON = None
except ImportError as error:
    EXTENSION = None
    REASON = f"amg._C is not importable ({error}); it is built at install time where a C++ compiler is found"


def extension() -> ModuleType:
    """Return amg._C; RuntimeError saying why where it is missing."""
    if EXTENSION is None:
        raise RuntimeError(f"impl='cpp' is not available: {REASON}")
    return EXTENSION


def release_threads() -> None:
    """End the calling thread's idle OpenMP workers; its next parallel region starts new ones. Without the
    extension: nothing.

    Every thread that ran a parallel region of torch keeps workers. As soon as all threads together have more
    of them than there are cores, GNU's runtime stops waiting for work actively and every parallel region of
    every thread gets slower, although the others only sleep.
    """
    if EXTENSION is not None:
        EXTENSION.release_threads()
