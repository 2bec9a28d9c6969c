"""Where a figure was measured: date, versions, commit and device, the same for every row."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import torch

import amg
from amg.commands.info import device_name, installed_version

COLUMNS = ("date", "amg", "commit", "torch", "diffusers", "transformers", "device", "threads")


def environment(device: str = "cpu") -> dict[str, str]:
    """Values of `COLUMNS`; what is not there (no git checkout, no package) is empty."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "amg": amg.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "diffusers": installed_version("diffusers") or "",
        "transformers": installed_version("transformers") or "",
        "device": device_name() if torch.device(device).type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
    }


def commit() -> str:
    """The short hash of the checkout `amg` is run from, with a + where tracked files differ; "" if none."""
    root = Path(amg.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip()


def processor() -> str:
    """The CPU's model as the kernel names it, or "cpu"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
