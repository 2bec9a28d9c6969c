"""`amg bench`: plain diffusers against guidance, side by side on one's own machine and model."""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from amg.commands.audit.environment import COLUMNS as ENVIRONMENT
from amg.commands.audit.plan import DEFAULT_GUIDANCES

PLAIN = "plain diffusers"
COLUMNS = (
    *("model", "contestant", "batch", "steps", "rounds", "prompts", "p20", "p50", "p80", "evaluations"),
    *ENVIRONMENT,
)


@dataclass
class Contestant:
    """`draw(seeds)` samples one batch; `seconds` per image of every round so far, `evaluations` per image."""

    name: str
    draw: Callable[[Sequence[int]], object]
    seconds: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)


def add_parser(commands: Any) -> None:
    """Add `bench` to the subparsers of `amg`."""
    parser = commands.add_parser(
        "bench",
        help="time plain diffusers against guidance on this machine",
        description="Contestants draw the same prompts and seeds and take turns, round after round, after "
        "one untimed turn each. Prints seconds per image (median, 20 to 80 %), network evaluations per image "
        "(one condition, one step), and appends a line per contestant and batch size to a CSV.",
    )
    _add_options(parser)
    parser.set_defaults(run=run, interrupted="the lines of the batch sizes that are done are written")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a diffusers folder, or photos-ddpm, photos-sd, photos-flow"
    )
    parser.add_argument("--index", type=Path, required=True, help="index of the training set, which guides")
    parser.add_argument(
        "--embedder",
        metavar="NAME",
        help="what made the index, if not pixels: photos, sscd:FILE, open_clip:MODEL:FILE",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="as in `amg audit` (default: the index's most repeated captions, which cost most; or classes)",
    )
    parser.add_argument(
        "--guidance",
        action="append",
        metavar="NAME",
        help=f"a preset; repeat for several (default: {', '.join(DEFAULT_GUIDANCES)})",
    )
    parser.add_argument(
        "--batch-size", type=int, action="append", metavar="N", help="repeat for several (default: 1 and 4)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed turns each (default: 5)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (default: 50)")
    parser.add_argument("--scheduler", metavar="NAME", help="as in `amg sample` (default: the model's own)")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="S0", help="as in `amg sample` (default: 7.5, 2 for pixels)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--csv", type=Path, default=Path("bench.csv"), metavar="FILE", help="appended to (default: bench.csv)"
    )


@torch.no_grad()
def run(arguments: argparse.Namespace) -> int:
    """Time what the command line asks for; returns the exit status. Each batch size is written when done."""
    from amg.commands.audit.plan import make_guidances
    from amg.commands.indexes import open_index
    from amg.commands.sample import default_scale, open_model
    from amg.pipelines.supported import network_of

    sizes = arguments.batch_size or [1, 4]
    for option, value in (("rounds", arguments.rounds), ("batch-size", min(sizes))):
        if value < 1:
            raise ValueError(f"`--{option}` must be >= 1, got {value}")
    pipe = open_model(arguments.model, arguments.scheduler, arguments.device)
    index = open_index(arguments.index, arguments.embedder, arguments.device)
    pipe.set_progress_bar_config(disable=True)
    scale = default_scale(pipe) if arguments.guidance_scale is None else arguments.guidance_scale
    guidances = make_guidances(arguments.guidance or (), (), index.metric, scale)
    captions, source = prompts_of(arguments.prompts, pipe, index)
    counted = count_rows(network_of(pipe))
    for size in sizes:
        batch = [captions[n % len(captions)] for n in range(size)]
        contestants = contestants_of(pipe, index, guidances, batch, arguments.steps, scale)
        take_turns(contestants, size, arguments.rounds, counted, arguments.device)
        lines = lines_of(contestants, arguments, size, source)
        append(arguments.csv, lines)
        print(f"\n{Path(arguments.model).name}, {source}, batch {size}\n{text_of(lines)}", flush=True)
        if contestants[0].name != PLAIN:
            print(f"no {PLAIN}: its pipeline takes no classes")
    print(f"\n{arguments.csv}: {len(sizes) * len(contestants)} lines added")
    return 0


def prompts_of(path: Path | None, pipe: Any, index: Any) -> tuple[list[str], str]:
    """Prompts, and where they come from: a file, or the index's most repeated captions, or the classes."""
    from amg.commands.audit.plan import read_prompts
    from amg.pipelines.denoiser import is_latent
    from amg.pipelines.supported import network_of

    if path is not None:
        return [prompt.caption for prompt in read_prompts(path)], path.name
    if not is_latent(pipe):
        classes = getattr(network_of(pipe).config, "num_class_embeds", None)
        return ([str(label) for label in range(classes - 1)], "classes") if classes else ([""], "no prompts")
    order = index.counts.argsort(descending=True, stable=True).tolist()
    captions = list(dict.fromkeys(index.captions[row] for row in order if index.captions[row]))
    if not captions:
        raise ValueError(f"`--prompts` must be given, as {index.path} holds no captions")
    return captions[:64], "the index's most repeated captions"


