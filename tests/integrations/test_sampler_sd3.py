"""Stable Diffusion 3 in the engine: flow matching on a transformer, in the same slots."""

import pytest
import torch

import amg

from .. import pipelines_tiny
from .conftest import TinyEmbedder
from .test_watch import OPEN, PLANTED, drawn, generators, index_of, noise, protected

diffusers = pytest.importorskip("diffusers")
STEPS = 6


@pytest.fixture
def sd3():
    pipe, _ = pipelines_tiny.build("sd3")
    return pipe


def config(**options):
    return amg.AMGConfig.preset("main", guidance_scale=5.0, **options)


def call(sampler, prompts=("abc", "de"), seeds=(1, 2), **more):
    given = {"num_inference_steps": STEPS, "max_sequence_length": 4, "output_type": "pt", **more}
    return sampler(list(prompts), generator=generators(seeds), progress=False, height=16, width=16, **given)


@pytest.mark.parametrize("shift", ["static", "dynamic"])
def test_off_is_the_pipeline_to_a_grey_level(sd3, shift, tmp_path):
    if shift == "dynamic":
        sd3.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    given = {**pipelines_tiny.build("sd3")[1], "num_inference_steps": STEPS}
    plain = drawn(sd3, given).images
    index = index_of(noise(60, plain), tmp_path)
    sampler = amg.Sampler(sd3, index, amg.AMGConfig.preset("off", guidance_scale=5.0))
    assert (call(sampler).images - plain.clamp(0, 1)).abs().max() <= 1 / 255
    latents = call(sampler, output_type="latent").images
    own = sd3(**given, generator=generators(), output_type="latent").images
    torch.testing.assert_close(latents, own, rtol=0, atol=2e-4)


def test_it_is_protect_with_every_term_and_a_rewind(sd3, tmp_path):
    given = {**pipelines_tiny.build("sd3")[1], "num_inference_steps": STEPS}
    index = index_of(noise(40, drawn(sd3, given).images), tmp_path, TinyEmbedder())
    limits = {"lambda_min": -1.0, "lambda_max": -1.0, "threshold": 0.99, "rewind_threshold": -0.99}
    options = {**OPEN, **limits, "c1": 1.0, "c2": 3.0}
    ours = call(amg.Sampler(sd3, index, config(**options)))
    protected(sd3, index, **options)
    theirs = drawn(sd3, given)
    assert [verdict.rewinds for verdict in ours.amg] == [verdict.rewinds for verdict in theirs.amg] == [1, 1]
    assert [v.caption for v in ours.amg] == [v.caption for v in theirs.amg] != [None, None]
    terms = {term for verdict in ours.amg for step in verdict.trace for term in step.terms}
    assert {"despecification", "deduplication", "dissimilarity", "rewind"} <= terms
    assert (ours.images - theirs.images.clamp(0, 1)).abs().max() <= 1 / 255


def test_requests_share_calls_and_planted_copies_leave(sd3, tmp_path):
    given = {**pipelines_tiny.build("sd3")[1], "num_inference_steps": STEPS}
    plain = drawn(sd3, given).images.clamp(0, 1)
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    with amg.Sampler(sd3, index, config(guard_threshold=None, **PLANTED)) as sampler:
        request = {"num_inference_steps": STEPS, "max_sequence_length": 4, "output_type": "pt"}
        size = {"height": 16, "width": 16}
        futures = [
            sampler.submit(amg.Request(prompt, seed=seed, **request, **size))
            for prompt, seed in (("abc", 1), ("de", 2), ("fgh", 3))
        ]
        found = [future.result() for future in futures]
        alone = call(sampler, ("fgh",), (3,)).images
    assert all(not one.amg[0].memorized and not one.amg[0].blocked for one in found)
    assert [one.amg[0].rewinds + one.amg[0].retries > 0 for one in found] == [True, True, False]
    assert (alone - found[2].images).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt_embeds": torch.zeros(1, 4, 32)}, "`prompt_embeds` must be None for Stable Diffusion 3"),
        ({"height": 17}, "`height` must be a multiple of 2, got 17"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, r"`latents` must be \[1, 4, 8, 8\], got \[1, 4, 3, 3\]"),
    ],
)
def test_bad_input(sd3, given, message, tmp_path):
    sampler = amg.Sampler(sd3, index_of(noise(60, torch.zeros(1, 3, 16, 16)), tmp_path), config())
    prompt = None if "prompt_embeds" in given else "abc"
    with pytest.raises(ValueError, match=message):
        sampler(prompt, num_inference_steps=2, progress=False, **given)
