"""diffusers' own tests on protected pipelines: `python benchmarks/bench_diffusers_tests.py`."""
