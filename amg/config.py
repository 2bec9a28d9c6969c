"""What guidance is asked to do: `AMGConfig` and its presets."""

from __future__ import annotations

import ast
import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from amg.guidance import ranges

_CHOICES = {
    "metric": ("cosine", "nl2", None),
    "form": ("paper", "released"),
    "threshold_schedule": ("parabolic", "constant", "exponential"),
    "gradient": ("frozen", "full"),
    "step_length": ("constant", "exact"),
    "rewind_caption": ("prompt", "ordinary"),
    "rewind_prompt": ("same", "attribution", "embedding"),
    "on_memorized": ("resample", "block", "flag", "raise"),
}
_THRESHOLDS = (*ranges.PROMISES, *ranges.GATES)
_KINDS: dict[Callable[[str, Any], Any], tuple[str, ...]] = {
    ranges.number: (*_THRESHOLDS, "guidance_scale", "rewind_guidance"),
    ranges.at_least_0: ("c1", "c2", "c3", "threshold_decay"),
    ranges.count: ("max_rewinds", "max_retries", "null_class", "prompt_memory"),
    ranges.fraction: ("terms_from", "rewind_to"),
    ranges.fractions: ("check_at", "rewind_at"),
    ranges.interval: ("guidance_interval",),
    ranges.switch: ("early_rewind", "gated", "block_input_copies", "blank_callbacks"),
    ranges.file: ("calibration", "student"),
    ranges.prompts: ("ordinary_prompts",),
    ranges.guard: ("guard_threshold",),
    ranges.rate: ("guard_false_alarm_rate",),
    ranges.ceiling: ("max_evaluations",),
}


