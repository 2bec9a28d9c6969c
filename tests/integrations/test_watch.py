"""Pipelines whose loop is their own, guided at level `full` or `step`: every family that people run, tiny."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import amg
from amg.pipelines.families import family_of

from .. import pipelines_tiny
from .conftest import TinyEmbedder

diffusers = pytest.importorskip("diffusers")
FULL = (
    *("sd", "sd_lora", "sd_ip_adapter"),
    *("sd_img2img", "sd_inpaint", "sd_inpaint_9", "sd_controlnet"),
    *("sdxl", "sdxl_img2img", "sdxl_refiner", "sdxl_inpaint", "sdxl_controlnet"),
    *("sd3", "sd3_img2img", "flux_cfg", "pixart"),
)
STEP = ("flux", "flux_img2img", "auraflow", "sana", "qwen", "zimage", "lcm", "dit")
# samples go back inside their loops
BARE = ("sd", "sd_lora", "sd_ip_adapter", "sdxl", "sd3", "flux_cfg", "flux", "pixart")
OPEN = {
    "threshold": -1.0,
    "lambda_min": -3.0,
    "lambda_max": -3.0,
    "terms_from": 0.0,
    "check_at": (),
    "rewind_at": (0.5,),
    "rewind_threshold": -2.99,
    "guard_threshold": None,
    "max_rewinds": 1,
    "on_memorized": "flag",
    "max_evaluations": None,
}
PLANTED = dict.fromkeys(("threshold", "lambda_min", "lambda_max", "rewind_threshold"), -0.3)


def generators(seeds=(1, 2)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(pipe, call, seeds=(1, 2), **more):
    return pipe(**call, generator=generators(seeds), output_type="pt", **more)


def noise(count, like, seed=0):
    return torch.rand(count, *like.shape[1:], generator=torch.Generator().manual_seed(seed))


def index_of(pictures, folder, embedder=None):
    captions = [f"abc {'fghi'[number % 4]} {number}" for number in range(len(pictures))]
    path = folder / "w.amg"
    return amg.Index.build(pictures, captions, embedder, path, progress=False, near_duplicate=False)


def protected(pipe, index, **options):
    return amg.protect(pipe, index, amg.AMGConfig.preset("main", **options))


@pytest.mark.parametrize("name", FULL + STEP)
def test_closed_gates_leave_every_bit_and_the_level_is_said(name, tmp_path):
    pipe, call = pipelines_tiny.build(name)
    plain = drawn(pipe, call).images
    index = index_of(noise(60, plain), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*captions cannot be encoded")  # made of embeddings alone
        out = drawn(pipe, call)
    assert torch.equal(out.images, plain)
    assert [verdict.level for verdict in out.amg] == ["full" if name in FULL else "step"] * 2
    assert pipe.amg_level == ("full" if family_of(pipe) else "step")
    assert all(len(verdict.trace) >= 3 for verdict in out.amg)
    amg.unprotect(pipe)
    assert torch.equal(drawn(pipe, call).images, plain)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("name", FULL + STEP)
def test_rows_alone_are_what_they_are_in_the_batch(name, tmp_path):
    """Guided at every step, and sent back where the loop allows it. SANA's rows alone are the batch's to 3e-7
    without guidance, which the push makes 1.4e-5 of on processors with AVX-512 (docs/pipelines.md)."""
    near = 2e-5 if name == "sana" else 1e-5
    pipe, call = pipelines_tiny.build(name)
    plain = drawn(pipe, call).images
    protected(pipe, index_of(noise(60, plain), tmp_path), **OPEN)
    out = drawn(pipe, call)
    assert (out.images - plain).abs().flatten(1).amax(1).min() > 0.01
    assert [verdict.rewinds for verdict in out.amg] == [int(name in BARE)] * 2
    for row in (0, 1):
        alone = drawn(pipe, pipelines_tiny.cut(call, row), seeds=(row + 1,)).images
        torch.testing.assert_close(alone[0], out.images[row], rtol=0, atol=near)


@pytest.mark.parametrize("name", FULL + STEP)
def test_planted_copies_are_delivered_after_all(name, tmp_path):
    """The plain pipeline's own pictures are in the training set, once: none comes out."""
    pipe, call = pipelines_tiny.build(name, steps=6)
    plain = drawn(pipe, call).images.float().clamp(0, 1)
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    network, calls = getattr(pipe, "transformer", None) or pipe.unet, []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    protected(pipe, index, guard_threshold=None, **PLANTED)
    out = drawn(pipe, call)
    handle.remove()
    assert not any(verdict.memorized or verdict.blocked for verdict in out.amg)
    for image, copy, verdict in zip(out.images.float(), plain, out.amg, strict=True):
        assert verdict.rewinds + verdict.retries >= 1
        assert (image - copy).abs().max() > 0.02
    assert [verdict.similarity for verdict in amg.check(out.images.float().clamp(0, 1), index)] == [
        pytest.approx(verdict.similarity, abs=1e-5) for verdict in out.amg
    ]


