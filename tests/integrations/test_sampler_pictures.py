"""Pictures that are put in, in the engine: image to image starts late, inpainting paints into them."""

import pytest
import torch

import amg

from .. import pipelines_tiny
from .conftest import TinyEmbedder
from .test_watch import drawn, generators, index_of, noise

diffusers = pytest.importorskip("diffusers")
STEPS = 8
KINDS = ("sd_img2img", "sd_inpaint_9", "sd_inpaint")
NOISY = {"beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = [  # strength, scheduler, its options
    (0.8, "DDIMScheduler", NOISY),
    (0.3, "DDPMScheduler", NOISY),
    (1.0, "DDPMScheduler", NOISY),
    (0.5, "EulerDiscreteScheduler", NOISY),
    (1.0, "EulerAncestralDiscreteScheduler", NOISY),
    (0.7, "HeunDiscreteScheduler", NOISY),
    (0.6, "KDPM2DiscreteScheduler", NOISY),
    (0.8, "DPMSolverMultistepScheduler", NOISY),
    (1.0, "UniPCMultistepScheduler", NOISY),
    (0.6, "PNDMScheduler", {**NOISY, "skip_prk_steps": True}),
    (0.8, "LMSDiscreteScheduler", NOISY),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return index_of(noise(60, torch.zeros(1, 3, 16, 16)), tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    pictures = noise(40, torch.zeros(1, 3, 16, 16))
    return index_of(pictures, tmp_path_factory.mktemp("captioned"), TinyEmbedder())


def build(name, **more):
    pipe, call = pipelines_tiny.build(name, steps=STEPS)
    return pipe, {**call, **more}


def config(preset="main", **options):
    return amg.AMGConfig.preset(preset, **{"guidance_scale": 5.0, **options})


def sample(sampler, call, seeds=(1, 2), **more):
    given = {**call, "output_type": "pt", "progress": False, **more}
    return sampler(**given, generator=generators(seeds))


@pytest.mark.parametrize(("strength", "scheduler", "options"), CASES)
@pytest.mark.parametrize("name", KINDS)
def test_off_is_the_pipeline_to_a_grey_level(name, strength, scheduler, options, index):
    pipe, call = build(name, strength=strength)
    pipe.scheduler = getattr(diffusers, scheduler)(**options)
    plain = drawn(pipe, call).images
    assert ((plain > 0) & (plain < 1)).float().mean() > 0.5
    found = sample(amg.Sampler(pipe, index, config("off")), call).images
    assert (found - plain.clamp(0, 1)).abs().max() <= 1 / 255