@dataclass(frozen=True)
class AMGConfig:
    """Options of anti-memorization guidance; frozen. Build one with `AMGConfig.preset(name, **overrides)`.

    Similarities and thresholds are sigma of the paper: larger is closer, cosine in [-1, 1], or -nL2. A
    field left None is filled in from the preset once the index's metric is known (`for_metric`). From then
    on the thresholds (`threshold`, `rewind_threshold`, `lambda_min`, `lambda_max`) are held to that metric's
    range (`amg.guidance.ranges.similarity`), and those of nL2 may be given as people write them: 1.4 becomes
    -1.4.
    """

    preset_name: str = "main"
    """Whose values fill in the fields left None: "main", "strong", "released" or "off"."""
    metric: str | None = None
    """"cosine" or "nl2"; None until the index is known."""
    guidance_scale: float = 7.5
    """s0, for `Sampler` and `AMGScheduler`; a protected pipeline's own argument wins."""
    form: str = "paper"
    """"paper": terms and gates as published. "released": the authors' code. Cosine: ungated c1, its own
    scales and order, similarity measured again after the first two terms. nL2: s3 = c3·(sigma - lambda_t),
    which is close to its shift of the posterior mean by variance·c3·(threshold - nL2)·grad nL2 early on and
    stronger late; unlike there, x0_hat is measured, not x_t against a re-noised training set."""
    threshold: float | None = None
    """The promise: a delivered image is memorised when its similarity exceeds this. Cosine: in [-1, 0.99],
    so that an exact copy is always over it; -1 marks everything. nL2: in (0, 2], kept as -nL2."""
    guard_threshold: float | None = 0.8
    """The promise under the index's guard, which guidance never differentiates: an image is memorised, too,
    when its luminance gradients are more alike to a training image's than this, a cosine in (0, 0.99]. 0.8
    was found on two sets of photographs (of ordinary generations about one in a hundred is above it, copies
    pushed below the metric's threshold are at 0.88 and above). None: the guard is not asked, and the promise
    is the metric's alone."""
    guard_false_alarm_rate: float | None = None
    """In place of `guard_threshold`: the one that a further ordinary image exceeds with at most this
    probability, found on the ordinary generations of `calibration`, which must be given; at least 0.6.
    Refused where it would be above 0.88, or the calibration has too few images (0.01 needs 99). None:
    `guard_threshold` as it is."""
    threshold_schedule: str = "parabolic"
    """lambda_t: "parabolic" lambda_min + (lambda_max - lambda_min)·alpha_bar², "constant" lambda_max,
    "exponential" lambda_min + (lambda_max - lambda_min)·exp(-threshold_decay·t), t on the 0-1000 scale."""
    threshold_decay: float | None = None
    """Rate of the exponential lambda_t."""
    lambda_min: float | None = None
    """lambda_t of the noisiest step. Cosine: in [-1, 1], 1 never opens. nL2: kept as -nL2, 0 never opens."""
    lambda_max: float | None = None
    """lambda_t of the last step, in the range of `lambda_min`."""
    c1: float | None = None
    """Despecification: s1 = max(min(c1·sigma, s0 - 1), 0)."""
    c2: float | None = None
    """Caption de-duplication: s2 = max(min(c2·sigma, s0 - s1 - 1), 0)."""
    c3: float | None = None
    """Dissimilarity with `step_length="constant"`: s3 = c3. With "exact": 0 turns the term off."""
    gradient: str = "frozen"
    """"frozen" holds the noise prediction constant in the gradient of sigma; "full" goes through the
    denoiser."""
    step_length: str | None = None
    """"constant": c3. "exact": the length along the same direction that brings sigma to lambda_t."""
    terms_from: float | None = None
    """The fraction of the trajectory before which no term acts. Terms that act before the first checkpoint
    can hide a copy from it without leaving it (recoloured, or under noise)."""
    check_at: tuple[float, ...] | None = None
    """Fractions of the trajectory where every sample is measured; in between only those whose gate was open
    at their last check. Empty: at every step (the paper's form). Finished images are checked regardless."""
    calibration: str | Path | None = None
    """A file of `amg calibrate`: checks pass over samples whose free signals say ordinary, at its miss rate.
    Refused for another model, scheduler, number of steps, guidance scale, index or promise. None: at a check
    every sample is measured."""
    student: str | Path | None = None
    """A file of `amg distill`: at a check the student looks first, straight at the latents, and the teacher
    (decoder and embedder) only where it may find more than lambda_t. Refused for another model, embedder or
    index than it was distilled for. Cosine only. None: the teacher measures."""
    early_rewind: bool = True
    """With a calibration that has an alarm: a sample whose free signal says copy at the alarm's step goes
    back at once, at its rate of false alarms, instead of at the first checkpoint. Nothing where `rewind_at`
    is empty."""
    gated: bool = True
    """False applies the terms at every step (the paper's ungated ablation)."""
    rewind_at: tuple[float, ...] | None = None
    """Checkpoints, as fractions of the trajectory, where a sample above `rewind_threshold` goes back."""
    rewind_to: float = 0.06
    """The fraction of the trajectory it goes back to, from fresh noise of its own: the last step up to there
    that its scheduler can start from (a whole one; the first, where an order counts on earlier steps)."""
    rewind_threshold: float | None = None
    """Similarity of x0_hat at a checkpoint above which a sample goes back. Cosine: in [-1, 0.99]. nL2: not 0,
    kept as -nL2. To have no rewinds leave `rewind_at` empty."""
    max_rewinds: int | None = None
    """How often one sample may go back in one run. None takes the preset's."""
    rewind_guidance: float | None = None
    """Guidance scale of a sample's last allowed try, up to the checkpoint it came back from; earlier tries
    step down to it evenly from s0, so that most pictures keep their condition. None takes the preset's, and
    where that has none s0 is kept."""
    rewind_caption: str = "ordinary"
    """What later tries are conditioned on: "prompt", or "ordinary": the caption of a training image near the
    memorised one whose own caption is not duplicated, or where the index knows none one of
    `ordinary_prompts` (where the model takes text)."""
    rewind_prompt: str = "same"
    """What becomes of the prompt in later tries that no ordinary caption is known for. "attribution": the
    words that carry its magnitude ||eps_cond - eps_uncond|| at the first step are left out, more in each try;
    "embedding": its embedding is optimised to a lower one (Wen et al., ICLR 2024), by a backward pass of the
    network for each of at most ten iterations. Both need classifier-free guidance and count as evaluations.
    "same": it is tried again as it is (docs/guard.md has figures)."""
    ordinary_prompts: Sequence[str] | str | Path | None = None
    """A bank of ordinary prompts, a list or a file with one a line, for an index without captions: a later
    try takes one of those nearest to its prompt. None: those that a calibration was made with, if any."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The part of the trajectory, as two fractions, in which classifier-free guidance acts (Kynkaanniemi
    et al., NeurIPS 2024). Outside, a sample's unconditional half is not computed, except where a
    calibration's gate or alarm reads it, for suspected samples and for later tries. For `Sampler` alone:
    another's loop computes both halves."""
    prompt_memory: int = 0
    """How many prompts are remembered whose samples were sent back: their next samples start with the
    ordinary caption and the scale of a later try, and cost that much less. For `Sampler` alone. 0: none, as
    a sample depends on earlier requests otherwise (`Verdict.remembered`)."""
    null_class: int | None = None
    """Class label that stands for "no class"; None takes the last one, `num_class_embeds - 1`."""
    on_memorized: str = "resample"
    """"resample" (run that sample again with the `strong` preset, then block), "block" (a blank image),
    "flag", "raise"."""
    block_input_copies: bool = False
    """Where a pipeline takes a picture (image to image): whether a training image that the caller put in is
    withheld, too, when it comes out. False: it is delivered, marked `from_input`."""
    blank_callbacks: bool = False
    """Whether callbacks of a protected call (`callback_on_step_end`) are shown zeros for latents from the
    first checkpoint on, so that a live preview shows no picture that is blocked in the end."""
    max_retries: int = 3
    """Whole re-runs of one sample before it is blocked."""
    max_evaluations: float | None = 3.0
    """What one image may cost, in network evaluations, as a multiple (>= 1) of plain sampling's. What would
    cost more is not begun: a sample goes back, or is run again, only while that fits, and then is blocked, as
    one is that a checkpoint wants back and that cannot afford it. None: no ceiling."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "step_length" and value is None):
                raise ValueError(f"`{name}` must be one of {choices}, got {value!r}")
        if self.preset_name not in PRESETS:
            raise ValueError(f"`preset_name` must be one of {tuple(PRESETS)}, got {self.preset_name!r}")
        self._keep_checked()
        if not self.rewind_to < 1 or any(not self.rewind_to < at for at in self.rewind_at or ()):
            raise ValueError(
                "`rewind_to` must be in [0, 1) and every `rewind_at` in (rewind_to, 1], "
                f"got rewind_to={self.rewind_to}, rewind_at={self.rewind_at}"
            )

    def _keep_checked(self) -> None:
        """Hold every given field to its kind and keep it as that; thresholds to their metric once known."""
        may_be_open = {field.name for field in fields(self) if "None" in str(field.type)}
        for check, names in _KINDS.items():
            for name in names:
                value = getattr(self, name)
                if value is None and name in may_be_open:
                    continue
                value = check(name, value)
                if self.metric is not None and name in _THRESHOLDS:
                    value = ranges.similarity(name, value, self.metric)
                object.__setattr__(self, name, value)

    @staticmethod
    def preset(name: str, **overrides: Any) -> AMGConfig:
        """The preset `name` ("main", "strong", "released", "off") with fields overridden by keyword."""
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {tuple(PRESETS)}, got {name!r}")
        known = {field.name for field in fields(AMGConfig)} - {"preset_name"}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}; options are {sorted(known)}")
        return AMGConfig(preset_name=name, **{**_FORMS.get(name, {}), **overrides})

    def for_metric(self, metric: str) -> AMGConfig:
        """This config with every open field filled in for `metric` ("cosine" or "nl2")."""
        if metric not in ("cosine", "nl2"):
            raise ValueError(f'`metric` must be "cosine" or "nl2", got {metric!r}')
        if self.metric is not None and self.metric != metric:
            raise ValueError(f"`metric` of the config is {self.metric!r} but the index measures {metric!r}")
        preset = {
            "threshold_decay": 0.005,
            "terms_from": 0.0,
            "check_at": (),
            "max_rewinds": 8,
            **PRESETS[self.preset_name][metric],
        }
        open_fields = {name: value for name, value in preset.items() if getattr(self, name) is None}
        resolved = replace(self, metric=metric, **open_fields)
        if resolved.rewind_at and resolved.rewind_threshold is None:
            raise ValueError(
                f"`rewind_threshold` must be given with `rewind_at`, got None ({self.preset_name!r})"
            )
        return resolved

    def under(self, metric: str) -> AMGConfig:
        """What this config asks of a further index of `metric`: the same, or its preset's numbers; a rate of
        false alarms is known of the first index alone."""
        if self.metric == metric:
            return self if self.guard_false_alarm_rate is None else replace(self, guard_false_alarm_rate=None)
        return AMGConfig.preset(self.preset_name, guard_threshold=self.guard_threshold).for_metric(metric)

    def scale_of_try(self, rewinds: int, retries: int, guidance_scale: float) -> float:
        """Guidance scale of a sample that went back `rewinds` times in this run, after `retries` re-runs."""
        if self.rewind_guidance is None:
            return guidance_scale
        share = 1.0 if retries else rewinds / (self.max_rewinds or 1)
        return guidance_scale + (self.rewind_guidance - guidance_scale) * min(share, 1.0)

    def warn_without_guidance(
        self, guidance_scale: float | None, name: str = "guidance_scale", stacklevel: int = 3
    ) -> None:
        """Say to the caller's caller, or further up, which terms a scale of at most 1 leaves idle; `name`: of
        the argument that it is."""
        if guidance_scale is not None and guidance_scale <= 1 and self.active and (self.c1 or self.c2):
            warnings.warn(
                f"`{name}` is {guidance_scale}: despecification and caption de-duplication need a "
                "scale > 1 to act on; only dissimilarity, rewinds and the final check protect this call",
                stacklevel=stacklevel,
            )

    @property
    def active(self) -> bool:
        """Whether guidance acts at all."""
        return self.preset_name != "off"


_OFF = {"c1": 0.0, "c2": 0.0, "c3": 0.0, "step_length": "constant", "rewind_at": ()}


def _documented(kind: type) -> str:
    """A class's docstring, and what stands under each of its fields: `help` shows no attribute's own."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    lines = [inspect.cleandoc(kind.__doc__ or ""), "", "Fields:"]
    for one, below in itertools.pairwise(tree.body):
        if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr) and one.value is not None:
            name, type_ = ast.unparse(one.target), ast.unparse(one.annotation)
            lines += ["", f"{name}: {type_} = {ast.unparse(one.value)}"]
            lines += [f"    {line}" for line in inspect.cleandoc(ast.literal_eval(below.value)).splitlines()]
    return "\n".join(lines)


