"""What would act on a pipeline's pictures, in one table: `amg doctor`, `protect(..., explain=True)`."""

from __future__ import annotations

import copy
import inspect
from importlib.util import find_spec
from typing import Any

from amg.config import AMGConfig
from amg.engine.drive import Refused
from amg.engine.level import levels
from amg.engine.table import tabulate
from amg.extras import EXTRAS, install
from amg.pipelines.denoiser import weights_of
from amg.pipelines.families import family_of
from amg.pipelines.supported import is_ours, level_of, require_sampled

STEPS = 20  # tried of the scheduler
ASKED = ("diffusers", "transformers", "pyarrow", "faiss")  # packages


def explained(pipe: Any, index: Any, config: AMGConfig) -> list[tuple[str, str]]:
    """(what, answer) of a pipeline under an index and a config; nothing is sampled. Errors: TypeError for
    what is no pipeline."""
    level, family = level_of(pipe), family_of(pipe)
    networks = [getattr(pipe, name, None) for name in ("unet", "transformer", "prior")]
    rows = [
        ("pipeline", type(pipe).__name__),
        ("family", _family(pipe, family)),
        ("level", _level(pipe, level, family)),
        ("too close at a checkpoint", _back(pipe, level, family)),
        ("scheduler", _scheduler(pipe)),
        ("Sampler", _sampler(pipe)),
    ]
    for network in (one for one in networks if one is not None):
        dtype, device = weights_of(network)
        rows.append(("network", f"{type(network).__name__}, {str(dtype).removeprefix('torch.')} on {device}"))
    rows += [
        ("captions of later tries", _captions(pipe, index, config, family)),
        ("index", f"{index.count} pictures at {index.path}, {_metric(index)}"),
        ("guard", "in the index" if index.guard is not None else "none in the index: `amg index guard`"),
        ("config", f"preset {config.preset_name}, threshold {_threshold(index, config)}"),
        ("missing packages", _missing()),
    ]
    return rows


def _family(pipe: Any, family: Any) -> str:
    if family is not None:
        return str(family.name)
    return "pixels" if is_ours(pipe) else "none that is known"


def _level(pipe: Any, level: str, family: Any) -> str:
    if level == "full":
        what = "the halves of its guidance are known" if family is not None else "its network is known"
        return f"full: {what}" + ("" if is_ours(pipe) else ", and proved in each call")
    if level == "step":
        return "step: x0_hat is read at its scheduler's step; no family tells where its halves are"
    needed = (("scheduler", "step"), ("vae", "decode"))
    parts = [f"`{a}.{b}`" for a, b in needed if not callable(getattr(getattr(pipe, a, None), b, None))]
    return f"final: its pictures alone, as it has no {' and no '.join(parts)}"


def _back(pipe: Any, level: str, family: Any) -> str:
    if level == "final":
        return "is not seen; finished copies are drawn again by its own call"
    if is_ours(pipe) or (family is not None and family.is_bare(pipe)):
        return "goes back to an early step, inside its loop"
    return "is drawn again by its own call, which ends there if nothing of it is wanted"


def _scheduler(pipe: Any) -> str:
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return "none"
    name, ready = type(scheduler).__name__, _timed(scheduler)
    try:
        levels(ready)
    except Refused as refused:
        return f"{name}: levels are not told ({refused}); the pictures alone are checked"
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        return f"{name}: not tried, its timesteps cannot be set here ({error})"
    return f"{name}: noise levels are told"


def _timed(scheduler: Any) -> Any:
    clone = copy.deepcopy(scheduler)
    needs = inspect.signature(clone.set_timesteps).parameters
    shifted = getattr(clone, "config", {}).get("use_dynamic_shifting", False)
    clone.set_timesteps(STEPS, **({"mu": 1.0} if shifted and "mu" in needs else {}))
    return clone


def _sampler(pipe: Any) -> str:
    try:
        require_sampled(pipe)
        tabulate(pipe.scheduler, num_inference_steps=STEPS)
    except (ValueError, TypeError) as error:
        return f"does not take it: {str(error).splitlines()[0]}"
    return "takes it, the scheduler is reproduced to 1e-5"


def _captions(pipe: Any, index: Any, config: AMGConfig, family: Any) -> str:
    bank = config.ordinary_prompts
    known = f"{index.captioned} of {index.count} rows, bank of {len(bank) if isinstance(bank, tuple) else 0}"
    if family is None:
        return f"{known}; put in place of `prompt` where the call has one"
    missing = [name for name in family.encoders if getattr(pipe, name, None) is None]
    return known if not missing else f"{known}, but not inside the loop: no {' and no '.join(missing)}"


def _metric(index: Any) -> str:
    if index.metric == "nl2":
        return "pixels (nL2)"
    return f"cosine of {index.embedder.name if index.embedder is not None else 'no embedder'}"


def _threshold(index: Any, config: AMGConfig) -> str:
    resolved = config.for_metric(index.metric).threshold
    return "none" if resolved is None else f"{abs(resolved):g}"


def _missing() -> str:
    """Packages that are not installed, by the extra that brings them."""
    gone = {EXTRAS[name] for name in ASKED if find_spec(name) is None}
    return ", ".join(map(install, sorted(gone))) or "none"
