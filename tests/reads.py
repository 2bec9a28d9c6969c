"""Where the host reads a tensor's value: on a GPU each read waits until the device has caught up."""

import sys
from pathlib import Path

import pytest
import torch

import amg.kernels

READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")
KERNELS = Path(amg.kernels.__file__).parent


class Reads(list[str]):
    """The file that each read was made in."""

    @property
    def ours(self) -> list[str]:
        """Those that no kernel made: what the C++ and the reference look at lies on the host anyway."""
        return [file for file in self if KERNELS not in Path(file).parents]


def watch(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """The reads from now on. Boolean masks are not seen: the meta device refuses them."""
    reads = Reads()
    for owner, name in (*((torch.Tensor, name) for name in READS), (torch, "equal")):
        monkeypatch.setattr(owner, name, _noted(getattr(owner, name), reads))
    return reads


def _noted(read, reads):
    def noted(*arguments, **options):
        reads.append(sys._getframe(1).f_code.co_filename)
        return read(*arguments, **options)

    return noted