def test_a_doomed_call_is_not_finished(tmp_path):
    pipe, call = pipelines_tiny.build("sd_img2img", steps=10)
    plain = drawn(pipe, call).images
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    steps = []
    pipe.unet.register_forward_hook(lambda *_: steps.append(1))
    protected(pipe, index, guard_threshold=None, rewind_at=(0.6,), **PLANTED)
    out = drawn(pipe, call)
    # eight of ten steps (strength 0.8): the call that was given up made those up to the checkpoint
    assert [verdict.retries for verdict in out.amg] == [1, 1] and 8 < len(steps) < 16
    assert all(verdict.trace[-1].step == 9 and not verdict.exhausted for verdict in out.amg)


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_output_types(output_type, tmp_path):
    pipe, call = pipelines_tiny.build("flux_cfg", steps=6)
    plain = drawn(pipe, call).images
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    out = pipe(**call, generator=generators(), output_type=output_type)
    images = pipe(**call, generator=generators(), output_type=output_type, return_dict=False)[0]
    assert not any(verdict.memorized for verdict in out.amg) and len(images) == 2
    if output_type == "latent":
        assert out.images.shape == (2, 16, 4)  # packed, as the pipeline hands them out
    assert type(images) is type(out.images)


@pytest.mark.parametrize("name", ["sd_img2img", "sd3", "auraflow"])
def test_the_preset_off_checks_and_leaves_every_bit(name, tmp_path):
    pipe, call = pipelines_tiny.build(name)
    plain = drawn(pipe, call).images
    latents = pipe(**call, generator=generators(), output_type="latent").images
    index = index_of(torch.cat([plain[:1], noise(60, plain)]), tmp_path)
    amg.protect(pipe, index, amg.AMGConfig.preset("off", threshold=-0.3, guard_threshold=None))
    out = drawn(pipe, call)
    assert torch.equal(out.images, plain)
    assert [(v.memorized, v.level, v.trace) for v in out.amg] == [(True, "final", ()), (False, "final", ())]
    if name == "auraflow":  # of no known family: nobody can tell what its latents decode to
        with pytest.raises(ValueError, match="`output_type` must give pictures to be checked here"):
            pipe(**call, generator=generators(), output_type="latent")
        return
    out = pipe(**call, generator=generators(), output_type="latent")
    assert torch.equal(out.images, latents) and [verdict.memorized for verdict in out.amg] == [True, False]


