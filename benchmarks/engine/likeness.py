"""How near our pictures are: under every scheduler to the pipeline's, among requests to those drawn alone."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from typing import Any

import torch
from bench_serving import mixed_requests, one_by_one, submit_all
from protocol import ROOT

from engine.arithmetic import grey_levels
from engine.cost import OFF
from engine.report import Figure
from engine.setup import BATCH, Bench

QUICK_STEPS = 10
IMAGES = 2


def listed() -> dict[str, Any]:
    """The cases of tests/engine/schedulers.py: name -> a record with `make`, `times` and `step`."""
    spec = importlib.util.spec_from_file_location("schedulers", ROOT / "tests/engine/schedulers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.CASES


def further(known: set[str], config: Any) -> dict[str, Any]:
    """diffusers' other schedulers by name, made from the pipeline's own scheduler's config; those that need
    a package that is not installed cannot be made."""
    import diffusers

    names = (name for name in sorted(dir(diffusers)) if name.endswith("Scheduler") and name not in known)
    kinds = {name: getattr(diffusers, name) for name in names if not name.startswith("Flax")}
    return {
        name: lambda kind=kind: kind.from_config(config)
        for name, kind in kinds.items()
        if inspect.isclass(kind)
    }


def schedulers(bench: Bench) -> list[Figure]:
    """Grey levels between `off` and the pipeline under each scheduler; in words where one of them refuses."""
    pipe, cases = bench.model.pipe, listed()
    own = pipe.scheduler
    makers = {name: (case.make, case.step.get("eta", 0.0)) for name, case in cases.items()}
    others = further({case.kind for case in cases.values()}, own.config)
    makers |= {name: (make, 0.0) for name, make in others.items()}
    figures = []
    try:
        for name, (make, eta) in makers.items():
            levels, note = compared(bench, make, eta)
            values = () if levels is None else (levels,)
            figures.append(Figure("schedulers", name, OFF, "most grey levels", values, note=note))
    finally:
        pipe.scheduler = own
    return figures


def compared(bench: Bench, make: Any, eta: float) -> tuple[int | None, str]:
    """The most grey levels between both, or None with who refused and why."""
    prompts, seeds = bench.model.prompts("ordinary", IMAGES)
    steps = QUICK_STEPS if bench.quick else bench.steps
    found = []
    try:
        make()
    except Exception as error:
        return None, f"cannot be made: {said(error)}"
    for name in ("pipeline", "Sampler"):
        try:
            bench.model.pipe.scheduler = make()
            draw = bench.model.pipe if name == "pipeline" else bench.sampler(OFF)
            more = {"eta": eta} if name == "pipeline" else {"eta": eta, "progress": False}
            found.append(bench.call(draw, prompts, seeds, steps, **more).images)
        except Exception as error:
            return None, f"the {name} refuses: {said(error)}"
    if not bool(found[0].isfinite().all()):
        return None, "the pipeline's own picture is not finite"
    return max(grey_levels(found[1], found[0])), ""


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def alone(bench: Bench) -> list[Figure]:
    """16 mixed requests submitted together against each drawn alone, float32."""
    requests = mixed_requests(bench.model, BATCH)
    with bench.sampler("main") as sampler:
        (together, _), (solo, _) = submit_all(sampler, requests), one_by_one(sampler, requests)
    images = [torch.cat([out.images for out in outs]) for outs in (together, solo)]
    levels = grey_levels(*images)
    pairs = list(zip(together, solo, strict=True))
    names = ("neighbour", "memorized", "rewinds", "retries", "blocked", "evaluations")
    other = sum(
        any(getattr(mine.amg[0], name) != getattr(theirs.amg[0], name) for name in names)
        for mine, theirs in pairs
    )
    apart = max(abs(mine.amg[0].similarity - theirs.amg[0].similarity) for mine, theirs in pairs)
    figures = {
        "most grey levels": max(levels),
        "pictures that differ %": 100 * sum(level > 0 for level in levels) / len(levels),
        "other verdicts": other,
        "largest difference of similarities": apart,
    }
    return [
        Figure("alone", f"{BATCH} mixed requests", "main", metric, (value,))
        for metric, value in figures.items()
    ]
