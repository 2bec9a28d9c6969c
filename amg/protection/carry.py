"""`X.from_pipe(protected)` gives a protected pipeline: the one place that changes a class of diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from amg.extras import needed

NAMES = (
    "DiffusionPipeline",
    "AutoPipelineForText2Image",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
)


def carry_over(protect_like: Callable[[Any, Any], None]) -> None:
    """Let `from_pipe` call `protect_like(made, source)` where it is given a protected `source`; done once."""
    diffusers = needed("diffusers", "`amg.protect`")

    for kind in (getattr(diffusers, name) for name in NAMES):
        make = vars(kind)["from_pipe"].__func__
        if not hasattr(make, "_amg_carries"):
            kind.from_pipe = classmethod(_carrying(make, protect_like))


def _carrying(make: Any, protect_like: Callable[[Any, Any], None]) -> Any:
    @functools.wraps(make)
    def from_pipe(cls: Any, pipeline: Any, **kwargs: Any) -> Any:
        made = make(cls, pipeline, **kwargs)
        if hasattr(pipeline, "_amg_protection") and made is not pipeline:
            protect_like(made, pipeline)
        return made

    from_pipe._amg_carries = True  # type: ignore[attr-defined]
    return from_pipe
