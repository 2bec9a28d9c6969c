"""The smallest linear machine with given responses (Ho and Kalman 1966; time-varying: Shokoohi and Silverman
1987).

Between two steps, what the past can still do to the future is the Hankel block of responses [later steps,
earlier inputs]. Its rank is the number of states, and its singular vectors are how they are written and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 12  # steps on either side; a machine of a few states shows them all within as many steps


class Machine(NamedTuple):
    """result = d·u + h·state, state' = A·state + B·u, from state = 0; d [N, U], h [N, S], A [N, S, S],
    B [N, S, U]. `states`: the largest number needed, S or, where that is more than was allowed, beyond S."""

    d: Tensor
    h: Tensor
    A: Tensor
    B: Tensor
    states: int


class _Cut(NamedTuple):
    """Between step k-1 and step k: `read` [later steps, r], and `written` [r, U] of the last input."""

    read: Tensor
    written: Tensor


def realise(responses: Tensor, tolerance: float, most: int) -> Machine:
    """responses [N, N, U]: of step i's result to step j's inputs, j <= i. Singular values up to `tolerance`
    are rounding."""
    count, inputs = len(responses), responses.shape[2]
    cuts = [_cut(responses, k, tolerance) for k in range(count)]
    states = max(cut.read.shape[1] for cut in cuts)
    size = min(states, most)
    h, a = responses.new_zeros(count, size), responses.new_zeros(count, size, size)
    b = responses.new_zeros(count, size, inputs)
    d = torch.stack([responses[k, k] for k in range(count)])
    if states <= most:
        for k, (here, after) in enumerate(zip(cuts, [*cuts[1:], None], strict=True)):
            now = here.read.shape[1]
            h[k, :now] = here.read[0]
            if after is None:
                continue
            then, shared = after.read.shape[1], min(len(after.read), len(here.read) - 1)
            b[k, :then] = after.written
            if now and then:
                a[k, :then, :now] = torch.linalg.pinv(after.read[:shared]) @ here.read[1 : shared + 1]
    return Machine(d, h, a, b, states)


def _cut(responses: Tensor, k: int, tolerance: float) -> _Cut:
    block = responses[k : k + WINDOW, max(k - WINDOW, 0) : k].flatten(1)
    if block.numel() == 0 or float(block.abs().max()) <= tolerance / WINDOW:
        return _Cut(block.new_zeros(len(block), 0), block.new_zeros(0, responses.shape[2]))
    left, values, right = torch.linalg.svd(block, full_matrices=False)
    rank = int((values > tolerance).sum())
    root = values[:rank].sqrt()
    return _Cut(left[:, :rank] * root, (root[:, None] * right[:rank])[:, -responses.shape[2] :])
