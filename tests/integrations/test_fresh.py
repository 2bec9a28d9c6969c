"""What is replaced, fused or moved on a pipeline is used by the next request, as by a fresh `Sampler`."""

import json
from dataclasses import asdict

import pytest
import torch

import amg
from amg.embed.student import LIMITS, Agreement, Student, save_student
from amg.guidance.gate import FORMAT, VERSION
from amg.pipelines.identity import key_for, origin_of

from .conftest import tiny_sd

diffusers = pytest.importorskip("diffusers")
ACTING = {
    "lambda_min": -1.0,
    "lambda_max": -1.0,
    "c1": 2.0,
    "c2": 20.0,
    "terms_from": 0.0,
    "check_at": (),
    "rewind_at": (0.6,),
    "rewind_threshold": -1.0,
    "max_rewinds": 1,
    "on_memorized": "flag",
}


def acting(**more):
    return amg.AMGConfig.preset("main", **{**ACTING, **more})


def another(seed=5):
    """A pipeline of the same shapes and other weights."""
    pipe, generator = tiny_sd(), torch.Generator().manual_seed(seed)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for weight in part.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return pipe


def fuse(module):
    """As a LoRA is fused: into the weights' data, which no version counter sees."""
    generator = torch.Generator().manual_seed(2)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data += 0.2 * torch.randn(layer.weight.shape, generator=generator)


CHANGES = {
    "U-Net": lambda pipe: setattr(pipe, "unet", another().unet),
    "VAE": lambda pipe: setattr(pipe, "vae", another().vae),
    "text encoder": lambda pipe: setattr(pipe, "text_encoder", another().text_encoder),
    "fused into the text encoder": lambda pipe: fuse(pipe.text_encoder),
    "fused into the U-Net": lambda pipe: fuse(pipe.unet),
    "scheduler": lambda pipe: setattr(
        pipe, "scheduler", diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ),
    "prediction type": lambda pipe: setattr(
        pipe,
        "scheduler",
        diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction"),
    ),
    "prediction type in place": lambda pipe: pipe.scheduler.register_to_config(
        prediction_type="v_prediction"
    ),
    "dtype": lambda pipe: pipe.to(torch.bfloat16),
}


def draw(sampler, way):
    asked = {"prompt": ["abc", "cat, red"], "num_inference_steps": 5, "output_type": "pt"}
    if way == "submit":
        out = sampler.submit(amg.Request(**asked, seed=[0, 1])).result(60)
    else:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        out = sampler(**asked, generator=generators, progress=False)
    assert all("deduplication" in {t for step in one.trace for t in step.terms} for one in out.amg)
    assert all(one.rewinds for one in out.amg)
    return out


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["call", "submit"])
def test_the_next_request_is_a_fresh_sampler_s(way, change, sd, embedding_index):
    diffusers.logging.set_verbosity_error()
    with amg.Sampler(sd, embedding_index, acting()) as sampler:
        before = draw(sampler, way)
        CHANGES[change](sd)
        found = draw(sampler, way)
    with amg.Sampler(sd, embedding_index, acting()) as fresh:
        expected = draw(fresh, way)
    assert torch.equal(found.images, expected.images) and found.amg == expected.amg
    assert (found.images - before.images).abs().max() > 2 / 255


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_of_a_protected_pipeline_is_a_fresh_one_s(change, sd, embedding_index):
    diffusers.logging.set_verbosity_error()
    amg.protect(sd, embedding_index, acting())

    def images():
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return sd(["abc", "cat, red"], generator=generators, num_inference_steps=5, output_type="pt").images

    before = images()
    CHANGES[change](sd)
    found = images()
    amg.protect(amg.unprotect(sd), embedding_index, acting())
    assert torch.equal(found, images()) and (found - before).abs().max() > 2 / 255


def test_captions_of_the_text_encoder_before_are_not_used(sd, embedding_index):
    """The prompt's own encoding is the plain pipeline's: here only the neighbours' captions differ."""
    with amg.Sampler(sd, embedding_index, acting()) as sampler:
        draw(sampler, "call")
        encoded, original = [], sd.encode_prompt
        sd.encode_prompt = lambda *args, **kwargs: encoded.append(args[0]) or original(*args, **kwargs)
        draw(sampler, "call")
    assert any("caption" in text for texts in encoded for text in texts)


@pytest.fixture
def calibrated(sd, embedding_index, tmp_path):
    sd.scheduler.set_timesteps(5)
    key = key_for(sd, embedding_index, sd.scheduler, 7.5, acting().for_metric("cosine"))
    region = {"mean": [1.0] * 4, "deviation": [1.0] * 4}
    body = {"key": asdict(key), "gate": [], "region": region, "alarm": None}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"format": FORMAT, "version": VERSION, **body}))
    return acting(calibration=path)


@pytest.fixture
def with_student(sd, embedding_index, tmp_path):
    band = Agreement(0.0, 1.1, 10, 1.0, 1.0, 1.0, (-1.0,) * len(LIMITS), (0.0,) * len(LIMITS))
    student = Student(origin_of(sd, embedding_index), width=8, blocks=1, agreement=(band,))
    save_student(student.eval(), tmp_path / "student.safetensors", {})
    return acting(student=tmp_path / "student.safetensors")


def with_option(model, **options):
    config = {name: value for name, value in model.config.items() if name[0] != "_"}
    return type(model).from_config(config | options).eval()


def ways_of(pipe, index, config):
    """Calls of a sampler, its `submit` and a protected pipeline that were all made now."""
    sampler = amg.Sampler(pipe, index, config)
    asked = {"num_inference_steps": 5, "output_type": "pt"}
    yield lambda: sampler("abc", progress=False, **asked)
    yield lambda: sampler.submit(amg.Request("abc", seed=1, **asked)).result(60)
    amg.protect(pipe, index, config)
    yield lambda: pipe("abc", **asked)


def test_a_calibration_that_does_not_fit_any_more(sd, embedding_index, calibrated):
    ways = [*ways_of(sd, embedding_index, calibrated)]
    for way in ways:
        assert way().amg
    CHANGES["scheduler"](sd)
    for way in ways:
        with pytest.raises(ValueError, match="must be for this run's scheduler='EulerDiscreteScheduler'"):
            way()


def test_a_student_that_does_not_fit_any_more(sd, embedding_index, with_student):
    ways = [*ways_of(sd, embedding_index, with_student)]
    for way in ways:
        assert way().amg
    sd.vae = with_option(sd.vae, scaling_factor=0.5)
    for way in ways:
        with pytest.raises(ValueError, match="`student` must be distilled for this run's decoder_sha256"):
            way()


def test_a_part_of_another_kind_is_refused_by_the_next_request(sd, embedding_index):
    ways = [*ways_of(sd, embedding_index, acting())]
    sd.unet = with_option(sd.unet, in_channels=9)
    for way in ways:
        with pytest.raises(ValueError, match="in_channels=9"):
            way()


def test_requests_in_flight_keep_the_network_they_were_submitted_with(sd, embedding_index):
    with amg.Sampler(sd, embedding_index, acting()) as sampler:
        expected = draw(sampler, "submit")
        asked = amg.Request(["abc", "cat, red"], num_inference_steps=5, output_type="pt", seed=[0, 1])
        swapped = []

        def swap(module, inputs, outputs):
            if not swapped:
                swapped.append(sd.unet)
                sd.unet = another().unet

        sd.unet.register_forward_hook(swap)
        found = sampler.submit(asked).result(60)
    assert swapped and torch.equal(found.images, expected.images)
