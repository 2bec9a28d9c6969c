"""The kinds of pipelines whose halves are known: a file of data each."""

from __future__ import annotations

from typing import Any

from amg.pipelines.families.family import Family, Size
from amg.pipelines.families.flux import FLUX
from amg.pipelines.families.pixart import PIXART
from amg.pipelines.families.sd import SD
from amg.pipelines.families.sd3 import SD3
from amg.pipelines.families.sdxl import SDXL

FAMILIES = (SD, SDXL, SD3, FLUX, PIXART)

__all__ = ["FAMILIES", "Family", "Size", "family_of"]


def family_of(pipe: Any) -> Family | None:
    """The family of a pipeline, None for one whose halves are not known."""
    return next((family for family in FAMILIES if family.of(pipe)), None)
