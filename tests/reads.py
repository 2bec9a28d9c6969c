"""Where the host reads a tensor's value: on a GPU each read waits until the device has caught up."""

import sys

import pytest
import torch

READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The file each read from now on is made in. Boolean masks are not seen: the meta device refuses them."""
    reads: list[str] = []
    for owner, name in (*((torch.Tensor, name) for name in READS), (torch, "equal")):
        monkeypatch.setattr(owner, name, _noted(getattr(owner, name), reads))
    return reads


def _noted(read, reads):
    def noted(*arguments, **options):
        reads.append(sys._getframe(1).f_code.co_filename)
        return read(*arguments, **options)

    return noted