def contestants_of(
    pipe: Any, index: Any, guidances: Sequence[Any], captions: list[str], steps: int, scale: float
) -> list[Contestant]:
    """Plain diffusers, where its pipeline can draw this model at all, and a sampler per guidance."""
    from amg.commands.audit.plan import Job, Prompt, condition
    from amg.engine.sampler import Sampler
    from amg.pipelines.denoiser import is_latent

    jobs = [Job(n, n, Prompt(caption), n) for n, caption in enumerate(captions)]
    asked = condition(pipe, jobs)

    def plain(seeds: Sequence[int]) -> object:
        return pipe(
            **asked, **scaled, num_inference_steps=steps, generator=generators(seeds), output_type="np"
        )

    def guided(config: Any) -> Callable[[Sequence[int]], object]:
        sampler = Sampler(pipe, index, config)
        return lambda seeds: sampler(
            **asked,
            num_inference_steps=steps,
            generator=generators(seeds),
            output_type="np",
            progress=False,
        )

    scaled = {"guidance_scale": scale} if is_latent(pipe) else {}
    found = [Contestant(PLAIN, plain)] if "class_labels" not in asked else []
    return found + [Contestant(guidance.name, guided(guidance.config)) for guidance in guidances]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def count_rows(denoiser: torch.nn.Module) -> list[int]:
    """One number, raised by the rows of every call of the denoiser from now on."""
    counted = [0]

    def after(module: Any, inputs: Any, output: Any) -> None:
        counted[0] += len(output[0])

    denoiser.register_forward_hook(after)
    return counted


def take_turns(
    contestants: Sequence[Contestant], size: int, rounds: int, counted: list[int], device: str
) -> None:
    """One untimed turn each, then `rounds` of timed ones in rotating order; round n has its own seeds."""
    from amg.commands.progress import bar

    cuda = torch.device(device).type == "cuda"
    with bar((rounds + 1) * len(contestants) * size, f"batch {size}") as shown:
        for number in range(-1, rounds):
            turn = number % len(contestants)
            for contestant in [*contestants[turn:], *contestants[:turn]]:
                counted[0], began = 0, time.perf_counter()
                contestant.draw(range(max(number, 0) * size, (max(number, 0) + 1) * size))
                if cuda:
                    torch.cuda.synchronize(device)
                if number >= 0:
                    contestant.seconds.append((time.perf_counter() - began) / size)
                    contestant.evaluations.append(counted[0] / size)
                shown.update(size)


def lines_of(
    contestants: Sequence[Contestant], arguments: argparse.Namespace, size: int, source: str
) -> list[dict[str, str]]:
    """One CSV line per contestant: the percentiles of its rounds, the mean of its evaluations."""
    from amg.commands.audit.environment import environment

    where, lines = environment(arguments.device), []
    for one in contestants:
        spread = (f"{value:.5g}" for value in percentiles(one.seconds))
        head = (Path(arguments.model).name, one.name, size, arguments.steps, arguments.rounds, source)
        values = (*head, *spread, f"{statistics.fmean(one.evaluations):.5g}", *where.values())
        lines.append({name: str(value) for name, value in zip(COLUMNS, values, strict=True)})
    return lines


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def append(path: Path, lines: Sequence[dict[str, str]]) -> None:
    """Append to a CSV, with a header where the file is new; ValueError for one of other columns."""
    new = not path.exists()
    if not new:
        with path.open(encoding="utf-8", newline="") as file:
            head = next(csv.reader(file), [])
        if head != list(COLUMNS):
            raise ValueError(f"`--csv` must be a file of `amg bench`, got {path} with other columns")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(lines)


def text_of(lines: Sequence[dict[str, str]]) -> str:
    """The lines of one batch size as a table, the first contestant as 1."""
    from amg.report import Table, table_text

    first = float(lines[0]["p50"])
    rows = [
        [
            line["contestant"],
            f"{float(line['p50']):.3g}",
            f"{float(line['p20']):.3g}–{float(line['p80']):.3g}",
            f"{float(line['p50']) / first:.2f}",
            f"{float(line['evaluations']):.1f}",
        ]
        for line in lines
    ]
    heads = ("contestant", "s/image", "20–80 %", f"× {lines[0]['contestant']}", "evaluations/image")
    return table_text(Table(heads, rows))
