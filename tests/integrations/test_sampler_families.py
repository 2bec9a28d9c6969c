"""PixArt and FLUX.1 in the engine: from their components, with their own conditions, in the same slots."""

from dataclasses import replace

import pytest
import torch

import amg
from amg.engine.graphs import Graphs

from .. import pipelines_tiny
from ..engine.test_graphs import Recorder
from .conftest import TinyEmbedder
from .test_watch import OPEN, PLANTED, drawn, generators, index_of, noise, protected

diffusers = pytest.importorskip("diffusers")
STEPS = 6
SIZE = {"height": 16, "width": 16}
FAMILIES = ("pixart_text", "pixart_alpha_text", "flux_text")


def build(name):
    return pipelines_tiny.build(name, steps=STEPS)


def config(preset="main", **options):
    return amg.AMGConfig.preset(preset, **options)


def sample(sampler, call, seeds=(1, 2), **more):
    given = {**call, "output_type": "pt", "progress": False, **more}
    return sampler(**given, generator=generators(seeds))


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_the_pipeline_to_a_grey_level(name, size, tmp_path):
    pipe, call = build(name)
    call |= {"height": size[0], "width": size[1]}
    plain = drawn(pipe, call).images
    sampler = amg.Sampler(pipe, index_of(noise(60, plain), tmp_path), config("off"))
    assert plain.shape[2:] == size and ((plain > 0) & (plain < 1)).float().mean() > 0.5
    assert (sample(sampler, call).images - plain.clamp(0, 1)).abs().max() <= 1 / 255
    latents = sample(sampler, call, output_type="latent").images
    own = pipe(**call, generator=generators(), output_type="latent").images
    torch.testing.assert_close(latents, own, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_protect_with_every_term_and_a_rewind(name, tmp_path):
    pipe, call = build(name)
    index = index_of(noise(40, drawn(pipe, call).images), tmp_path, TinyEmbedder())
    limits = {"lambda_min": -1.0, "lambda_max": -1.0, "threshold": 0.99, "rewind_threshold": -0.99}
    options = {**OPEN, **limits, "c1": 1.0, "c2": 3.0}
    ours = sample(amg.Sampler(pipe, index, config(**options)), call)
    protected(pipe, index, **options)
    theirs = drawn(pipe, call)
    assert [verdict.rewinds for verdict in ours.amg] == [verdict.rewinds for verdict in theirs.amg] == [1, 1]
    assert [v.caption for v in ours.amg] == [v.caption for v in theirs.amg] != [None, None]
    terms = {term for verdict in ours.amg for step in verdict.trace for term in step.terms}
    assert {"despecification", "deduplication", "dissimilarity", "rewind"} <= terms
    assert (ours.images - theirs.images.clamp(0, 1)).abs().max() <= 1 / 255


FOREIGN = [  # arguments that one family takes and another does not, and who takes them
    ("sd", {"max_sequence_length": 4}, "Stable Diffusion 3, FLUX.1, PixArt, got 4"),
    ("sd", {"true_cfg_scale": 2.0}, "FLUX.1, got 2.0"),
    ("sd", {"use_resolution_binning": False}, "PixArt, got False"),
    ("sd", {"batch_size": 2}, "pixel models, got 2"),
    ("sd", {"class_labels": [1]}, r"pixel models, got \[1\]"),
    ("pixart_text", {"clip_skip": 1}, "Stable Diffusion, Stable Diffusion XL, Stable Diffusion 3, got 1"),
    ("pixart_text", {"true_cfg_scale": 2.0}, "FLUX.1, got 2.0"),
    ("flux_text", {"clip_skip": 1}, "Stable Diffusion, Stable Diffusion XL, Stable Diffusion 3, got 1"),
    ("flux_text", {"timesteps": [9, 5]}, r"Stable Diffusion, .*, PixArt, got \[9, 5\]"),
    ("ddim", {"clip_skip": 1}, "text-to-image pipelines, got 1"),
    ("ddim", {"height": 16}, "text-to-image pipelines, got 16"),
    ("ddim", {"max_sequence_length": 4}, "text-to-image pipelines, got 4"),
]


def refused(name, given, message, tmp_path):
    """By a call and by `submit`, before the network is called or a text encoded."""
    pipe, call = build(name)
    sampler = amg.Sampler(pipe, index_of(noise(60, torch.zeros(1, 3, 16, 16)), tmp_path), config())
    network = getattr(pipe, "transformer", None) or pipe.unet
    for part in (network, getattr(pipe, "text_encoder", None)):
        if part is not None:
            part.register_forward_hook(lambda *_: pytest.fail("something was computed"))
    asked = {"num_inference_steps": 2, **({} if "batch_size" in call else {"prompt": "abc"}), **given}
    for act in (lambda: sampler(**asked), lambda: sampler.submit(amg.Request(**asked))):
        with pytest.raises((TypeError, ValueError), match=message):
            act()


@pytest.mark.parametrize(("name", "given", "message"), FOREIGN)
def test_another_family_s_arguments_are_refused_by_name(name, given, message, tmp_path):
    refused(name, given, rf"`{next(iter(given))}` is for {message}", tmp_path)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "flux_text",
            {"prompt": None, "prompt_embeds": torch.zeros(1, 4, 32)},
            "`prompt_embeds` must be None",
        ),
        ("flux_text", {"negative_prompt_embeds": torch.zeros(1, 4, 32)}, "`negative_prompt_embeds` must be"),
        ("flux_text", {"height": 18}, "`height` must be a multiple of 4, got 18"),
        ("flux_text", {"latents": torch.zeros(1, 1, 8, 8), **SIZE}, r"`latents` must be \[1, 16, 4\], got"),
        ("flux_text", {"true_cfg_scale": "3"}, "`true_cfg_scale` must be a number, got '3'"),
        ("flux_text", {"max_sequence_length": "3"}, "`max_sequence_length` must be an integer, got '3'"),
        ("flux", SIZE, "`pipe.text_encoder` must not be None where a text is to be encoded"),
        ("flux_text", {"prompt_2": "abc"}, "'prompt_2'"),
        ("flux_text", {"negative_prompt_2": "abc"}, "'negative_prompt_2'"),
        ("flux_text", {"joint_attention_kwargs": {}}, "'joint_attention_kwargs'"),
        ("flux_text", {"ip_adapter_image": None}, "'ip_adapter_image'"),
        ("pixart_text", {}, "`use_resolution_binning` must be False for a transformer of 8 latents a side"),
        ("pixart_text", {"use_resolution_binning": 1}, "`use_resolution_binning` must be a bool, got 1"),
        ("pixart_text", {"use_resolution_binning": False, "width": 18}, "`width` must be a multiple of 4"),
        ("pixart_text", {"clean_caption": False}, "'clean_caption'"),
        ("pixart_text", {"prompt_attention_mask": None}, "'prompt_attention_mask'"),
    ],
)
def test_bad_input(name, given, message, tmp_path):
    refused(name, given, message, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_requests_share_calls_and_planted_copies_leave(name, tmp_path):
    pipe, call = build(name)
    plain = drawn(pipe, call).images.clamp(0, 1)
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    rows = {key: value for key, value in call.items() if key not in ("prompt", "negative_prompt")}
    texts = (("abc", 1), ("de", 2), ("fgh", 3))
    options = {"guidance_scale": 5.0, "guard_threshold": None, **PLANTED}
    called = []
    with amg.Sampler(pipe, index, config(**options)) as sampler:
        with sampler.paused():  # so that all three begin together
            futures = [
                sampler.submit(
                    amg.Request(text, negative_prompt="z", seed=seed, output_type="pt", **rows), block=False
                )
                for text, seed in texts
            ]
            pipe.transformer.register_forward_hook(lambda _, __, output: called.append(len(output[0])))
        found = [future.result() for future in futures]
        alone = sampler(
            "fgh", negative_prompt="z", generator=generators((3,)), output_type="pt", progress=False, **rows
        )
    assert all(not one.amg[0].memorized and not one.amg[0].blocked for one in found)
    assert [one.amg[0].rewinds + one.amg[0].retries > 0 for one in found] == [True, True, False]
    assert (alone.images - found[2].images).abs().max() <= 1e-5
    assert max(called) == 6  # both halves of all three in one call


@pytest.mark.parametrize("shift", ["dynamic", "sigmas"])
def test_flux_levels_are_the_pipeline_s(shift, tmp_path):
    pipe, call = build("flux_text")
    if shift == "dynamic":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    else:
        call["sigmas"] = [1.0, 0.8, 0.5, 0.1]
    plain = drawn(pipe, call).images
    sampler = amg.Sampler(pipe, index_of(noise(60, plain), tmp_path), config("off"))
    assert (sample(sampler, call).images - plain.clamp(0, 1)).abs().max() <= 1 / 255


def test_flux_without_a_negative_prompt_is_distilled(tmp_path):
    """One row an image, as in the pipeline; the network is told its own scale, and what is idle is said."""
    pipe, call = build("flux_text")
    del call["negative_prompt"]
    plain = drawn(pipe, call).images
    index = index_of(noise(60, plain), tmp_path)
    rows = []
    pipe.transformer.register_forward_hook(lambda _, __, output: rows.append(len(output[0])))
    sampler = amg.Sampler(pipe, index, config("off"))
    assert (sample(sampler, call).images - plain.clamp(0, 1)).abs().max() <= 1 / 255
    assert rows == [2] * STEPS
    told = {
        scale: sample(sampler, {**call, "guidance_scale": scale}).images for scale in (2.5, None, 3.5, 9.0)
    }
    assert torch.equal(told[None], told[3.5]) and (told[9.0] - told[2.5]).abs().max() > 1 / 255
    cosine = index_of(noise(60, plain), tmp_path / "cosine", TinyEmbedder())
    with pytest.warns(UserWarning, match="`true_cfg_scale` is 1.0: despecification and caption"):
        sample(amg.Sampler(pipe, cosine, config(on_memorized="flag")), call)


def test_flux_s_own_latents_and_the_config_s_scale(tmp_path):
    pipe, call = build("flux_text")
    latents = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(4))
    plain = drawn(pipe, {**call, "latents": latents}).images
    sampler = amg.Sampler(pipe, index_of(noise(60, plain), tmp_path), config("off", guidance_scale=3.0))
    found = sample(sampler, {**call, "latents": latents, "true_cfg_scale": None}).images
    assert (found - plain.clamp(0, 1)).abs().max() <= 1 / 255


