"""Pictures that are put in, in the engine: image to image starts late, inpainting paints into them."""

import pytest
import torch

import amg

from .. import pipelines_tiny
from .conftest import TinyEmbedder
from .test_watch import OPEN, PLANTED, drawn, generators, index_of, noise, protected

diffusers = pytest.importorskip("diffusers")
STEPS = 8
KINDS = ("sd_img2img", "sd_inpaint_9")
SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(beta_end=0.012, beta_schedule="scaled_linear"),
    "ddpm": lambda: diffusers.DDPMScheduler(beta_end=0.012, beta_schedule="scaled_linear"),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "euler-a": lambda: diffusers.EulerAncestralDiscreteScheduler(),
}


def build(name, **more):
    pipe, call = pipelines_tiny.build(name, steps=STEPS)
    return pipe, {**call, **more}


def config(preset="main", **options):
    return amg.AMGConfig.preset(preset, **options)


def sample(sampler, call, seeds=(1, 2), **more):
    given = {**call, "output_type": "pt", "progress": False, **more}
    return sampler(**given, generator=generators(seeds))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_off_is_the_pipeline_to_a_grey_level(name, strength, scheduler, tmp_path):
    pipe, call = build(name, strength=strength)
    pipe.scheduler = SCHEDULERS[scheduler]()
    plain = drawn(pipe, call).images
    sampler = amg.Sampler(pipe, index_of(noise(60, plain), tmp_path), config("off"))
    assert (sample(sampler, call).images - plain.clamp(0, 1)).abs().max() <= 1 / 255
