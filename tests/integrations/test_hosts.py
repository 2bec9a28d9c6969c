"""Protected pipelines inside other programs: long prompts, freed encoders, copies, threads, forks, compiled
networks."""

import copy
import os
import pickle
import threading
import warnings

import pytest
import torch

import amg

from .. import pipelines_tiny
from .conftest import TinyEmbedder
from .test_watch import OPEN, PLANTED, drawn, index_of, noise, protected

diffusers = pytest.importorskip("diffusers")
WIDTH = {"sd": 16, "sd3": 32}
LENGTH = {"sd": 12, "sd3": 16}
LIMITS = {"lambda_min": -1.0, "lambda_max": -1.0, "threshold": 0.99, "rewind_threshold": -0.99}


def opened(name, folder):
    """A pipeline whose gates are all open, under captions, and its call."""
    pipe, call = pipelines_tiny.build(name, steps=6)
    index = index_of(noise(40, drawn(pipe, call).images), folder, TinyEmbedder())
    protected(pipe, index, **{**OPEN, **LIMITS, "c1": 1.0, "c2": 3.0})
    return pipe, call


def embedded(name, call, length):
    """The same call by embeddings instead of its prompts."""
    given = {key: value for key, value in call.items() if key != "prompt"}
    seeded = torch.Generator().manual_seed(3)
    for half in ("", "negative_"):
        given[f"{half}prompt_embeds"] = torch.randn(2, length, WIDTH[name], generator=seeded)
        if name == "sd3":
            given[f"{half}pooled_prompt_embeds"] = torch.randn(2, 32, generator=seeded)
    return given


@pytest.mark.parametrize("length", [5, 24])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_prompts_of_any_number_of_tokens_meet_captions(name, length, tmp_path):
    """FIELD 8: weighted prompts are embedded in several chunks."""
    pipe, call = opened(name, tmp_path)
    verdicts = drawn(pipe, embedded(name, call, length)).amg
    assert all(verdict.rewinds == 1 and verdict.caption for verdict in verdicts)
    assert "deduplication" in {term for verdict in verdicts for step in verdict.trace for term in step.terms}


@pytest.mark.parametrize("taker", ["protect", "sampler"])
def test_long_embeddings_and_captions_in_both_loops(taker, tmp_path):
    pipe, call = opened("sd", tmp_path)
    given = embedded("sd", call, 24)
    if taker == "protect":
        verdicts = drawn(pipe, given).amg
    else:
        held = pipe._amg_protection
        sampler = amg.Sampler(
            amg.unprotect(pipe),
            held.index,
            held.config.__class__.preset("main", **{**OPEN, **LIMITS, "guidance_scale": 5.0}),
        )
        given.pop("guidance_scale")
        verdicts = sampler(None, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **given).amg
    assert all(verdict.rewinds == 1 and verdict.caption for verdict in verdicts)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_freed_text_encoder_is_said_and_prompts_are_kept(name, tmp_path):
    """FIELD 9."""
    pipe, call = opened(name, tmp_path)
    pipe.text_encoder = pipe.tokenizer = None
    with pytest.warns(UserWarning, match="has no text_encoder and no tokenizer"):
        verdicts = drawn(pipe, embedded(name, call, LENGTH[name])).amg
    assert all(verdict.rewinds == 1 and verdict.caption is None for verdict in verdicts)


