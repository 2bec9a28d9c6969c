"""`amg calibrate`: generations of ordinary and memorised prompts in, a calibration file and a plot out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from amg.commands import interval
from amg.commands.said import Defaults
from amg.extras import needed
from amg.replacing import replacing

PRESETS = ("main", "strong")
WORTH = 0.05  # share of the measurements from which on a calibration is worth its file
UNGUIDED: dict[str, Any] = {"c1": 0.0, "c2": 0.0, "c3": 0.0, "rewind_at": ()}
EVERY_STEP: dict[str, Any] = {"check_at": (), "on_memorized": "flag"}


def add_parser(commands: Any) -> None:
    """Add `calibrate` to the subparsers of `amg`."""
    parser = commands.add_parser(
        "calibrate",
        help="learn from generations which checks may be skipped, and when copies show",
        description="Write a calibration file for `AMGConfig.calibration` and a plot beside it.",
        formatter_class=Defaults,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a diffusers folder, or a bundled model: photos-ddpm, photos-sd, photos-flow",
    )
    lines = "one prompt a line, or JSONL with `caption`; class numbers for a class-conditional model"
    parser.add_argument("--ordinary", type=Path, required=True, help=f"ordinary prompts: {lines}")
    parser.add_argument("--memorized", type=Path, help="prompts that bring training images back")
    parser.add_argument("--index", type=Path, required=True, help="index of the training set")
    parser.add_argument(
        "--embedder", help="what made the index, if not pixels: photos, sscd:FILE, open_clip:MODEL:FILE"
    )
    parser.add_argument("--preset", choices=PRESETS, default="main", help="whose promise says what a copy is")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--scheduler", help="as in `amg sample` (default: the model's own scheduler)")
    parser.add_argument("--guidance-scale", type=float, help="s0 (default: 7.5, and 2 for pixel models)")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("FROM", "TO"),
        help="part of the trajectory that is guided: `AMGConfig.guidance_interval`",
    )
    parser.add_argument("--images", type=int, default=1, help="images per prompt")
    _add_rates(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="images sampled together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the plot gets the suffix .png")
    interval.add_arguments(parser)
    parser.set_defaults(run=run, interrupted="nothing is written")


def _add_rates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--miss-rate", type=float, default=0.1, help="share of copies a check may pass over")
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.01,
        help="share of ordinary images the alarm may send back early; 0.01 needs 198 of them",
    )
    parser.add_argument(
        "--guard-false-alarm-rate",
        type=float,
        default=0.01,
        help="share of ordinary images the guard may mark; 0.01 needs 99 of them that are no copies",
    )


def run(arguments: argparse.Namespace) -> int:
    """Calibrate as the command line asks; returns the exit status."""
    from amg.commands.indexes import open_index
    from amg.commands.sample import default_scale, open_model
    from amg.guidance.calibration import calibrate
    from amg.guidance.checkpoint import guided_steps, restart
    from amg.guidance.gate import FORMAT, VERSION, steps_of
    from amg.index.store import write_atomically

    _check(arguments)
    jobs = list(_jobs(arguments))
    pipe = open_model(arguments.model, arguments.scheduler, arguments.device)
    index = open_index(arguments.index, arguments.embedder, arguments.device)
    scale = default_scale(pipe) if arguments.guidance_scale is None else arguments.guidance_scale
    chosen = None
    if arguments.choose_interval:
        chosen = interval.choose(pipe, index, jobs, scale, arguments)
        print(interval.summary(chosen))
        arguments.guidance_interval = chosen["chosen"]
    recorded, key, config, scores = record(pipe, index, jobs, scale, arguments)
    checks = steps_of((*(config.check_at or ()), *(config.rewind_at or ())), key.steps)
    assert config.rewind_threshold is not None
    body = calibrate(
        recorded,
        arguments.miss_rate,
        checks,
        config.rewind_threshold,
        arguments.false_alarm_rate,
        guided_steps(config, key.steps),
        restart(config, key.steps),
    )
    result = {"format": FORMAT, "version": VERSION, "key": asdict(key), "metric": index.metric, **body}
    result["ordinary_prompts"] = bank(jobs, recorded.copies.tolist())
    result["guard"] = None if scores is None else scores.record(arguments.guard_false_alarm_rate)
    if chosen is not None:
        result["interval"] = chosen
    write_atomically(arguments.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"{summary(result)}\n{saving(result)}")
    print(f"{arguments.out}, {plot(result, arguments.out.with_suffix('.png'))}")
    if chosen is not None:
        low, high = chosen["chosen"]
        print(f"{interval.sheet_path(arguments.out)}; for AMGConfig(guidance_interval=({low:g}, {high:g}))")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    interval.check(arguments)
    for name in ("images", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be >= 1, got {getattr(arguments, name)}")
    if arguments.steps < 2:
        raise ValueError(f"`--steps` must be >= 2, got {arguments.steps}")
    for name in ("miss_rate", "false_alarm_rate", "guard_false_alarm_rate"):
        if not 0 < getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"`--{option}` must lie in (0, 1), got {getattr(arguments, name)}")
    if not arguments.out.absolute().parent.is_dir() or arguments.out.suffix == ".png":
        raise ValueError(f"`--out` must be a JSON file in a folder that exists, got {arguments.out}")


def _jobs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from amg.guidance.prompts import read_prompts

    seed = arguments.seed
    for option in ("ordinary", "memorized"):
        path = getattr(arguments, option)
        for prompt in read_prompts(path, f"--{option}") if path is not None else ():
            for _ in range(arguments.images):
                yield {"seed": seed, "prompt": prompt, "ordinary": option == "ordinary"}
                seed += 1


def record(
    pipe: Any, index: Any, jobs: list[dict[str, Any]], scale: float, arguments: argparse.Namespace
) -> tuple[Any, Any, Any, Any]:
    """(Recorded, Key, the preset's config, GuardScores or None): the jobs sampled as plain diffusers would,
    measured at each step."""
    import torch

    from amg.commands.progress import bar
    from amg.config import AMGConfig
    from amg.engine.drive import pristine
    from amg.engine.sampler import Sampler
    from amg.guidance.calibration import Recorded
    from amg.guidance.guard_threshold import scores_of
    from amg.pipelines.identity import key_for

    guided = tuple(arguments.guidance_interval)
    config = AMGConfig.preset(arguments.preset, guidance_scale=scale, guidance_interval=guided)
    config = config.for_metric(index.metric)
    sampler = Sampler(pipe, index, replace(config, **UNGUIDED, **EVERY_STEP))
    verdicts: list[Any] = []
    with bar(len(jobs), "calibrate") as shown:
        for start in range(0, len(jobs), arguments.batch_size):
            batch = jobs[start : start + arguments.batch_size]
            out = sampler(
                **condition(pipe, batch),
                generator=[torch.Generator().manual_seed(job["seed"]) for job in batch],
                num_inference_steps=arguments.steps,
                output_type="latent",  # a safety checker has no say in what is a copy
                progress=False,
            )
            verdicts += out.amg
            shown.update(len(batch))
    traces = [verdict.trace for verdict in verdicts]
    recorded = Recorded(
        torch.tensor([[step.signals for step in trace] for trace in traces], dtype=torch.float64),
        torch.tensor([[step.similarity for step in trace] for trace in traces], dtype=torch.float32),
        torch.tensor([verdict.memorized for verdict in verdicts]),
        torch.tensor([job["ordinary"] for job in jobs]),
    )
    scheduler = pristine(pipe.scheduler)
    scheduler.set_timesteps(arguments.steps)
    scores = scores_of(verdicts, [job["ordinary"] for job in jobs])
    return recorded, key_for(pipe, index, scheduler, scale, config), config, scores


def bank(jobs: Sequence[Mapping[str, Any]], copies: Sequence[bool]) -> list[str]:
    """The ordinary prompts of which no image was a copy, for later tries where the index has no captions."""
    bad = {job["prompt"] for job, copy in zip(jobs, copies, strict=True) if copy}
    return list(dict.fromkeys(job["prompt"] for job in jobs if job["ordinary"] and job["prompt"] not in bad))


def condition(pipe: Any, batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the sampler is asked: prompts of a text model, class numbers, or just a number of images."""
    from amg.pipelines.denoiser import is_latent
    from amg.pipelines.supported import network_of

    prompts = [job["prompt"] for job in batch]
    if is_latent(pipe):
        return {"prompt": prompts}
    if getattr(network_of(pipe).config, "num_class_embeds", None) is None:
        return {"batch_size": len(batch)}
    if not all(prompt.isdecimal() for prompt in prompts):
        raise ValueError(f"prompts of a class-conditional model must be class numbers, got {prompts}")
    return {"class_labels": [int(prompt) for prompt in prompts]}


def summary(result: Mapping[str, Any]) -> str:
    """The elbow, the gate and what each choice of check steps costs and misses, as a few lines."""
    images, elbow, total = result["images"], result["elbow"], result["key"]["steps"]
    lines = [
        f"{images['all']} images, {images['memorized']} memorised; {images['held_out_memorized']} of those "
        "held out for the thresholds and the figures below",
        f"AUC >= {elbow['auc']}: similarity from step {elbow['similarity']} of {total}, a free signal from "
        f"step {elbow['signal']} ({elbow['signal_name']})",
        _alarm_line(result),
        _guard_line(result),
        f"{'check steps':<21}{'gate':<6}{'measured/ordinary':>18}{'copies missed %':>16}"
        f"{'false alarms %':>15}",
    ]
    for choice in result["choices"]:
        for kind, gate in (("ungated", "no"), ("gated", "yes")):
            cost = choice[kind]
            lines.append(
                f"{choice['name']:<21}{gate:<6}{cost['measured']:>18.2f}{100 * cost['missed']:>16.1f}"
                f"{100 * cost['false_alarms']:>15.1f}"
            )
    lines += [
        f"{choice['name']}: check_at = {tuple(round(step / (total - 1), 4) for step in choice['steps'])}"
        for choice in result["choices"]
        if choice["name"].startswith("elbow")
    ]
    return "\n".join(lines)


def saving(result: Mapping[str, Any]) -> str:
    """What this calibration spares a run of the preset, or that it spares nothing, and why."""
    (preset,) = (choice for choice in result["choices"] if choice["name"] == "preset")
    before, after = preset["ungated"]["measured"], preset["gated"]["measured"]
    share = 1 - after / before if before else 0.0
    early = "its alarm sends copies back early" if result["alarm"] is not None else "and it has no alarm"
    if share >= WORTH:
        return f"it saves {100 * share:.0f} % of the measurements of ordinary images at the preset's checks"
    best = max(max(curve["auc"][step] for step in preset["steps"]) for curve in result["signals"].values())
    return (
        f"it saves nothing on ordinary images: at the preset's checks {after:.2f} of {before:.2f} looks an "
        f"image stay, {early}. No free signal tells copies there well enough at a miss rate of "
        f"{result['miss_rate']:g} (best AUC {best:.2f}): give more images, a larger `--miss-rate`, or leave "
        "the calibration out"
    )


def _alarm_line(result: Mapping[str, Any]) -> str:
    """What the alarm says, or why there is none."""
    from amg.guidance.calibration import ALARM_CATCHES, images_needed

    alarm, images = result["alarm"], result["images"]
    if alarm is not None:
        return (
            f"alarm at step {alarm['step']}, {alarm['signal']}: catches {100 * alarm['caught']:.1f} % of the "
            f"copies, {100 * alarm['false']:.1f} % of others (bound {100 * alarm['false_alarm_rate']:g} %)"
        )
    least = 2 * images_needed(result["false_alarm_rate"])
    if images["all"] - images["memorized"] < least:
        return f"no alarm: needs {least} images that are no copies, got {images['all'] - images['memorized']}"
    return f"no alarm: no free signal catches {100 * ALARM_CATCHES:g} % of the copies"


def _guard_line(result: Mapping[str, Any]) -> str:
    """The guard's threshold, or why there is none."""
    guard = result["guard"]
    if guard is None:
        return "no threshold of the guard: the index has none"
    if guard["threshold"] is None:
        return f"no threshold of the guard: {guard['reason']}"
    caught = "" if guard["caught"] is None else f", above it {100 * guard['caught']:.1f} % of the copies"
    return (
        f"guard at {guard['threshold']:.3f}: false alarms at most {100 * guard['false_alarm_rate']:g} % of "
        f"ordinary images ({len(guard['ordinary'])}){caught}; `guard_false_alarm_rate` asks for it"
    )


def plot(result: Mapping[str, Any], path: Path) -> str:
    """AUC and TPR at 1 % FPR by step, of similarity and each free signal, as a PNG; says what it did."""
    try:
        figures = needed("matplotlib.figure", "it")
    except ImportError as error:
        return f"no plot: {error}"
    figure = figures.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    curves = {"similarity": result["similarity"], **result["signals"]}
    for name, curve in curves.items():
        style = {"linewidth": 2.4, "color": "black"} if name == "similarity" else {"linewidth": 1.4}
        left.plot(curve["auc"], label=name, **style)
        right.plot(curve["tpr"], label=name, **style)
    left.axhline(result["elbow"]["auc"], linestyle=":", color="grey")
    if result["elbow"]["similarity"] is not None:
        left.axvline(result["elbow"]["similarity"], linestyle=":", color="grey")
    for axis, title in ((left, "AUC"), (right, "true positives at 1 % false positives")):
        axis.set(title=title, xlabel="step", ylim=(-0.02, 1.02))
    left.legend(loc="lower right")
    key = result["key"]
    figure.suptitle(f"{key['model']}, {key['scheduler']}, {key['steps']} steps, s0 = {key['guidance_scale']}")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return str(path)
