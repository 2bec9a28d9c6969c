"""The engine on a GPU: the pictures of the CPU, no wait between events, the network replayed from graphs.

The cases "cpu" go the same way on a CPU: there pictures are compared with themselves, and instead of torch's
mode that refuses to wait for the device, reads of values are counted.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import amg
from amg.commands.demo import open_pipeline
from amg.engine import loop

from .. import reads

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = ["a red lighthouse on a cliff", "two boats, at dusk", "an empty street", "a bowl of fruit"]
FEW, MANY = 6, 24  # steps; nearly all of a few have something to do
GREY_LEVEL = 1 / 255 + 1e-6  # of float32 pictures


@pytest.fixture(autouse=True)
def full_precision_convolutions():
    """TF32, on by default in cuDNN, would be worth more than a grey level."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def sampler_on(device: str, photos_sd_index, preset: str, **options) -> amg.Sampler:
    from amg.embed.photos import load_photos

    pipe = open_pipeline("photos-sd").to(device)
    pipe.set_progress_bar_config(disable=True)
    index = amg.Index.open(photos_sd_index, load_photos().to(device), device=device)
    return amg.Sampler(pipe, index, amg.AMGConfig.preset(preset), max_batch=len(PROMPTS), **options)


def drawn(sampler: amg.Sampler, steps: int = FEW):
    """The output for `PROMPTS`, from one noise whatever the device."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(PROMPTS))]
    keywords = {"num_inference_steps": steps, "output_type": "pt", "progress": False}
    return sampler(PROMPTS, guidance_scale=4.0, generator=generators, **keywords)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["off", "main"])
@pytest.mark.parametrize("device", DEVICES)
def test_pictures_are_those_of_the_cpu_to_a_grey_level(device, preset, photos_sd_index):
    with (
        sampler_on("cpu", photos_sd_index, preset) as ours,
        sampler_on(device, photos_sd_index, preset) as theirs,
    ):
        here, there = drawn(ours), drawn(theirs)
    difference = (here.images.cpu().float() - there.images.cpu().float()).abs().amax((1, 2, 3))
    assert difference.max() <= GREY_LEVEL, difference.tolist()
    for one, other in zip(here.amg, there.amg, strict=True):
        assert (one.memorized, one.rewinds, one.evaluations) == (
            other.memorized,
            other.rewinds,
            other.evaluations,
        )
        assert one.neighbour.row == other.neighbour.row


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_host_waits_for_nothing_in_steps_between_events(device, photos_sd_index, monkeypatch):
    quiet = []

    def step(slots, inner=loop.step):
        if slots.tick >= slots.event:
            return inner(slots)
        with monkeypatch.context() as patch:
            found = reads.watch(patch)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                broken = inner(slots)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        quiet.append(list(found))
        return broken

    monkeypatch.setattr(loop, "step", step)
    with sampler_on(device, photos_sd_index, "main") as sampler:
        drawn(sampler, MANY)
    assert len(quiet) > MANY / 2 and not any(quiet), quiet


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["off", "main"])
def test_pictures_are_the_same_where_the_network_is_replayed(preset, photos_sd_index):
    with (
        sampler_on("cuda", photos_sd_index, preset) as plain,
        sampler_on("cuda", photos_sd_index, preset, cuda_graphs=True) as replayed,
    ):
        one, other = drawn(plain, MANY), drawn(replayed, MANY)
        graphs = replayed.source.denoiser.network
    assert graphs.captured > 0
    difference = (one.images - other.images).abs().amax((1, 2, 3))
    assert difference.max() <= GREY_LEVEL, difference.tolist()
    assert [v.evaluations for v in one.amg] == [v.evaluations for v in other.amg]


@pytest.mark.gpu
def test_a_network_that_reads_values_is_said_to_be_none_to_capture(photos_sd_index):
    with sampler_on("cuda", photos_sd_index, "off", cuda_graphs=True) as sampler:
        network = sampler.source.denoiser.network
        network.network = lambda sample, t, **rest: sample * float(sample.mean())
        with pytest.raises(RuntimeError, match="`cuda_graphs` must be False for this network"):
            drawn(sampler, MANY)


@pytest.mark.gpu
def test_weights_that_moved_are_captured_anew(photos_sd_index):
    with sampler_on("cuda", photos_sd_index, "off", cuda_graphs=True) as sampler:
        before = drawn(sampler, MANY).images
        sampler.pipe.unet.to(memory_format=torch.channels_last)
        for weight in sampler.pipe.unet.parameters():
            weight.data = weight.data.clone()
        after = drawn(sampler, MANY).images
    assert (before - after).abs().max() <= GREY_LEVEL
