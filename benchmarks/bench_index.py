"""What an index costs to make at size: folding, importing, memory.

python benchmarks/bench_index.py                    # benchmarks/results/index.csv
python benchmarks/bench_index.py --cases fold-88k   # one of them; the figures of others stay

Vectors are made up: unit rows of 512, of which a share are near-duplicates of others, at cosine 0.985 to
them, so that every one of them has to fold (the threshold is 0.98). "flat": all directions alike; "decaying":
power −1/2, 2,000 clusters. Each case runs in a process of its own, whose peak memory is read.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from protocol import RESULTS, commit, processor

DIMENSION, COSINE, BLOCK = 512, 0.985, 1 << 15
CLUSTERS = 2000
CASES = {  # distinct rows, near-duplicates, spectrum, whether near-duplicates fold
    "fold-88k": (80_000, 8_000, "flat", True),
    "fold-88k-off": (80_000, 8_000, "flat", False),
    "fold-88k-decaying": (80_000, 8_000, "decaying", True),
    "fold-1m": (950_000, 50_000, "flat", True),
    "fold-1m-decaying": (950_000, 50_000, "decaying", True),
}


def directions(count: int, spectrum: str, generator: torch.Generator, axes: torch.Tensor) -> torch.Tensor:
    """Unit rows [count, 512]."""
    drawn = torch.randn(count, DIMENSION, generator=generator)
    if spectrum == "decaying":
        chosen = torch.randint(CLUSTERS, (count,), generator=generator)
        drawn = (0.7 * axes[chosen] + drawn) * torch.arange(1, DIMENSION + 1) ** -0.5
    return torch.nn.functional.normalize(drawn, dim=1)


def near(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Unit rows at cosine COSINE to `rows`."""
    noise = torch.randn(rows.shape, generator=generator)
    across = torch.nn.functional.normalize(noise - (noise * rows).sum(1, keepdim=True) * rows, dim=1)
    return COSINE * rows + (1 - COSINE**2) ** 0.5 * across


def made(path: Path, distinct: int, planted: int, spectrum: str) -> None:
    """The vectors of a case in a .npy file, the near-duplicates anywhere among them."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(CLUSTERS, DIMENSION, generator=generator)
    order = torch.randperm(distinct + planted, generator=generator).numpy()
    shape = (distinct + planted, DIMENSION)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, distinct, BLOCK):
        count = min(BLOCK, distinct - start)
        file[order[start : start + count]] = directions(count, spectrum, generator, axes).half().numpy()
    for start in range(0, planted, BLOCK):
        count = min(BLOCK, planted - start)
        of = torch.from_numpy(file[order[start : start + count]]).float()
        again = near(torch.nn.functional.normalize(of, dim=1), generator).half().numpy()
        file[order[distinct + start : distinct + start + count]] = again
    file.flush()


def run(case: str) -> None:
    """One case, in this process: a line of JSON."""
    import amg

    distinct, planted, spectrum, folds = CASES[case]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(Path(folder) / "v.npy", distinct, planted, spectrum)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        index = amg.Index.from_embeddings(
            Path(folder) / "v.npy", None, "made up", Path(folder) / "i", near_duplicate=folds, progress=False
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        again = amg.Index.open(index.path)
        opening = time.perf_counter() - start
        folded = index.manifest.coverage.folded
        files = index.manifest.files
        texts = files["meta.parquet"].size + files["pictures.parquet"].size
    print(
        json.dumps(
            {
                "rows": distinct + planted,
                "spectrum": spectrum,
                "planted": planted if folds else 0,
                "folded": folded,
                "seconds": round(seconds, 1),
                "peak GiB": round(peak / 2**20, 2),
                "of it before": round(before / 2**20, 2),
                "opening ms": round(1e3 * opening, 1),
                "rows kept": again.count,
                "bytes of texts a picture": round(texts / (distinct + planted)),
            }
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=RESULTS / "index.csv")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        run(options.one)
        return 0
    known: dict[str, dict[str, str]] = {}
    if options.csv.exists():
        with options.csv.open(newline="", encoding="utf-8") as file:
            known = {line["case"]: line for line in csv.DictReader(file)}
    for case in options.cases:
        command = [sys.executable, __file__, "--one", case, "--threads", str(options.threads)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        where = {"threads": options.threads, "machine": processor(), "commit": commit()}
        known[case] = {"case": case, **json.loads(found.stdout.splitlines()[-1]), **where}
        print(", ".join(f"{name} {value}" for name, value in known[case].items()), flush=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*known[case]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(known[name] for name in CASES if name in known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
