"""Times sampling end to end: plain diffusers, guidance done literally, ours with each saving added.

    python benchmarks/bench_sampler.py                     # CPU; figures go to benchmarks/results/sampler.csv
    python benchmarks/bench_sampler.py --quick --model photos-sd   # one round, nothing recorded
    python benchmarks/bench_sampler.py --share 256         # also the memorised share over many images
    python benchmarks/bench_sampler.py --device cuda       # SD 1.5's and SDXL's shapes, random weights, fp16

All contestants draw the same prompts from the same seeds in one process, taking turns round after round;
times are medians. What a call does is counted exactly, and must be the same in every round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from protocol import RESULTS, append, commit, percentiles, processor, slug
from sampling.contestants import CONTESTANTS, LITERAL, OURS, PLAIN, Contestant, Drawing, generators
from sampling.counting import COUNTED, count_pipeline, counted_index, extra_mib, seconds_of
from sampling.models import KINDS, MODELS, Model, proportions
from sampling.tables import COLUMNS, Line, judged, waterfall
from torch import Tensor

STEPS = 30
# oneDNN keeps 1,024 compiled convolutions, one per batch size, and reads this at the first. Nine contestants
# have more, and each would find in its turn that the others' had pushed out its own.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")


@dataclass(frozen=True)
class Case:
    """What every contestant draws in one turn: `images` of a model's prompts, `batch` at a time."""

    model: str
    prompts: str
    batch: int
    images: int
    rounds: int = 5
    contestants: tuple[str, ...] = ()  # all

    @property
    def name(self) -> str:
        return f"{self.model} {self.prompts} {self.batch:02d}"


# As many as make a run of less than eight minutes on two cores.
CASES = {
    "cpu": (
        *(Case("photos-sd", kind, 1, 2, 3) for kind in KINDS[:2]),
        *(Case("photos-sd", kind, 4, 4, 3) for kind in KINDS),
        *(Case("photos-sd", kind, 16, 16, 2) for kind in KINDS[:2]),
        *(Case("sd-proportions", kind, 2, 2, 3) for kind in KINDS[:2]),
    ),
    "cuda": tuple(
        Case(model, kind, batch, 4, 3)
        for model in ("sd15", "sdxl")
        for kind in ("ordinary", "memorised")
        for batch in (1, 4)
    ),
}


MORE = (
    *(Case("photos-sd", "mixed", batch, max(batch, 2), 3) for batch in (1, 16)),
    *(Case("sd-proportions", kind, batch, batch, 3) for kind in KINDS for batch in (1, 4, 16)),
)


@dataclass
class Entry:
    """One contestant's turns in one case: what it drew, what that took, and how long each turn lasted."""

    contestant: Contestant
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    verdicts: list = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    extra_mib: float = 0.0
    seconds: list[float] = field(default_factory=list)


class Course:
    """A case with its model's callables counted."""

    def __init__(self, case: Case, model: Model, counts: Counter[str], steps: int, device: str):
        self.case, self.model, self.counts, self.steps, self.device = case, model, counts, steps, device
        self.index = counted_index(model.index, counts)

    def draw(self, contestant: Contestant) -> Drawing:
        """One turn: all images of the case, in batches."""
        prompts, seeds = self.model.prompts(self.case.prompts, self.case.images)
        drawings = []
        for first in range(0, len(prompts), self.case.batch):
            part = slice(first, first + self.case.batch)
            noise = generators(seeds[part], self.device)
            pipe = self.model.pipe
            drawings.append(contestant.draw(pipe, self.index, self.model, prompts[part], noise, self.steps))
        images = torch.cat([drawing.images for drawing in drawings])
        return Drawing(images, [verdict for drawing in drawings for verdict in drawing.verdicts])

    def first(self, contestant: Contestant) -> Entry:
        """The untimed turn, whose pictures, counts and memory are reported."""
        entry = Entry(contestant)

        def call() -> None:
            entry.images, entry.verdicts = self.draw(contestant)

        self.counts.clear()
        entry.extra_mib = extra_mib(call, self.device)
        entry.counted = Counter(self.counts)
        return entry

    def time(self, entry: Entry) -> None:
        """A timed turn; raises where it did other work than the first."""
        self.counts.clear()
        taken = seconds_of(lambda: self.draw(entry.contestant), self.device)
        if self.counts != entry.counted:
            raise AssertionError(f"{entry.contestant.name}: counted {self.counts}, before {entry.counted}")
        entry.seconds.append(taken / self.case.images)


def run_case(course: Course, contestants: Sequence[Contestant], rounds: int) -> list[Entry]:
    """One untimed turn each, then `rounds` rounds in which the contestants take turns."""
    entries = [course.first(contestant) for contestant in contestants]
    for number in range(rounds):
        turn = number % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            course.time(entry)
    return entries


