"""Latency and peak memory of the engine beside diffusers on one GPU, for Stable Diffusion's shapes.

    python benchmarks/bench_engine_gpu.py                       # SD 1.5 and SDXL, batch 1, 4, 16, fp16
    python benchmarks/bench_engine_gpu.py --device cpu --tiny   # a tiny model, two rounds: tries the plumbing

Weights are random and the index holds nothing like what they draw, so no gate opens: a call makes its steps
and its checks, which the column `evaluations` (U-Net evaluations an image, both halves) shows. SDXL is its
U-Net without the added embedding of size and pooled text. The index holds `--rows` pictures; the search of a
million rows is timed by bench_kernels_gpu.py. Every contestant decodes; a call is timed by the wall clock
until the device is done.

`amg ..., graphs` replays the U-Net from CUDA graphs (`Sampler(cuda_graphs=True)`); `network alone` is what
none can do without: its replays and the decode, nothing between.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from protocol import RESULTS, append, commit, percentiles, slug
from sampling.models import SHAPES, RandomEmbedder, Shape, random_pipeline

import amg
from amg.engine.graphs import Graphs

COLUMNS = (
    *("date", "commit", "device", "torch", "model", "batch", "contestant", "steps", "rows"),
    *("p20_s", "p50_s", "p80_s", "peak_mib", "evaluations", "note"),
)
BATCHES, ROUNDS, STEPS, ROWS = "1,4,16", 5, 30, 1024
SCALE, BRIGHT = 7.5, 0.8
TINY = Shape(
    8,
    {
        "block_out_channels": (8, 16),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    {"block_out_channels": (8, 8), "norm_num_groups": 4},
    (16, 4),
    64,
)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Run:
    """What is measured and where; `backend` is torch.compile's, `compiled` the batches it is tried at."""

    device: str
    steps: int
    rows: int
    rounds: int
    backend: str
    compiled: tuple[int, ...]