@pytest.mark.parametrize("name", ["sd_img2img", "zimage"])
def test_two_threads_are_served_one_after_the_other(name, tmp_path):
    """FIELD 12."""
    pipe, call = pipelines_tiny.build(name)
    plain = drawn(pipe, call).images
    protected(pipe, index_of(noise(60, plain), tmp_path), guard_threshold=None, **PLANTED)
    found = []
    threads = [threading.Thread(target=lambda: found.append(drawn(pipe, call).images)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(images, plain) for images in found)


def test_two_pipelines_that_share_scheduler_and_network_in_two_threads(tmp_path):
    """Attack 18: nothing is left behind, and no call meets another's hook."""
    pipe, call = pipelines_tiny.build("sd")
    _, edit_call = pipelines_tiny.build("sd_img2img")
    plain = drawn(pipe, call).images
    protected(pipe, index_of(noise(60, plain), tmp_path), guard_threshold=None, **PLANTED)
    edit = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    edited = drawn(edit, edit_call).images
    assert edit.scheduler is pipe.scheduler and edit.unet is pipe.unet
    found = {"made": [], "edited": []}
    made = lambda: found["made"].append(drawn(pipe, call).images)  # noqa: E731
    other = lambda: found["edited"].append(drawn(edit, edit_call).images)  # noqa: E731
    threads = [threading.Thread(target=target) for _ in range(3) for target in (made, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found["made"]) == len(found["edited"]) == 3
    assert all(torch.equal(images, plain) for images in found["made"])
    assert all(torch.equal(images, edited) for images in found["edited"])
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("maker", ["class", "auto"])
def test_from_pipe_carries_the_protection_over(maker, tmp_path):
    """FIELD 15, attack 9."""
    pipe, _ = pipelines_tiny.build("sd")
    _, call = pipelines_tiny.build("sd_img2img")
    kind = diffusers.StableDiffusionImg2ImgPipeline
    plain = drawn(kind.from_pipe(pipe), call).images
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    made = (kind if maker == "class" else diffusers.AutoPipelineForImage2Image).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    assert type(made).__name__ == kind.__name__ and made.amg_level == "full"
    out = drawn(made, call)
    assert all(verdict.retries and not verdict.memorized for verdict in out.amg)
    assert not hasattr(kind.from_pipe(amg.unprotect(pipe)), "amg_level")


def test_a_copy_and_a_pickle_are_protected_too(tmp_path):
    pipe, call = pipelines_tiny.build("sd3")
    plain = drawn(pipe, call).images
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    pipe, _ = pipelines_tiny.build("sd3")  # transformers' encoders cannot be pickled once they were called
    protected(pipe, index, guard_threshold=None, **PLANTED)
    others = (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)))
    expected = drawn(pipe, call).images
    for other in others:
        assert other.amg_level == "full" and other.transformer is not pipe.transformer
        assert torch.equal(drawn(other, call).images, expected)
        assert other._amg_protection.watched.pipe is other  # and not the first one's


def test_a_folder_loaded_by_a_protected_pipeline_s_class_is_refused_until_it_is_protected(tmp_path):
    pipe, call = pipelines_tiny.build("sd")
    index = index_of(noise(60, drawn(pipe, call).images), tmp_path)
    protected(pipe, index)
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="made by the class of a protected pipeline, without its index"):
        again("a")
    assert amg.protect(again, index).amg_level == "full"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_answers(tmp_path):
    """FIELD 16: servers search before they fork."""
    pipe, call = pipelines_tiny.build("sd")
    plain = drawn(pipe, call).images
    index = index_of(noise(600, plain), tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [verdict.similarity for verdict in amg.check(plain, index)]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # nothing of pytest's may run here
            import signal

            signal.alarm(60)
            torch.set_num_threads(1)
            found = [verdict.similarity for verdict in amg.check(plain, index)]
            os.write(write, b"same" if found == pytest.approx(expected) else b"other")
            os._exit(0)
        os.close(write)
        assert os.read(read, 16) == b"same"
    finally:
        torch.set_num_threads(threads)
        os.close(read)
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["sd", "sd3", "sd_img2img"])
def test_a_compiled_network_is_not_compiled_with_the_hook(name, tmp_path):
    """FIELD 17: the same bits, and no compilation for each call."""
    from torch._dynamo.testing import CompileCounter

    pipe, call = pipelines_tiny.build(name)
    index = index_of(noise(60, drawn(pipe, call).images), tmp_path)
    network, counter = getattr(pipe, "transformer", None) or pipe.unet, CompileCounter()
    torch._dynamo.reset()
    network.compile(backend=counter)
    plain = drawn(pipe, call).images
    protected(pipe, index, guard_threshold=None, **PLANTED)
    assert torch.equal(drawn(pipe, call).images, plain)
    frames = counter.frame_count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(drawn(pipe, call).images, plain)
    assert counter.frame_count == frames
    torch._dynamo.reset()