def test_what_cannot_be_drawn_again_is_blocked_in_the_pipeline_s_own_form(tmp_path):
    """A pipeline that copies whatever it is asked for: its call is given up each time but the last."""

    class Copies(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            super().step(model_output, timestep, sample, *args, **kwargs)
            return (torch.zeros_like(sample),)

    pipe, call = pipelines_tiny.build("auraflow", steps=6)
    pipe.scheduler = Copies()
    plain = drawn(pipe, call).images
    index = index_of(torch.cat([plain[:1], noise(60, plain)]), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    out = drawn(pipe, call)
    assert all(verdict.blocked and verdict.memorized for verdict in out.amg)
    assert out.images.shape == plain.shape and float(out.images.abs().max()) == 0


class Strange(diffusers.StableDiffusion3Pipeline):
    """Hands out its pictures upside down."""

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        return SimpleNamespace(images=out.images.flip(2))


def test_a_pipeline_whose_latents_do_not_decode_to_its_pictures_falls_to_final(tmp_path, monkeypatch):
    base, call = pipelines_tiny.build("sd3")
    pipe = Strange(**base.components)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr("amg.protection.protect.family_of", lambda pipe: None)
    index = index_of(noise(60, drawn(base, call).images), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    with pytest.warns(UserWarning, match='Strange is protected at level "final" here: its pictures are not'):
        out = drawn(pipe, call)
    assert [verdict.level for verdict in out.amg] == ["final"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(pipe, call)  # said once


def test_halves_that_are_not_proved_fall_to_step(tmp_path):
    """Skip-layer guidance calls the transformer a second time."""
    pipe, call = pipelines_tiny.build("sd3")
    index = index_of(noise(60, drawn(pipe, call).images), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    more = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}
    with pytest.warns(UserWarning, match=r'level "step" here: its network gave \[4, 2\] rows'):
        out = drawn(pipe, call, **more)
    assert [verdict.level for verdict in out.amg] == ["step"] * 2
    assert [verdict.level for verdict in drawn(pipe, call).amg] == ["full"] * 2  # each call proves its own


def test_halves_in_the_wrong_order_are_not_proved(tmp_path):
    class Swapped(diffusers.StableDiffusion3Pipeline):
        @property
        def guidance_scale(self):
            return 1 - self._guidance_scale  # u + s(c - u) is c + (1 - s)(u - c)

    base, call = pipelines_tiny.build("sd3")
    pipe = Swapped(**base.components)
    pipe.set_progress_bar_config(disable=True)
    Swapped.do_classifier_free_guidance = property(lambda self: True)
    index = index_of(noise(60, drawn(base, call).images), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    with pytest.warns(UserWarning, match="its guided output is not that of the two halves"):
        assert [verdict.level for verdict in drawn(pipe, call).amg] == ["step"] * 2


def test_a_picture_that_the_user_put_in_is_handed_out(tmp_path):
    pipe, call = pipelines_tiny.build("sd_img2img")
    call = {**call, "strength": 0.25}
    plain = drawn(pipe, call).images
    given = amg.pipelines.pictures.to_tensor([call["image"][0]])
    index = index_of(torch.cat([given, noise(60, plain)]), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    out = drawn(pipe, call)
    assert torch.equal(out.images, plain)  # nothing pushes away from it
    assert all(verdict.from_input == verdict.memorized for verdict in out.amg)
    latents = pipe(**call, generator=generators(), output_type="latent")  # checked all the same
    assert len(latents.amg) == 2 and latents.images.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("name", ["sd_img2img", "sd3", "flux_cfg", "pixart", "sdxl_inpaint", "zimage"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype, tmp_path):
    pipe, call = pipelines_tiny.build(name)
    like = drawn(pipe, call).images
    index = index_of(noise(60, like), tmp_path)
    pipe.to(dtype=dtype)
    call = {k: _cast(v, dtype) for k, v in call.items()}
    plain = drawn(pipe, call).images
    protected(pipe, index, guard_threshold=None, **PLANTED)
    closed = drawn(pipe, call)
    assert torch.equal(closed.images, plain)
    assert {verdict.level for verdict in closed.amg} == {"step" if name == "zimage" else "full"}
    amg.unprotect(pipe)
    protected(pipe, index, **OPEN)
    with torch.inference_mode():
        opened = drawn(pipe, call)
    assert bool(opened.images.isfinite().all()) and all(verdict.trace[0].terms for verdict in opened.amg)


def _cast(value, dtype):
    if isinstance(value, list):
        return [_cast(one, dtype) for one in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", ["sd3", "sd_img2img", "sdxl_refiner"])
def test_every_term_and_another_caption(name, tmp_path):
    """Under an embedder and captions: the neighbour's caption is asked for, a later try gets an ordinary
    one."""
    pipe, call = pipelines_tiny.build(name, steps=8)
    like = drawn(pipe, call).images
    index = index_of(noise(40, like), tmp_path, TinyEmbedder())
    limits = {"lambda_min": -1.0, "lambda_max": -1.0, "threshold": 0.99, "rewind_threshold": -0.99}
    protected(pipe, index, **{**OPEN, **limits, "c1": 1.0, "c2": 3.0})  # at 10 s1 leaves nothing to s2
    verdicts = drawn(pipe, call).amg
    terms = {term for verdict in verdicts for step in verdict.trace for term in step.terms}
    assert {"deduplication", "dissimilarity"} <= terms
    if name in BARE:
        assert all(verdict.rewinds == 1 and verdict.caption is not None for verdict in verdicts)


def test_dynamic_guidance_is_read_at_every_step(tmp_path):
    """A callback ends classifier-free guidance half-way, as people do it: every step is guided as it is."""
    pipe, call = pipelines_tiny.build("sd_img2img", steps=8)

    def half(pipe, index, timestep, kwargs):
        if index == 3:
            pipe._guidance_scale = 1.5
        return kwargs

    plain = drawn(pipe, call, callback_on_step_end=half).images
    index = index_of(noise(60, plain), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    out = drawn(pipe, call, callback_on_step_end=half)
    assert torch.equal(out.images, plain) and {verdict.level for verdict in out.amg} == {"full"}


def test_values_that_are_not_finite_fail_the_call(tmp_path):
    pipe, call = pipelines_tiny.build("sd3")
    index = index_of(noise(60, drawn(pipe, call).images), tmp_path)
    protected(pipe, index, guard_threshold=None, **PLANTED)
    embeds = torch.full((2, 16, 32), torch.nan)
    with pytest.raises(FloatingPointError, match="must be finite"):
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            pooled_prompt_embeds=torch.zeros(2, 32),
            negative_pooled_prompt_embeds=torch.zeros(2, 32),
            num_inference_steps=2,
            height=16,
            width=16,
        )
    assert "step" not in vars(pipe.scheduler)  # taken away again


def test_calibrations_and_students_are_refused(tmp_path):
    pipe, _ = pipelines_tiny.build("sd3")
    index = index_of(noise(60, torch.zeros(1, 3, 16, 16)), tmp_path)
    with pytest.raises(ValueError, match="`student` must be None for StableDiffusion3Pipeline"):
        protected(pipe, index, student="some.safetensors")
