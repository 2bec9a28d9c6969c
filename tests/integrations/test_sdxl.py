"""SDXL at level `full`: two text encoders, conditions on sizes, a watermark; `protect` and `Sampler`."""

import pytest
import torch

import amg
from amg.guidance.predict import Conditions
from amg.pipelines.conditions import of_request
from amg.pipelines.denoiser import CaptionCache, decoder_of, denoiser_for

from .conftest import tiny_sd

diffusers = pytest.importorskip("diffusers")
STEPS = {"num_inference_steps": 8, "guidance_scale": 5.0}
OPENING = {
    "lambda_min": -1.0,
    "lambda_max": -1.0,
    "terms_from": 0.0,
    "check_at": (),
    "rewind_at": (0.5,),
    "rewind_threshold": -0.99,
    "guard_threshold": None,
    "max_rewinds": 1,
    "on_memorized": "flag",
    "max_evaluations": None,
}


@pytest.fixture
def xl():
    from transformers import CLIPTextModelWithProjection

    base = tiny_sd()
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=base.vae,
        unet=unet,
        scheduler=base.scheduler,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(base.text_encoder.config).eval(),
        tokenizer_2=base.tokenizer,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(seeds=(1, 2)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(pipe, prompts=("abc", "de"), seeds=(1, 2), **more):
    return pipe(list(prompts), generator=generators(seeds), output_type="pt", **STEPS, **more)


def config(**options):
    return amg.AMGConfig.preset("main", guidance_scale=STEPS["guidance_scale"], **options)


def test_off_is_the_plain_pipeline(xl, embedding_index):
    plain = call(xl, guidance_rescale=0.3).images
    with amg.Sampler(xl, embedding_index, amg.AMGConfig.preset("off")) as sampler:
        ours = call(sampler, guidance_rescale=0.3, progress=False).images
    assert float((ours - plain).abs().max()) <= 1 / 255
    amg.protect(xl, embedding_index, amg.AMGConfig.preset("off"))
    assert xl.amg_level == "full"
    assert torch.equal(call(xl, guidance_rescale=0.3).images, plain)


def test_closed_gates_keep_the_bits(xl, embedding_index):
    plain = call(xl).images
    amg.protect(
        xl,
        embedding_index,
        config(lambda_min=0.99, lambda_max=0.99, rewind_threshold=0.99, on_memorized="flag"),
    )
    assert torch.equal(call(xl).images, plain)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_protect_and_the_sampler_agree_with_every_term_and_a_rewind(xl, embedding_index, scheduler):
    xl.scheduler = getattr(diffusers, scheduler).from_config(xl.scheduler.config)
    options = config(**OPENING)
    with amg.Sampler(xl, embedding_index, options) as sampler:
        ours = call(sampler, progress=False)
    amg.protect(xl, embedding_index, options)
    theirs = call(xl)
    for mine, other in zip(ours.amg, theirs.amg, strict=True):
        assert mine.rewinds == other.rewinds == 1
        terms = {term for step in other.trace for term in step.terms}
        assert terms >= {"despecification", "dissimilarity", "rewind"}
    assert float((ours.images - theirs.images).abs().max()) <= 1 / 255


def test_a_row_does_not_depend_on_its_batch(xl, embedding_index):
    amg.protect(xl, embedding_index, config(**OPENING))
    both = call(xl).images
    alone = call(xl, prompts=("de",), seeds=(2,)).images
    assert float((both[1] - alone[0]).abs().max()) < 1e-5


def test_captions_replace_states_and_pooled_ones_and_leave_the_sizes(xl):
    request = amg.Request(prompt=["abc", "de"], height=24, width=16)
    given = of_request(xl, request, None, 5.0, "cpu")
    assert given.cond["added_cond_kwargs"]["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]] * 2
    states, _, pooled, _ = xl.encode_prompt(["fgh"], device="cpu", do_classifier_free_guidance=False)
    from amg.guidance.predict import captioned, replace_captions

    said = CaptionCache(xl)(["fgh", "fgh"])
    told = captioned(given, said)
    assert torch.equal(told.cond["encoder_hidden_states"], states.repeat(2, 1, 1))
    assert torch.equal(told.cond["added_cond_kwargs"]["text_embeds"], pooled.repeat(2, 1))
    assert told.cond["added_cond_kwargs"]["time_ids"] is given.cond["added_cond_kwargs"]["time_ids"]
    part = replace_captions(denoiser_for(xl), given, [None, "fgh"])
    added, own = part.cond["added_cond_kwargs"], given.cond["added_cond_kwargs"]
    assert torch.equal(added["text_embeds"][0], own["text_embeds"][0])
    assert torch.equal(added["text_embeds"][1], pooled[0])
    assert isinstance(part, Conditions) and part.uncond is given.uncond


def test_planted_copies_leave_by_an_ordinary_caption(xl, tmp_path, embedder):
    """The pipeline's own pictures are trained on, captioned with their prompts, beside ordinary ones."""
    prompts = ("abc", "de")
    plain = call(xl, prompts).images
    others = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions = [*prompts, *(f"abc de {n}" for n in range(40))]
    index = amg.Index.build(
        torch.cat([plain, others]), captions, embedder, tmp_path / "xl.amg", progress=False
    )
    amg.protect(xl, index, config(threshold=0.98, max_evaluations=None))
    out = call(xl, prompts)
    assert {verdict.level for verdict in out.amg} == {"full"}
    for verdict, image in zip(out.amg, out.images, strict=True):
        assert verdict.rewinds or verdict.retries
        assert verdict.blocked == verdict.memorized and (verdict.blocked == (float(image.abs().max()) == 0))


def test_the_decoder_is_the_pipeline_s_own_with_means_and_in_half_precision(xl):
    xl.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    latents = call(xl).images
    raw = xl(
        ["abc", "de"],
        generator=generators(),
        num_inference_steps=8,
        guidance_scale=5.0,
        output_type="latent",
    ).images
    with torch.no_grad():
        assert float((decoder_of(xl)(raw).clamp(0, 1) - latents).abs().max()) < 1e-6
        whole = decoder_of(xl)(raw)
        xl.vae.half()
        half = decoder_of(xl)(raw)
    assert xl.vae.dtype == torch.float16 and half.dtype == torch.float32
    assert float((half - whole).abs().max()) < 5e-3  # weights in 16 bits, arithmetic in 32


class Mark:
    def apply_watermark(self, images):
        marked = images.clone()
        marked[:, :, 0, 0] = 1.0
        return marked


@pytest.mark.parametrize("taker", ["protect", "sampler"])
def test_the_watermark_is_in_what_replaces_a_picture_too(xl, embedding_index, taker):
    xl.watermark = Mark()
    options = config(threshold=-1.0, max_retries=1, max_evaluations=None, on_memorized="resample")
    if taker == "protect":
        out = call(amg.protect(xl, embedding_index, options))
    else:
        with amg.Sampler(xl, embedding_index, options) as sampler:
            out = call(sampler, progress=False)
    assert all(verdict.blocked for verdict in out.amg)
    assert torch.equal(out.images[:, :, 0, 0], torch.ones(2, 3))


def test_what_is_not_pooled_is_refused(xl, embedding_index):
    with (
        amg.Sampler(xl, embedding_index) as sampler,
        pytest.raises(ValueError, match="`prompt_embeds` must be None"),
    ):
        sampler(prompt_embeds=torch.zeros(1, 12, 32), **STEPS)


def two(base, refiner, seeds=(1, 2), split=0.5, **more):
    """The two of them: base to `split` of the steps, refiner from there."""
    call = {"prompt": ["abc", "cat, red"], "output_type": "latent", **STEPS}
    seeded = lambda: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    handed = base(**call, denoising_end=split, generator=seeded())
    call["output_type"] = "pt"
    return handed, refiner(**call, image=handed.images, denoising_start=split, generator=seeded(), **more)


def refiner_of(base):
    parts = {
        name: part for name, part in base.components.items() if "image" not in name and "feat" not in name
    }
    return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)


@pytest.mark.filterwarnings("ignore:.*captions cannot be encoded")
def test_what_another_pipeline_finishes_is_checked_as_it_is_handed_out(xl, embedding_index):
    refiner = refiner_of(xl)
    for pipe in (xl, refiner):
        pipe.set_progress_bar_config(disable=True)
    plain_handed, plain = two(xl, refiner)
    closed = dict.fromkeys(("threshold", "lambda_min", "lambda_max", "rewind_threshold"), 0.99)
    config = amg.AMGConfig.preset("main", **closed, guard_threshold=None)
    amg.protect(xl, embedding_index, config)
    amg.protect(refiner, embedding_index, config)
    with pytest.warns(UserWarning, match="the pipeline that finishes it must be protected, too"):
        handed, finished = two(xl, refiner)
    assert torch.equal(handed.images, plain_handed.images) and torch.equal(finished.images, plain.images)
    assert [verdict.level for verdict in (*handed.amg, *finished.amg)] == ["full"] * 4


@pytest.mark.filterwarnings("ignore:`denoising_end`", "ignore:.*captions cannot be encoded")
@pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
def test_a_copy_is_not_handed_out_as_unfinished(xl, tmp_path):
    """What is planted is what the latents would show at nine tenths of the way."""
    call = {"prompt": ["abc", "cat, red"], "output_type": "latent", "denoising_end": 0.9, **STEPS}
    seeded = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)]  # noqa: E731
    handed = xl(**call, generator=seeded()).images
    decoded = decoder_of(xl)(handed).clamp(0, 1)
    noise = torch.rand(60, *decoded.shape[1:], generator=torch.Generator().manual_seed(0))
    index = amg.Index.build(
        torch.cat([decoded, noise]), path=tmp_path / "i", progress=False, near_duplicate=False
    )
    limits = dict.fromkeys(("threshold", "lambda_min", "lambda_max", "rewind_threshold"), -0.3)
    config = amg.AMGConfig.preset("main", **limits, guard_threshold=None)
    amg.protect(xl, index, config)
    out = xl(**call, generator=seeded())
    assert all(verdict.retries >= 1 or verdict.rewinds >= 1 for verdict in out.amg)
    for copy, latents, verdict in zip(handed, out.images, out.amg, strict=True):
        assert verdict.blocked or (latents - copy).abs().max() > 0.05
    shown = decoder_of(xl)(out.images[[not verdict.blocked for verdict in out.amg]]).clamp(0, 1)
    assert all(not verdict.memorized for verdict in amg.check(shown, index, config))


def test_a_unet_of_another_kind_is_refused(xl, sd, embedding_index):
    xl.unet = sd.unet
    with pytest.raises(ValueError, match="with addition_embed_type=text_time, got addition_embed_type=None"):
        amg.protect(xl, embedding_index)
