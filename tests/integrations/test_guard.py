"""Every route to a finished picture asks the guard: what it alone knows is not delivered unmarked."""

import warnings

import pytest
import torch

import amg

pytest.importorskip("diffusers")
from diffusers import DDIMScheduler

# No metric exceeds the first, and any picture is more alike to some training picture than the second.
ONLY_THE_GUARD = {"threshold": 0.97, "guard_threshold": 1e-3, "max_retries": 0, "rewind_at": ()}
SIZE = {"num_inference_steps": 3}


def config(**more) -> amg.AMGConfig:
    return amg.AMGConfig.preset("main", **{**ONLY_THE_GUARD, **more})


def assert_blocked_by_guard(verdict: amg.Verdict) -> None:
    assert verdict.similarity <= verdict.threshold and verdict.guard is not None and verdict.guard.memorized
    assert verdict.guard.threshold == 1e-3 and verdict.memorized and verdict.blocked
    assert verdict.reason is not None and verdict.reason.startswith("guard ")


def test_protect(sd, embedding_index):
    amg.protect(sd, embedding_index, config())
    out = sd(["a", "b"], **SIZE, output_type="np")
    for verdict, picture in zip(out.amg, out.images, strict=True):
        assert_blocked_by_guard(verdict)
        assert picture.max() == 0


@pytest.mark.parametrize("submitted", [False, True])
def test_sampler(sd, embedding_index, submitted):
    with amg.Sampler(sd, embedding_index, config()) as sampler:
        request = {"prompt": ["a", "b"], **SIZE, "output_type": "pt"}
        if submitted:
            out = sampler.submit(amg.Request(**request, seed=1)).result()
        else:
            out = sampler(**request, progress=False)
    for verdict, picture in zip(out.amg, out.images, strict=True):
        assert_blocked_by_guard(verdict)
        assert float(picture.max()) == 0


def test_a_further_index_brings_its_guard(sd, embedding_index, pixel_index):
    sampler = amg.Sampler(sd, embedding_index, config(), [pixel_index])
    (verdict,) = sampler("a", **SIZE, progress=False).amg
    (other,) = verdict.also
    assert other.guard is not None and other.guard.threshold == 1e-3 and other.memorized


def test_own_loop(pixel_index):
    scheduler = amg.AMGScheduler(DDIMScheduler(), pixel_index, config(threshold=-0.1))
    scheduler.set_timesteps(2)
    sample = torch.randn(2, 3, 8, 8)
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.randn_like(sample) * 0.1, t, sample).prev_sample
    for verdict in scheduler.verdicts((sample / 2 + 0.5).clamp(0, 1)):
        assert verdict.similarity <= verdict.threshold and verdict.guard is not None
        assert verdict.guard.memorized and verdict.memorized
    with pytest.raises(ValueError, match=r"in \[0, 1\] to be checked, got values from"):
        scheduler.verdicts(sample)


def test_a_text_model_and_an_index_without_captions_is_said_once(sd, embedder, tmp_path):
    mute = amg.Index.build(torch.rand(60, 3, 16, 16), None, embedder, tmp_path / "mute", progress=False)
    for attach in (amg.Sampler, amg.protect):
        with pytest.warns(UserWarning, match="has captions for 0 of its .* rows") as said:
            attach(sd, mute)
        assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd("a", **SIZE)
