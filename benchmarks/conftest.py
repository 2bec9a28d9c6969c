"""Lets `pytest benchmarks/bench_kernels.py` import its neighbours, as running the file does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