def lines_of(course: Course, entries: Sequence[Entry], device: str, note: str) -> list[Line]:
    """One line per contestant, in the order of COLUMNS; counts are per image."""
    case = course.case
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    run = (now, commit(), device, torch.__version__, torch.get_num_threads(), case.model, course.steps)
    plain = next((entry.images for entry in entries if entry.contestant.name == PLAIN), None)
    lines = []
    for entry in entries:
        head = (*run, case.prompts, case.batch, case.images, len(entry.seconds), entry.contestant.name)
        spread = (f"{value:.4g}" for value in percentiles(entry.seconds))
        counted = (f"{entry.counted[name] / case.images:.4g}" for name in COUNTED)
        values = (*head, *spread, *counted, *said(course.model, entry, plain), f"{entry.extra_mib:.0f}", note)
        lines.append(dict(zip(COLUMNS, values, strict=True)))
    return lines


def said(model: Model, entry: Entry, plain: Tensor | None) -> tuple[str, ...]:
    """Rewinds, retries and blocked per image; memorised, judged copies and changed in percent."""
    verdicts, images = entry.verdicts, entry.images
    told: tuple[str, ...] = ("", "", "", "")
    if verdicts:
        totals = [sum(values) for values in zip(*map(fate, verdicts), strict=True)]
        told = tuple(
            f"{total * scale / len(verdicts):.4g}"
            for total, scale in zip(totals, (1, 1, 1, 100), strict=True)
        )
    copies = f"{100 * model.judge(images):.4g}" if model.judge else ""
    return (*told, copies, "" if plain is None else f"{changed(images, plain):.4g}")


def fate(verdict) -> tuple[int, int, bool, bool]:
    """A verdict's rewinds, retries, whether it was blocked, and whether a memorised image was delivered."""
    return verdict.rewinds, verdict.retries, verdict.blocked, verdict.memorized and not verdict.blocked


def changed(images: Tensor, plain: Tensor) -> float:
    """Percentage of the images that differ from plain's in the 8 bits they are delivered in."""
    ours, theirs = ((value.float() * 255).round() for value in (images, plain))
    return 100 * (ours != theirs).flatten(1).any(1).float().mean().item()


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    cases = [*CASES[options.device], *(MORE if options.all and options.device == "cpu" else ())]
    if options.share:
        three = (PLAIN, LITERAL, OURS)
        cases.append(Case("photos-sd", "memorised", 16, options.share, 1, three))
        cases.append(Case("photos-sd", "ordinary", 16, options.share, 1, (PLAIN, OURS)))
    return [
        case
        for case in cases
        if options.only in case.name and (not options.model or case.model in options.model)
    ]


def run_model(
    name: str, cases: Sequence[Case], options: argparse.Namespace, path: Path | None
) -> tuple[list[Line], list[str]]:
    """Measure, show and record a model's cases; a case that fails is reported and the rest go on."""
    lines, failures, counts = [], [], Counter[str]()
    model = MODELS[name](options.work, options.steps, options.device)
    unet, decode = proportions(model.pipe)
    note = f"U-Net {unet:.3g} GFLOP, decode {decode / unet:.2f} of it, {model.index.count} rows"
    print(f"\n{name}: {note}", flush=True)
    count_pipeline(model.pipe, counts)
    model.pipe.set_progress_bar_config(disable=True)
    for case in cases:
        course = Course(case, model, counts, options.steps, options.device)
        contestants = [one for one in CONTESTANTS if one.name in (case.contestants or [one.name])]
        rounds = options.rounds or (1 if options.quick else case.rounds)
        try:
            found = lines_of(course, run_case(course, contestants, rounds), device_name(options.device), note)
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{case.name}: {type(error).__name__}: {error}")
            continue
        print(waterfall(found), flush=True)
        lines += found
        if path is not None:
            append(path, found, COLUMNS)
    return lines, failures


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="PART", help="cases with this in 'MODEL PROMPTS BATCH', '04'"
    )
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="these models alone")
    parser.add_argument("--quick", action="store_true", help="one round, nothing recorded")
    parser.add_argument("--rounds", type=int, help="turns of each contestant, instead of each case's own")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps (default {STEPS})")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--all", action="store_true", help="more prompt sets and batches; half an hour")
    parser.add_argument(
        "--share", type=int, metavar="IMAGES", help="also draw so many memorised and ordinary prompts once"
    )
    parser.add_argument("--device", choices=tuple(CASES), default="cpu")
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of photos-sd's index")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    stem = "sampler" if options.device == "cpu" else f"sampler-{slug(device_name('cuda'))}"
    path = None if options.quick else options.out / f"{stem}.csv"
    cases, lines, failures = chosen_cases(options), [], []
    for name in dict.fromkeys(case.model for case in cases):
        mine = [case for case in cases if case.model == name]
        found, failed = run_model(name, mine, options, path)
        lines, failures = lines + found, failures + failed
    print(f"\n{device_name(options.device)}, torch {torch.__version__}, commit {commit()}\n\n{judged(lines)}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