@pytest.mark.parametrize("size", [(40, 40), (20, 52), (None, None)])
@pytest.mark.parametrize("pipeline", ["Sigma", "Alpha"])
def test_pixart_draws_in_the_sizes_it_knows(pipeline, size, tmp_path, monkeypatch):
    """Drawn as large as the transformer wants it, resized and cropped, and checked as it is then."""
    pipe, call = build("pixart_text")
    cls = getattr(diffusers, f"PixArt{pipeline}Pipeline")
    pipe.transformer.register_to_config(sample_size=32)
    pipe = cls(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    bins = {"0.5": [16.0, 32.0], "1.0": [24.0, 24.0], "2.0": [32.0, 16.0]}
    monkeypatch.setattr(f"{cls.__module__}.ASPECT_RATIO_256_BIN", bins)
    call |= {"height": size[0], "width": size[1]}
    del call["use_resolution_binning"]
    plain = drawn(pipe, call).images
    assert plain.shape[2:] == (size if size[0] else (64, 64))
    sampler = amg.Sampler(pipe, index_of(noise(60, plain), tmp_path), config("off"))
    assert (sample(sampler, call).images - plain.clamp(0, 1)).abs().max() <= 1 / 255
    planted = index_of(torch.cat([plain.clamp(0, 1), noise(60, plain)]), tmp_path / "planted")
    out = sample(amg.Sampler(pipe, planted, config(guard_threshold=None, **PLANTED)), call)
    assert not any(verdict.memorized for verdict in out.amg)
    assert all(verdict.rewinds + verdict.retries > 0 for verdict in out.amg)


def test_tokens_stand_where_the_pipeline_puts_them():
    from amg.pipelines.families.flux import image_places, text_places

    kind = (torch.bfloat16, torch.device("cpu"))
    own = diffusers.FluxPipeline._prepare_latent_image_ids(1, 3, 5, kind[1], kind[0])
    assert torch.equal(image_places(3, 5, *kind), own) and image_places(3, 5, *kind).dtype == kind[0]
    assert image_places(3, 5, *kind) is image_places(3, 5, *kind)
    assert torch.equal(text_places(7, *kind), torch.zeros(7, 3))


def test_students_are_not_for_packed_latents(tmp_path):
    pipe, _ = build("flux_text")
    index = index_of(noise(60, torch.zeros(1, 3, 16, 16)), tmp_path, TinyEmbedder())
    with pytest.raises(ValueError, match="`student` must be None without latents that are not packed"):
        amg.Sampler(pipe, index, config(student="some.safetensors"))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("gradient", ["frozen", "full"])
def test_half_precision(name, gradient, tmp_path):
    pipe, call = build(name)
    like = drawn(pipe, call).images
    pipe.to(dtype=torch.bfloat16)
    sampler = amg.Sampler(pipe, index_of(noise(60, like), tmp_path), config(**OPEN, gradient=gradient))
    with torch.inference_mode():
        out = sample(sampler, call)
    assert bool(out.images.isfinite().all()) and all(verdict.trace[0].terms for verdict in out.amg)
    assert [verdict.rewinds for verdict in out.amg] == [1, 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_their_networks_are_replayed_as_graphs_are(name, tmp_path):
    """What they are called with is told apart, copied and replayed: a closure stands for CUDA's capture."""
    pipe, call = build(name)
    plain = drawn(pipe, call).images
    sampler = amg.Sampler(pipe, index_of(noise(60, plain), tmp_path), config("off"))
    source, recorder = sampler.source, Recorder()
    source.denoiser = replace(source.denoiser, network=Graphs(source.denoiser.network, recorder))
    assert (sample(sampler, call).images - plain.clamp(0, 1)).abs().max() <= 1 / 255
    assert (recorder.captures, recorder.replays) == (1, STEPS - 2)
