"""What `amg info` says: versions, device, and which kernel implementation runs."""

import platform
from importlib import metadata

import torch

from amg.extras import EXTRAS, NAMES, install
from amg.kernels import extension

OPTIONAL = (
    "diffusers",
    "transformers",
    "accelerate",
    "faiss-cpu",
    "faiss-gpu",
    "open_clip_torch",
    "pyarrow",
    "pillow",
    "torchmetrics",
    "scikit-image",
    "scikit-learn",
    "matplotlib",
    "jinja2",
    "ray",
    "triton",
)


def info() -> dict[str, object]:
    """Return versions, device, CPU level and the kernels in use, as plain values.

    Keys: amg, python, torch, device (str), threads (int), cpu_level (str), extension (bool), extension_reason
    (str or None: why it is missing), kernels ("C++" or "plain PyTorch"), triton (str), faiss (str),
    packages (dict name → version or None). A missing package is reported, never raised.
    """
    packages = {name: installed_version(name) for name in OPTIONAL}
    built = extension.EXTENSION is not None
    return {
        "amg": installed_version("amg-sampler"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "cpu_level": extension.EXTENSION.cpu_level() if extension.EXTENSION is not None else "none",
        "extension": built,
        "extension_reason": extension.REASON,
        "kernels": "C++" if built else "plain PyTorch",
        "triton": packages["triton"] or "not installed",
        "faiss": packages["faiss-gpu"] or packages["faiss-cpu"] or "not installed",
        "packages": packages,
    }


def info_text() -> str:
    """Return info() as aligned lines."""
    facts = info()
    reason = facts["extension_reason"]
    packages = facts["packages"]
    assert isinstance(packages, dict)
    lines = {
        "amg": facts["amg"],
        "Python": facts["python"],
        "torch": f"{facts['torch']}, {facts['threads']} threads",
        "device": facts["device"],
        "CPU kernels": f"{facts['kernels']}, level {facts['cpu_level']}" if not reason else facts["kernels"],
        "extension": reason or "built",
        "Triton": facts["triton"],
        "faiss": facts["faiss"],
        "installed": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "missing": ", ".join(_missed(name) for name, version in packages.items() if not version) or "nothing",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


def _missed(name: str) -> str:
    """A package that is not there, with the extra that brings it, if one does."""
    extras = {NAMES.get(module, module).lower(): extra for module, extra in EXTRAS.items()}
    extras |= {"faiss-cpu": "faiss", "faiss-gpu": "faiss-gpu"}
    return f"{name} ({install(extras[name])})" if name in extras else name


def device_name() -> str:
    """Return the CUDA device that torch sees, or "cpu"."""
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "cpu"


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
