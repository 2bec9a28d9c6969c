"""The compiled extension amg._C, or why it is not there."""

import importlib
from types import ModuleType

import torch  # noqa: F401  loaded first so that the extension shares torch's OpenMP runtime

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
