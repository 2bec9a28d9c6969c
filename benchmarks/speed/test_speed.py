"""Speed of the hot paths with pytest-benchmark: `make bench` keeps each run and compares with the last.

A figure is the wall time of one call. `extra_info` of every result holds the environment, the versions and
the commit. Against rivals, and on GPUs: bench_kernels.py, bench_kernels_gpu.py, bench_sampler.py.
"""

from __future__ import annotations

import pytest
import torch

import amg.kernels as kernels
from amg.commands.audit.environment import environment

COEFFICIENTS = (0.98, -0.1, 0.0, 0.6, 1.25, 0.4, 7.5, 6.0, 9.0, 3.0)
STEPS = 50


@pytest.fixture
def timed(benchmark):
    """`benchmark`, its result labelled with where it was measured."""
    benchmark.extra_info.update(environment())
    return benchmark


@pytest.mark.parametrize("batch", [1, 8])
def test_guided_step(timed, batch):
    """Every term and every other gate open, Stable Diffusion's latents."""
    sample, uncond, cond, neighbour, grad = torch.randn(5, batch, 4, 64, 64).unbind()
    similarity = torch.where(torch.arange(batch) % 2 == 0, 0.7, 0.2)
    coefficients = torch.tensor(COEFFICIENTS)

    def step():
        return kernels.guided_step(
            *(sample, uncond, cond, neighbour, grad), similarity=similarity, coefficients=coefficients
        )

    assert timed(step).prev_sample.isfinite().all()


@pytest.mark.parametrize("batch", [1, 8])
def test_guided_step_into(timed, batch):
    """What an engine calls at every step: two states, rows of one output, its own buffers; 4x8x8 latents."""
    sample, noise, prev_sample = torch.randn(3, batch, 4, 8, 8).unbind()
    output, state = torch.randn(2 * batch, 4, 8, 8), torch.randn(2, batch, 4, 8, 8)
    row = torch.zeros(len(kernels.STEP_COEFFICIENTS))
    row[:10] = torch.tensor(COEFFICIENTS)
    for name, value in {
        "e_output": 1.0,
        "scale": 1.0,
        "next_scale": 1.0,
        "h0": 0.1,
        "B0_output": 1.0,
    }.items():
        row[kernels.coefficient_index(name)] = value
    rows = torch.stack([torch.arange(batch) + start for start in (0, batch, -batch, -batch)]).int()
    signals, flags = torch.empty(batch, 4), torch.zeros(batch, dtype=torch.int32)
    buffers = {"state": state, "prev_sample": prev_sample, "signals": signals, "flags": flags}
    given = {"noise": noise, "coefficients": row.repeat(batch, 1), "rows": rows}
    timed(lambda: kernels.guided_step_into(sample, output, output, **given, **buffers))
    assert not flags.any() and prev_sample.isfinite().all()


@pytest.mark.parametrize("batch", [1, 16])
def test_top1_cosine(timed, batch):
    """The nearest of 100,000 unit vectors of 512 numbers, with int8 codes."""
    rows = torch.nn.functional.normalize(torch.randn(100_000, 512), dim=1)
    queries = torch.nn.functional.normalize(rows[:batch] + 0.02 * torch.randn(batch, 512), dim=1)
    codes = kernels.encode_rows(rows)
    found = timed(lambda: kernels.top1_cosine(queries, rows, codes=codes))
    assert found.row.tolist() == list(range(batch))


def test_nl2(timed):
    """16 queries among 20,000 images of 32x32 pixels, k = 50."""
    rows = torch.randint(0, 256, (20_000, 3072), dtype=torch.uint8)
    queries = (rows[:16].float() / 255 + 0.01 * torch.randn(16, 3072)).clamp(0, 1)
    found = timed(lambda: kernels.nl2(queries, rows, k=50, alpha=0.5))
    assert found.row.tolist() == list(range(16))


@pytest.mark.parametrize("preset", ["off", "main"])
def test_denoising_step(timed, preset, tmp_path_factory):
    """photos-sd at batch 4, a run of one step: text, U-Net, the step itself and the final check."""
    pytest.importorskip("diffusers")
    import amg
    from amg import zoo
    from amg.commands.demo import open_pipeline

    index = zoo.build_index("photos-sd", tmp_path_factory.mktemp("speed") / "index.amg", progress=False)
    sampler = amg.Sampler(
        open_pipeline("photos-sd"), index, amg.AMGConfig.preset(preset, on_memorized="flag")
    )
    latents = torch.randn(4, 16, 8, 8)
    prompts = ["a photo of a cat, top left"] * 4

    def one_step():
        return sampler(prompts, num_inference_steps=1, latents=latents, output_type="latent", progress=False)

    assert torch.isfinite(timed(one_step).images).all()
