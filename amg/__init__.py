"""amg: sample from diffusion models without regurgitating their training set.

Anti-Memorization Guidance (Chen, Liu, Xu, CVPR 2024, arXiv 2404.00922) as a library. Start with `protect`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from amg.config import AMGConfig
from amg.verdict import MemorizedError, Neighbour, TraceStep, Verdict

if TYPE_CHECKING:
    from amg.engine.sampler import Request, Sampler, SamplerOutput
    from amg.index import Hits, Index
    from amg.pipelines.check import check as check
    from amg.protection.protect import protect as protect
    from amg.protection.protect import unprotect as unprotect
    from amg.protection.scheduler import AMGScheduler

__version__ = "0.1.0"
__all__ = [
    "AMGConfig",
    "AMGScheduler",
    "Hits",
    "Index",
    "MemorizedError",
    "Neighbour",
    "Request",
    "Sampler",
    "SamplerOutput",
    "TraceStep",
    "Verdict",
    "check",
    "protect",
    "unprotect",
]
_LAZY = {
    "AMGScheduler": "amg.protection.scheduler",
    "Hits": "amg.index",
    "Index": "amg.index",
    "Request": "amg.engine.sampler",
    "Sampler": "amg.engine.sampler",
    "SamplerOutput": "amg.engine.sampler",
    "check": "amg.pipelines.check",
    "protect": "amg.protection.protect",
    "unprotect": "amg.protection.protect",
}

_MODULES = ("embed", "evaluate", "kernels", "report", "zoo")


def __getattr__(name: str) -> Any:
    """What needs more than torch is imported when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"amg.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'amg' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
