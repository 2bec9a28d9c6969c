"""Which full searches lazy exact search skips along real trajectories, every decision checked.

    python benchmarks/lazy_share.py --images 64     # benchmarks/results/lazy.csv

Plain generations of photos-sd, half of memorised and half of ordinary prompts, are embedded at every step.
Each sample's embeddings are then searched for lazily, and every answer is compared with a full search: the
exact nearest row, or where the gate is closed for certain, that nothing lies above the limit.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import torch
from protocol import RESULTS, append, commit, processor
from torch import Tensor
from tqdm import tqdm

from amg.commands.demo import GUIDANCE_SCALES, caption_jobs, open_index, open_pipeline
from amg.config import AMGConfig
from amg.engine.sampler import Sampler
from amg.index.lazy import KEPT_ROWS, Kept, nearest_lazily
from amg.similarity import Measured
from amg.zoo.photos import training_set

NAME = "photos-sd"
COLUMNS = (
    *("date", "commit", "device", "torch", "model", "rows", "kept", "steps", "images", "half", "searches"),
    *("proved_pct", "closed_pct", "full_pct", "limit"),
)


class Recorder:
    """Stands in for a sampler's similarity: keeps the unit embeddings [B, D] of every step."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.kept: list[Tensor] = []

    def measure(self, x0_hat: Tensor, flights: Any = None, limit: float = 0.0) -> Measured:
        embedding = self.inner.index.embedder(self.inner.decode(x0_hat).clamp(0, 1))
        self.kept.append(torch.nn.functional.normalize(embedding.float()))
        similarity, row, _ = self.inner.index.nearest(self.kept[-1])
        return Measured(similarity, row, {})


def trajectories(index: Any, images: int, steps: int, seed: int) -> Tensor:
    """Unit embeddings of plain generations at every step, [T, N, D]."""
    pipe = open_pipeline(NAME)
    jobs = caption_jobs(4 * images, 0, training_set(64))
    by_kind = [
        [text for text, kind in zip(jobs.prompts, jobs.kinds, strict=True) if kind == wanted]
        for wanted in ("specific", "ordinary")
    ]
    texts = [by_kind[number % 2][number // 2] for number in range(images)]
    options = {"c1": 0.0, "c2": 0.0, "c3": 0.0, "check_at": (), "rewind_at": (), "on_memorized": "flag"}
    sampler = Sampler(pipe, index, AMGConfig.preset("main", **options))
    parts = []
    for first in tqdm(range(0, images, 16), desc="generations", unit="batch"):
        sampler.similarity = recorder = Recorder(sampler.similarity)  # type: ignore[assignment]
        batch = texts[first : first + 16]
        sampler(
            batch,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALES[NAME],
            output_type="latent",
            progress=False,
        )
        parts.append(torch.stack(recorder.kept))
        sampler.similarity = recorder.inner
    return torch.cat(parts, 1)


def shares(index: Any, walks: Tensor, limit: float) -> list[tuple[str, int, float, float, float]]:
    """(half, searches, proved, closed, full), shares in percent, of the early and the late half."""
    kept, found, counted = [Kept() for _ in range(walks.shape[1])], [], torch.zeros(3, dtype=torch.int64)
    for queries in walks:
        lazily = nearest_lazily(index.searcher, queries, kept, limit=limit)
        fully = index.searcher.nearest(queries)
        close = fully.similarity > limit
        if not torch.equal(lazily.similarity > limit, close) or not torch.equal(
            lazily.row[close], fully.row[close]
        ):
            raise AssertionError("a lazy search decided otherwise than a full one")
        now = torch.tensor(
            [sum(getattr(own, name) for own in kept) for name in ("skipped", "closed", "full")]
        )
        found.append(now - counted)
        counted = now
    halves = torch.stack(found).tensor_split(2)
    lines = []
    for name, part in zip(("early", "late"), halves, strict=True):
        total = int(part.sum())
        proved, closed, full = (100 * part.sum(0) / total).tolist()
        lines.append((name, total, proved, closed, full))
    return lines


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=4000)
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder of the index")
    parser.add_argument("--out", type=Path, default=RESULTS / "lazy.csv")
    options = parser.parse_args()
    index = open_index(NAME, options.work / f"{NAME}.amg")
    walks = trajectories(index, options.images, options.steps, options.seed)
    lambda_min = AMGConfig.preset("main").for_metric("cosine").lambda_min
    assert lambda_min is not None
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    head = (now, commit(), processor(), torch.__version__, NAME, index.count, KEPT_ROWS)
    lines = []
    for limit in (-1.0, lambda_min):
        for half, searches, *percent in shares(index, walks, limit):
            values = (*head, options.steps, options.images, half, searches)
            values = (*values, *(f"{value:.1f}" for value in percent), "" if limit < 0 else limit)
            lines.append(dict(zip(COLUMNS, values, strict=True)))
            print({name: lines[-1][name] for name in COLUMNS[9:]})
    append(options.out, lines, COLUMNS)


if __name__ == "__main__":
    main()
