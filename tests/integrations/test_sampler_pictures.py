"""Pictures that are put in, in the engine: image to image starts late, inpainting paints into them."""

import pytest
import torch

import amg
from amg.engine.slots import Slots
from amg.pipelines.pictures import to_tensor

from .. import pipelines_tiny
from .conftest import TinyEmbedder
from .test_watch import OPEN, PLANTED, drawn, generators, index_of, noise, protected

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


@pytest.mark.parametrize("name", KINDS)
def test_it_is_protect_with_every_term(name, captioned):
    """Where nothing goes back: `protect` draws such pictures anew by the pipeline's own call."""
    pipe, call = build(name)
    limits = {"lambda_min": -1.0, "lambda_max": -1.0, "threshold": 0.99, "rewind_threshold": 0.99}
    options = {**OPEN, **limits, "c1": 1.0, "c2": 3.0}
    plain = drawn(pipe, call).images
    ours = sample(amg.Sampler(pipe, captioned, config(**options)), call)
    protected(pipe, captioned, **options)
    theirs = drawn(pipe, call)
    for mine, other in zip(ours.amg, theirs.amg, strict=True):
        assert (mine.rewinds, mine.retries, other.retries) == (0, 0, 0)
        assert [step.step for step in mine.trace] == [step.step for step in other.trace]
        assert [step.terms for step in mine.trace] == [step.terms for step in other.trace]
        assert mine.evaluations == other.evaluations
    terms = {term for verdict in ours.amg for step in verdict.trace for term in step.terms}
    assert {"deduplication", "dissimilarity"} <= terms
    assert (ours.images - plain.clamp(0, 1)).abs().max() > 2 / 255
    assert (ours.images - theirs.images.clamp(0, 1)).abs().max() <= 1 / 255


@pytest.mark.parametrize("name", KINDS)
def test_what_is_too_close_begins_again_with_its_picture(name, tmp_path):
    strength = 1.0 if name == "sd_inpaint" else 0.8  # half of an inpainted picture stays
    pipe, call = build(name, strength=strength)
    plain = drawn(pipe, call).images.clamp(0, 1)
    index = index_of(torch.cat([plain[:1], noise(60, plain)]), tmp_path)
    options = {**PLANTED, "rewind_at": (0.6,), "guard_threshold": None}
    sampler = amg.Sampler(pipe, index, config(**options))
    out = sample(sampler, call)
    assert [verdict.rewinds + verdict.retries > 0 for verdict in out.amg] == [True, False]
    assert not any(verdict.memorized or verdict.blocked for verdict in out.amg)
    assert (out.images[1] - plain[1]).abs().max() <= 1 / 255
    first = STEPS - int(STEPS * strength)
    assert {step.step for verdict in out.amg for step in verdict.trace} == {*range(first, STEPS)}
    assert out.amg[0].evaluations <= 3 * 2 * (STEPS - first)  # the ceiling is over what a plain one makes
    alone = sample(sampler, pipelines_tiny.cut(call, 0), (1,))
    assert (alone.images[0] - out.images[0]).abs().max() <= 1e-5
    if name != "sd_img2img":  # what lies outside the mask is still the picture's, by network or by loop
        return
    far = sample(
        amg.Sampler(pipe, index, config("off")), {**call, "image": [pipelines_tiny.parts.picture(9)] * 2}
    )
    given = to_tensor(call["image"])
    assert (out.images[0] - given[0]).norm() < (far.images[0] - given[0]).norm()


def test_inpainting_keeps_what_is_outside_the_mask_through_a_later_try(tmp_path):
    pipe, call = build("sd_inpaint", strength=1.0)
    plain = drawn(pipe, call, seeds=(1, 2)).images.clamp(0, 1)
    latents = pipe(**call, generator=generators(), output_type="latent").images
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    sampler = amg.Sampler(pipe, index, config(**{**PLANTED, "rewind_at": (0.6,), "guard_threshold": None}))
    out = sample(sampler, call, output_type="latent")
    assert all(verdict.rewinds + verdict.retries > 0 and not verdict.blocked for verdict in out.amg)
    apart = (out.images - latents).abs().amax(1)
    spread = float(latents.std())
    # rows of latents under the mask are another's, the others a new draw of the same picture's encoding
    assert apart[:, :4].amax((1, 2)).min() > spread and apart[:, 4:].max() < 0.2 * spread


def test_a_later_try_keeps_the_picture_under_its_own_noise(tmp_path, monkeypatch):
    pipe, call = build("sd_inpaint", strength=1.0)
    plain = drawn(pipe, call).images.clamp(0, 1)
    index = index_of(torch.cat([plain, noise(60, plain)]), tmp_path)
    start_again, own = Slots.start_again, []

    def started_again(slots, rows, sample):
        own.extend(torch.equal(slots.slots[row].kept.noise[0], sample[at]) for at, row in enumerate(rows))
        start_again(slots, rows, sample)

    monkeypatch.setattr(Slots, "start_again", started_again)
    sample(
        amg.Sampler(pipe, index, config(**{**PLANTED, "rewind_at": (0.6,), "guard_threshold": None})), call
    )
    assert own and all(own)