AMGConfig.__doc__ = _documented(AMGConfig)


_FORMS: dict[str, dict[str, Any]] = {
    "released": {
        "form": "released",
        "check_at": (),
        "threshold_schedule": "exponential",
        "rewind_at": (),
        "step_length": "constant",
    },
    "off": {"on_memorized": "flag"},
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "main": {
        "cosine": {
            "threshold": 0.5,
            "lambda_min": 0.45,
            "lambda_max": 0.48,
            "c1": 10.0,
            "c2": 3.0,
            "c3": 1.0,
            "step_length": "exact",
            "terms_from": 0.55,
            "check_at": (0.2, 0.4, 0.6, 0.9),
            "rewind_at": (0.2, 0.4, 0.6, 0.9),
            "max_rewinds": 4,
            "rewind_guidance": 1.0,
            "rewind_threshold": 0.5,
        },
        "nl2": {
            "threshold": -1.4,
            "lambda_min": -1.6,
            "lambda_max": -1.45,
            "c1": 0.0,
            "c2": 0.0,
            "c3": 1.0,
            "step_length": "exact",
            "terms_from": 0.57,
            "check_at": (0.56, 0.7, 0.85, 1.0),
            "rewind_at": (0.56, 0.7, 0.85, 1.0),
            "rewind_guidance": 1.0,
            "rewind_threshold": -1.55,
        },
    },
    "strong": {
        "cosine": {
            "threshold": 0.4,
            "lambda_min": 0.35,
            "lambda_max": 0.38,
            "c1": 10.0,
            "c2": 3.0,
            "c3": 1.0,
            "step_length": "exact",
            "terms_from": 0.55,
            "check_at": (0.2, 0.4, 0.6, 0.9),
            "rewind_at": (0.2, 0.4, 0.6, 0.9),
            "max_rewinds": 4,
            "rewind_guidance": 1.0,
            "rewind_threshold": 0.4,
        },
        "nl2": {
            "threshold": -1.6,
            "lambda_min": -1.8,
            "lambda_max": -1.65,
            "c1": 0.0,
            "c2": 0.0,
            "c3": 1.0,
            "step_length": "exact",
            "terms_from": 0.57,
            "check_at": (0.56, 0.7, 0.85, 1.0),
            "rewind_at": (0.56, 0.7, 0.85, 1.0),
            "rewind_guidance": 1.0,
            "rewind_threshold": -1.62,
        },
    },
    "released": {
        "cosine": {
            "threshold": 0.5,
            "lambda_min": 0.3,
            "lambda_max": 0.4,
            "c1": 13.0,
            "c2": 1 / 0.3,
            "c3": 100.0,
        },
        "nl2": {
            "threshold": -1.4,
            "lambda_min": -1.95,
            "lambda_max": -1.5,
            "threshold_decay": 0.025 / 4,
            "c1": 0.0,
            "c2": 0.0,
            "c3": 80000.0,
        },
    },
    "off": {
        "cosine": {"threshold": 0.5, "lambda_min": 1.0, "lambda_max": 1.0, **_OFF},
        "nl2": {"threshold": -1.4, "lambda_min": 0.0, "lambda_max": 0.0, **_OFF},
    },
}