class FarEmbedder(torch.nn.Module):
    """A random embedder under which the bright pictures of the index are at right angles to all others."""

    name, dimension, sha, preprocessing = "far", 2 * RandomEmbedder.dimension, "0" * 64, "none"

    def __init__(self, size: int, width: int):
        super().__init__()
        self.inner = RandomEmbedder(size, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found, bright = self.inner(images), (images.mean((1, 2, 3)) > BRIGHT)[:, None]
        return torch.cat([found * bright, found * ~bright], 1)


@dataclass(frozen=True)
class Bench:
    """A pipeline with its index of other pictures."""

    name: str
    pipe: Any
    index: Any


def opened(name: str, shape: Shape, run: Run, folder: Path) -> Bench:
    """A pipeline of random weights and an index of bright noise."""
    torch.manual_seed(0)
    pipe = random_pipeline(shape, run.device)
    pipe.set_progress_bar_config(disable=True)
    side = shape.embedder[0]
    pictures = BRIGHT + (1 - BRIGHT) * torch.rand(run.rows, 3, side, side)
    embedder = FarEmbedder(*shape.embedder).eval().requires_grad_(False)
    captions = [f"picture {row}" for row in range(run.rows)]
    index = amg.Index.build(
        pictures, captions, embedder, folder / f"{name}.amg", near_duplicate=False, progress=False
    )
    index = amg.Index.open(index.path, embedder.to(run.device), device=run.device)
    return Bench(name, pipe, index)


@contextlib.contextmanager
def compiled(unet: torch.nn.Module, backend: str) -> Iterator[None]:
    """The U-Net compiled in place meanwhile."""
    unet.compile(backend=backend)
    try:
        yield
    finally:
        unet._compiled_call_impl = None
        torch.compiler.reset()


@contextlib.contextmanager
def contestants(bench: Bench, batch: int, run: Run) -> Iterator[dict[str, Call]]:
    """Each contestant's whole call of one batch; the samplers are closed at the end."""
    keywords = {"num_inference_steps": run.steps, "guidance_scale": SCALE, "output_type": "pt"}
    prompts = [f"drawing {number}" for number in range(batch)]

    def call(draw: Any, **more: Any) -> Any:
        made = [torch.Generator(run.device).manual_seed(seed) for seed in range(batch)]
        return draw(prompts, generator=made, **keywords, **more)

    found: dict[str, Call] = {"diffusers": lambda: call(bench.pipe)}
    with contextlib.ExitStack() as open_samplers:
        for preset, graphs in itertools.product(("off", "main"), (False, True)):
            if graphs and run.device != "cuda":
                continue
            config = amg.AMGConfig.preset(preset)
            sampler = amg.Sampler(
                bench.pipe, bench.index, config, max_batch=max(batch, 2), cuda_graphs=graphs
            )
            open_samplers.enter_context(sampler)
            name = f"amg {preset}, graphs" if graphs else f"amg {preset}"
            found[name] = lambda sampler=sampler: call(sampler, progress=False)
        if run.device == "cuda":
            found["network alone"] = network_alone(bench.pipe, batch, run.steps)
        yield found


@torch.no_grad()
def network_alone(pipe: Any, batch: int, steps: int) -> Call:
    """`steps` replays of the U-Net's captured call for both halves of a batch, and one decode."""
    unet, replayed = pipe.unet, Graphs(lambda sample, t, **rest: pipe.unet(sample, t, **rest).sample)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    like = {"device": unet.device, "dtype": unet.dtype}
    sample = torch.randn(2 * batch, unet.config.in_channels, size, size, **like)
    words = torch.randn(2 * batch, pipe.tokenizer.model_max_length, width, **like)
    t = torch.tensor(500, device=unet.device)

    @torch.no_grad()
    def call() -> None:
        for _ in range(steps):
            replayed(sample, t, encoder_hidden_states=words)
        pipe.vae.decode(sample[:batch])

    return call


def seconds(call: Call, device: str) -> float:
    """Seconds of one call until the device is done."""
    settle(device)
    start = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - start


def settle(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(call: Call, device: str) -> float | None:
    """The most that torch had allocated during one call, weights included; None on a CPU."""
    if device != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def evaluations(made: Any, run: Run) -> float:
    """U-Net evaluations an image: the verdicts' mean, or two a step of the plain pipeline."""
    verdicts = getattr(made, "amg", None)
    return 2.0 * run.steps if verdicts is None else sum(v.evaluations for v in verdicts) / len(verdicts)


def measured(calls: dict[str, Call], run: Run) -> dict[str, dict[str, object]]:
    """Figures by contestant: one call to warm up, one for memory, then turns. Out of memory is a note."""
    found: dict[str, dict[str, object]] = {}
    for name, call in calls.items():
        try:
            made = call()
            peak = peak_mib(call, run.device)
        except torch.OutOfMemoryError:
            found[name] = {"note": "out of memory"}
            torch.cuda.empty_cache()
            continue
        rounded = "" if peak is None else round(peak)
        found[name] = {"peak_mib": rounded, "evaluations": evaluations(made, run)}
    ran = [name for name in calls if "note" not in found[name]]
    times: dict[str, list[float]] = {name: [] for name in ran}
    for turn in range(run.rounds):
        first = turn % max(1, len(ran))
        for name in ran[first:] + ran[:first]:
            times[name].append(seconds(calls[name], run.device))
    for name, own in times.items():
        spread = (f"{value:.5g}" for value in percentiles(own))
        found[name] |= dict(zip(("p20_s", "p50_s", "p80_s"), spread, strict=True))
    return found


def lines_of(bench: Bench, batch: int, run: Run) -> list[dict[str, object]]:
    """The CSV's lines for one model and batch: all as they are, then where asked all with the U-Net
    compiled."""
    with contestants(bench, batch, run) as calls:
        figures = measured(calls, run)
    if batch in run.compiled:
        with compiled(bench.pipe.unet, run.backend), contestants(bench, batch, run) as calls:
            inside = measured(calls, run)
        figures |= {f"{name}, compiled": own for name, own in inside.items()}
    head = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(run.device),
        "torch": torch.__version__,
        "model": bench.name,
        "batch": batch,
        "steps": run.steps,
        "rows": run.rows,
    }
    return [{**head, "contestant": name, **own} for name, own in figures.items()]


def device_name(device: str) -> str:
    """What the CSV calls it."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu (plumbing only)"


def show(lines: Sequence[dict[str, object]]) -> None:
    """Print a line each."""
    for line in lines:
        spread = "  ".join(str(line.get(name, "-")) for name in ("p50_s", "p20_s", "p80_s"))
        memory = line.get("peak_mib") or "-"
        print(
            f"{line['model']:6s} batch {line['batch']:<3} {line['contestant']:22s} {spread} s, {memory} MiB,"
            f" {line.get('evaluations', '-')} evaluations {line.get('note', '')}",
            flush=True,
        )


def tables(path: Path) -> str:
    """The Markdown of a device's CSV: of each case the last run of each contestant."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = {(line["model"], line["batch"], line["contestant"]): line for line in csv.DictReader(file)}
    found, plain = [], "diffusers"
    for (model, batch, name), line in lines.items():
        base = lines[model, batch, plain]
        spread = f"{line['p50_s']} ({line['p20_s']} – {line['p80_s']})"
        over = f"{float(line['p50_s']) / float(base['p50_s']):.2f}" if line["p50_s"] else ""
        found.append([model, batch, name, spread, over, line["peak_mib"], line["note"]])
    first = next(iter(lines.values()))
    heads = ["model", "batch", "contestant", "s a call", "× diffusers", "MiB", "note"]
    bars = [" | ".join(row) for row in (heads, ["---"] * len(heads), *found)]
    run = f"torch {first['torch']}, {first['steps']} steps, commit {first['commit']}, {first['date'][:10]}"
    return "\n".join([f"### {first['device']}, {run}", "", *(f"| {bar} |" for bar in bars)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few of everything")
    parser.add_argument("--models", default="sd15,sdxl", help="of sd15 and sdxl")
    parser.add_argument("--batches", default=BATCHES, help=f"images in a call (default {BATCHES})")
    parser.add_argument("--compiled", default=BATCHES, help="batches at which torch.compile is tried, too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS, help="pictures in the index")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no batch after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny")
    if unknown := {*options.models.split(",")} - {"sd15", "sdxl"}:
        parser.error(f"--models must be of sd15 and sdxl, got {', '.join(sorted(unknown))}")
    return options


def numbers(text: str) -> tuple[int, ...]:
    """Of a list with commas, which may be empty."""
    return tuple(int(part) for part in text.split(",") if part)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where a batch failed or was not started in time."""
    options, start, failures = parse(arguments), time.monotonic(), []
    if options.tiny:
        run = Run(options.device, 2, TINY.rows, 2, "eager", (1,))
        shapes, batches = {"tiny": TINY}, (1, 2)
    else:
        rest = (options.rows, options.rounds, "inductor", numbers(options.compiled))
        run = Run(options.device, options.steps, *rest)
        shapes = {name: SHAPES[name] for name in options.models.split(",")}
        batches = numbers(options.batches)
    path = options.out / f"engine-{slug(device_name(run.device))}.csv"
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = opened(name, shape, run, Path(folder))
            for batch in batches:
                try:
                    if time.monotonic() - start > options.seconds:
                        raise TimeoutError("not started, the time is up")
                    lines = lines_of(bench, batch, run)
                except Exception as error:
                    traceback.print_exc()
                    failures.append(f"{name}, batch {batch}: {type(error).__name__}: {error}")
                    continue
                show(lines)
                append(path, lines, COLUMNS)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