def test_a_picture_that_the_user_put_in_is_handed_out(tmp_path):
    pipe, call = build("sd_img2img", strength=0.25)
    plain = drawn(pipe, call).images
    given, far = to_tensor([call["image"][0]]), (noise(60, plain) > 0.5).float()
    index = index_of(torch.cat([given, far]), tmp_path)
    options = {**dict.fromkeys(PLANTED, -1.9), "guard_threshold": None}
    out = sample(amg.Sampler(pipe, index, config(**options)), call)
    assert (out.images - plain.clamp(0, 1)).abs().max() <= 1 / 255  # nothing pushes away from it
    assert all(verdict.memorized and verdict.from_input and not verdict.blocked for verdict in out.amg)
    blocked = sample(amg.Sampler(pipe, index, config(block_input_copies=True, **options)), call)
    assert all(verdict.from_input and verdict.blocked and verdict.rewinds for verdict in blocked.amg)
    assert all(verdict.evaluations <= 3 * 2 * 2 for verdict in blocked.amg)  # of two steps, not of eight


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("more", [{"num_images_per_prompt": 2}, {}, {"generator": "one"}])
def test_pictures_are_shared_out_as_the_pipeline_does(name, more, index):
    pipe, call = build(name)
    one = {key: value[:1] if key in ("image", "mask_image") else value for key, value in call.items()}
    given = {**one, "output_type": "pt", **more}
    made = generators(range(2 * given.get("num_images_per_prompt", 1)))
    if "generator" in given and name != "sd_img2img":
        pytest.skip("nothing that image to image does not show")
    for_both = [torch.Generator().manual_seed(5) if "generator" in given else made for _ in range(2)]
    if "generator" not in given:
        for_both = [generators(range(len(made))) for _ in range(2)]
    plain = pipe(**{**given, "generator": for_both[0]}).images
    found = amg.Sampler(pipe, index, config("off"))(
        **{**given, "generator": for_both[1]}, progress=False
    ).images
    assert (found - plain.clamp(0, 1)).abs().max() <= 1 / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_requests_of_other_strengths_share_calls(name, dtype, index):
    pipe, call = build(name)
    pipe.to(dtype=dtype)
    row = {key: value for key, value in pipelines_tiny.cut(call, 0).items() if key != "strength"}
    called = []
    with amg.Sampler(pipe, index, config("off")) as sampler:
        with sampler.paused():
            futures = [
                sampler.submit(
                    amg.Request(**row, strength=strength, seed=seed, output_type="pt"), block=False
                )
                for seed, strength in enumerate((0.5, 0.8, 1.0))
            ]
            pipe.unet.register_forward_hook(lambda _, __, output: called.append(len(output[0])))
        found = [future.result().images for future in futures]
        alone = sampler(**row, strength=0.8, generator=generators((1,)), output_type="pt", progress=False)
    assert max(called) == 6
    assert (alone.images - found[1]).abs().max() <= (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sd", {"image": torch.zeros(1, 3, 16, 16)}, "`image` is for StableDiffusionImg2ImgPipeline, Stable"),
        ("sd", {"strength": 0.5}, "`strength` is for StableDiffusionImg2ImgPipeline, StableDiffusionInpaint"),
        ("ddim", {"strength": 0.5}, "`strength` is for StableDiffusionImg2ImgPipeline, StableDiffusionInp"),
        (
            "sd_img2img",
            {"mask_image": torch.zeros(1, 1, 16, 16)},
            "`mask_image` is for StableDiffusionInpaint",
        ),
        ("sd_img2img", {"image": None}, "`image` must be given for a pipeline that paints into a picture"),
        ("sd_img2img", {"image": "a.png"}, "`image` must be pictures that the pipeline takes, got str: "),
        (
            "sd_img2img",
            {"image": torch.zeros(1, 4, 8, 8)},
            "`image` must be a picture of 3 channels, not latents",
        ),
        (
            "sd_img2img",
            {"image": torch.zeros(3, 3, 16, 16)},
            "`image` must be one picture, or as many as divide 2",
        ),
        ("sd_img2img", {"strength": 1.5}, r"`strength` must be in \[0, 1\], got 1.5"),
        ("sd_img2img", {"strength": 0.1}, "`strength` must leave one of 8 steps, got 0.1"),
        ("sd_img2img", {"strength": "0.5"}, "`strength` must be a number, got '0.5'"),
        ("sd_img2img", {"height": 16}, "`height` must be None for StableDiffusionImg2ImgPipeline"),
        (
            "sd_img2img",
            {"latents": torch.zeros(2, 4, 8, 8)},
            "`latents` must be None for StableDiffusionImg2Img",
        ),
        ("sd_img2img", {"ip_adapter_image": None}, "'ip_adapter_image'"),
        ("sd_inpaint", {"mask_image": None}, "`mask_image` must be given for a pipeline that paints"),
        ("sd_inpaint", {"height": 17}, "`height` must be a multiple of 8, got 17"),
        ("sd_inpaint", {"padding_mask_crop": 4}, "'padding_mask_crop'"),
        ("sd_inpaint_9", {"latents": torch.zeros(2, 9, 8, 8)}, r"`latents` must be \[2, 4, 8, 8\], got"),
    ],
)
def test_bad_input(name, given, message, index):
    pipe, call = build(name)
    sampler = amg.Sampler(pipe, index, config())
    for part in (pipe.unet, getattr(pipe, "vae", None)):
        if part is not None:
            part.register_forward_hook(lambda *_: pytest.fail("something was computed"))
    for act in (
        lambda: sampler(**{**call, **given}),
        lambda: sampler.submit(amg.Request(**{**call, **given})),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            act()
