"""Sampling under bad input and faults: a clear error or warning each, never an unchecked image."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import amg

diffusers = pytest.importorskip("diffusers")
OPEN = {"lambda_min": -1.0, "lambda_max": -1.0, "c1": 20.0, "c2": 20.0, "on_memorized": "flag"}
WAYS = ["protect", "Sampler"]


def sample(way, pipe, index, config=None, steps=4, seed=0, **more):
    """Two images from the pipeline through `amg.protect` or `amg.Sampler`."""
    config = config or amg.AMGConfig.preset("main", on_memorized="flag")
    more = {"generator": [torch.Generator().manual_seed(seed + row) for row in (0, 1)], **more}
    if hasattr(pipe, "vae"):
        more = {"prompt": ["abc", "cat, red"], "output_type": "pt", **more}
    else:
        more = {"batch_size": 2, "output_type": "np", **more}
    if way == "protect":
        return amg.protect(pipe, index, config)(num_inference_steps=steps, **more)
    return amg.Sampler(pipe, index, config)(num_inference_steps=steps, progress=False, **more)


@pytest.fixture(params=["sd", "ddpm"])
def pipe_and_index(request):
    index = "embedding_index" if request.param == "sd" else "pixel_index"
    return request.getfixturevalue(request.param), request.getfixturevalue(index)


@pytest.mark.parametrize("steps", [0, -3])
@pytest.mark.parametrize("way", WAYS)
def test_zero_steps(way, steps, pipe_and_index):
    with pytest.raises(ValueError, match=rf"`num_inference_steps` must be >= 1, got {steps}"):
        sample(way, *pipe_and_index, steps=steps)


@pytest.mark.parametrize("preset", ["main", "off"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_breaks_halfway(way, bad, preset, pipe_and_index):
    """One element of one sample, at the third of four steps."""
    pipe, index = pipe_and_index
    calls = []

    def breaking(module, inputs, outputs):
        calls.append(len(outputs))
        if len(calls) == 3:
            outputs[-1, 0, 1, 2] = bad

    handle = pipe.unet.conv_out.register_forward_hook(breaking)
    with pytest.raises(FloatingPointError, match="finite"):
        sample(way, pipe, index, amg.AMGConfig.preset(preset, on_memorized="flag"))
    handle.remove()
    assert (
        len(calls) == 3 if preset == "main" and way == "protect" else len(calls) >= 3
    )  # ours: when it looks
    assert not hasattr(pipe, "amg_verdicts")


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_guidance_scale_of_one_or_less_says_what_cannot_act(way, scale, sd, embedding_index):
    with pytest.warns(UserWarning, match=rf"`guidance_scale` is {scale}: despecification and caption de-dup"):
        sample(way, sd, embedding_index, guidance_scale=scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(way, sd, embedding_index, guidance_scale=1.5)
        sample(way, sd, embedding_index, amg.AMGConfig.preset("off"), guidance_scale=scale)


@pytest.mark.parametrize("way", WAYS)
def test_a_guidance_scale_of_one_with_classes(way, class_ddpm, pixel_index):
    labels = torch.tensor([1, 3])
    despecified = amg.AMGConfig.preset("main", c1=1.0, on_memorized="flag")
    with pytest.warns(UserWarning, match=r"`guidance_scale` is 1.0: despecification"):
        sample(way, class_ddpm, pixel_index, despecified, guidance_scale=1.0, class_labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(way, class_ddpm, pixel_index, despecified, class_labels=labels)
        sample(way, class_ddpm, pixel_index, guidance_scale=1.0, class_labels=labels)  # c1 = c2 = 0


@pytest.mark.parametrize("way", WAYS)
def test_an_index_on_another_device_than_the_pipeline(way, pipe_and_index):
    pipe, index = pipe_and_index
    with pytest.raises(ValueError, match=r"on meta \(the index's device\), got .* on cpu: move them, or the"):
        sample(way, pipe, index.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_an_index_on_a_gpu_and_a_pipeline_on_the_cpu(way, pipe_and_index):
    pipe, index = pipe_and_index
    with pytest.raises(
        ValueError, match=r"on cuda:0 \(the index's device\), got .* on cpu: move them, or the"
    ):
        sample(way, pipe, index.to("cuda"))


def test_two_threads_sampling_with_one_index(ddpm, pixel_index):
    """One pipeline's components and one index, two samplers and other seeds: what each gives alone. The free
    signals and the similarities of a trace, sums over a sample, show the last bit of networks that share the
    cores."""
    samplers = [amg.Sampler(ddpm, pixel_index, amg.AMGConfig.preset("main", **OPEN)) for _ in range(2)]

    def draw(seed):
        generator = [torch.Generator().manual_seed(seed)]
        out = samplers[seed % 2](
            generator=generator, num_inference_steps=10, output_type="pt", progress=False
        )
        trace = [replace(step, signals=None, similarity=None) for step in out.amg[0].trace]
        signals = [value for step in out.amg[0].trace for value in (*step.signals, step.similarity or 0.0)]
        return out.images, signals, out.amg[0].similarity, out.amg[0].neighbour.row, trace

    alone = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(draw, range(8)))
    assert len({row for *_, row, _ in alone}) > 1, "the samples have neighbours of their own"
    for (images, signals, *verdict), (expected, known, *truth) in zip(together, alone, strict=True):
        assert torch.equal(images, expected) and verdict == truth
        assert signals == pytest.approx(known, rel=1e-5)
