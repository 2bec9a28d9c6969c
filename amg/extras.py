"""Packages that amg does not always need: imported where they are used, missed by their extra's name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

# the extra that brings each, and the name it is installed under where that is another
EXTRAS = {
    "PIL": "index",
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "faiss": "faiss",
    "jinja2": "report",
    "matplotlib": "demo",
    "open_clip": "clip",
    "pyarrow": "index",
    "pywt": "demo",
    "ray": "ray",
    "scipy": "metrics",
    "skimage": "demo",
    "sklearn": "demo",
    "torchmetrics": "metrics",
    "tqdm": "index",
    "transformers": "diffusers",
}
DISTRIBUTION = "amg-sampler"
NAMES = {
    "PIL": "Pillow",
    "open_clip": "open_clip_torch",
    "pywt": "pywavelets",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def install(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def needed(module: str, what: str, extra: str | None = None) -> Any:
    """The module `module` ("PIL.Image"), imported; ImportError saying that `what` needs it and which extra
    brings it, `extra` where several do."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision without its operators raises RuntimeError
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(package)
        why = "" if missing else f", which cannot be imported ({error})"
        raise ImportError(
            f"{what} needs {NAMES.get(package, package)}{why}: {install(extra or EXTRAS[package])}"
        ) from error


def told(error: BaseException) -> str:
    """An error as text, of an import that failed with the extra that brings the package."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ImportError) or package not in EXTRAS or "pip install" in str(error):
        return str(error)
    return f"{error}: {install(EXTRAS[package])}"


def require(packages: Iterable[str], what: str, extra: str | None = None) -> None:
    """`needed` of several packages, before any work."""
    for package in packages:
        needed(package, what, extra)
