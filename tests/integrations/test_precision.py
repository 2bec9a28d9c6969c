"""Half precision, inference mode, autocast and default dtypes, with every gate open: terms with gradients,
rewinds and re-runs really act."""

import contextlib
import json
from dataclasses import asdict

import pytest
import torch

import amg
from amg.embed.network import NetworkEmbedder, Preprocess
from amg.embed.photos import load_photos
from amg.embed.resnet import ResNet50
from amg.embed.student import LIMITS, Agreement, Student, save_student
from amg.guidance.gate import FORMAT, VERSION
from amg.pipelines.denoiser import denoiser_for
from amg.pipelines.identity import key_for, origin_of
from amg.similarity import similarity_for

from .conftest import TinyEmbedder, tiny_ddpm, tiny_sd

diffusers = pytest.importorskip("diffusers")
HALVES = [torch.bfloat16, torch.float16]
WAYS = ["protect", "Sampler", "submit", "AMGScheduler"]
PROMPTS = ["abc", "cat, red"]
ACTING = {
    "c1": 2.0,
    "c2": 20.0,
    "terms_from": 0.0,
    "check_at": (),
    "rewind_at": (0.6,),
    "max_rewinds": 1,
    "rewind_guidance": 1.0,
    "on_memorized": "flag",
    "max_evaluations": None,
}
OPEN = {"cosine": -1.0, "nl2": -9.0}  # below every similarity
EMBEDDERS = ("tiny", "photos", "resnet", "wrapped")
EVERY = [*((way, "tiny") for way in WAYS), *(("protect", name) for name in EMBEDDERS[1:])]


class Typed:
    """An embedder that refuses what its protocol does not promise, as people's own do."""

    def __init__(self, embedder):
        self.embedder = embedder

    def __getattr__(self, name):
        return getattr(self.embedder, name)

    def __call__(self, images):
        assert images.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        assert bool(((images >= 0) & (images <= 1)).all())
        return self.embedder(images)


def embedder_named(name):
    torch.manual_seed(7)
    if name == "photos":
        return load_photos()
    if name == "resnet":
        square = Preprocess((32, 32), mode="square", interpolation="bilinear", mean=[0.5] * 3, std=[0.25] * 3)
        return NetworkEmbedder(square, ResNet50(16), name="resnet", dimension=16, sha="1" * 64)
    tiny = TinyEmbedder().eval().requires_grad_(False)
    if name == "wrapped":
        about = {"name": "own", "dimension": 16, "sha": "2" * 64, "preprocessing": "none"}
        return amg.embed.wrap(lambda images: tiny(images * 2 - 1), **about)
    return tiny


def index_of(folder, embedder, size=16):
    pictures = torch.rand(60, 3, size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float32)
    captions = [f"caption {i}" for i in range(60)]
    options = {"near_duplicate": False, "progress": False}
    return amg.Index.build(pictures, captions, embedder, folder / "index.amg", **options)


def acting(index, **more):
    bound = OPEN[index.metric]
    limits = {"lambda_min": bound, "lambda_max": bound, "rewind_threshold": bound}
    return amg.AMGConfig.preset("main", **{**ACTING, **limits, **more})


def draw(way, pipe, index, config, steps=5):
    """Two pictures and what happened to them, through one of the four doors."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    asked = {"num_inference_steps": steps, "output_type": "pt"}
    words = {"prompt": PROMPTS} if hasattr(pipe, "vae") else {"batch_size": 2}
    if way == "protect":
        out = amg.protect(pipe, index, config)(**words, generator=generators, **asked)
        amg.unprotect(pipe)
        return out.images, out.amg
    if way == "AMGScheduler":
        return own_loop(pipe, index, config, generators, steps)
    with amg.Sampler(pipe, index, config) as sampler:
        if way == "Sampler":
            out = sampler(**words, generator=generators, progress=False, **asked)
        else:
            out = sampler.submit(amg.Request(**words, seed=[0, 1], **asked)).result(120)
    return out.images, out.amg


@torch.no_grad()
def own_loop(pipe, index, config, generators, steps):
    decode = lambda x0: pipe.vae.decode(x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor)[0] / 2 + 0.5  # noqa: E731
    scheduler = amg.AMGScheduler(pipe.scheduler, index, config, decode=decode)
    scheduler.set_timesteps(steps)
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    sample = torch.stack([torch.randn(4, 8, 8, generator=one, dtype=torch.float32) for one in generators])
    sample = sample.to(pipe.unet.dtype)
    for t in scheduler.timesteps:
        both = pipe.unet(torch.cat([sample] * 2), t, torch.cat([uncond, cond])).sample
        sample = scheduler.step(tuple(both.chunk(2)), t, sample).prev_sample
    images = decode(sample).clamp(0, 1)
    return images, scheduler.verdicts(images)


def assert_same_pictures(images, expected):
    """To 1e-4, but for a value in 500 that was rounded to the next of 255 levels: ties go as the processor
    rounds."""
    apart = (images - expected).abs()
    assert apart.max() <= 1 / 255 + 1e-6 and (apart > 1e-4).float().mean() <= 1 / 500, apart.max()


def assert_acted(way, index, verdicts):
    """Every term that this door and this metric have acted on every sample."""
    wanted = {"dissimilarity"}
    if index.metric == "cosine":
        wanted |= {"despecification"} | ({"deduplication"} if way != "AMGScheduler" else set())
    for verdict in verdicts:
        assert wanted <= {term for step in verdict.trace for term in step.terms}
        assert verdict.rewinds == (way != "AMGScheduler")


def assert_closest(index, images, verdicts):
    """The similarity is that of the delivered float32 picture, or of its 8 bits, the larger."""
    raw = images.float()
    looks = [index.search(one, k=1).similarity for one in (raw, (raw * 255).round() / 255)]
    for verdict, similarity in zip(verdicts, torch.maximum(*looks).tolist(), strict=True):
        assert verdict.similarity == pytest.approx(similarity, abs=1e-3)


@pytest.fixture
def half(request):
    diffusers.logging.set_verbosity_error()  # "should be kept in float32: []"
    return tiny_sd().to(request.param)


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize(("way", "name"), EVERY)
def test_half_precision_with_every_embedder(half, way, name, tmp_path):
    index = index_of(tmp_path, Typed(embedder_named(name)))
    images, verdicts = draw(way, half, index, acting(index))
    assert_acted(way, index, verdicts)
    assert_closest(index, images, verdicts)


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_with_a_pixel_index(half, way, tmp_path):
    index = index_of(tmp_path, None)
    images, verdicts = draw(way, half, index, acting(index))
    assert_acted(way, index, verdicts)
    assert_closest(index, images, verdicts)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", ["Sampler", "submit"])
def test_half_precision_pixel_models(dtype, way, tmp_path):
    pipe, index = tiny_ddpm().to(dtype), index_of(tmp_path, None, size=8)
    _, verdicts = draw(way, pipe, index, acting(index))
    assert_acted(way, index, verdicts)


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize(
    "more",
    [
        {"gradient": "full"},
        {"gradient": "full", "step_length": "constant"},
        {"step_length": "constant"},
        {"threshold": -1.0, "on_memorized": "resample", "max_retries": 2},
        {"threshold": -1.0, "on_memorized": "block"},
    ],
    ids=["full", "full constant", "constant", "re-runs", "block"],
)
@pytest.mark.parametrize("way", ["protect", "Sampler", "submit"])
def test_half_precision_with_other_terms_and_re_runs(half, way, more, tmp_path):
    index = index_of(tmp_path, Typed(embedder_named("tiny")))
    images, verdicts = draw(way, half, index, acting(index, **more))
    assert_acted(way, index, verdicts) if "threshold" not in more else None
    assert [verdict.retries for verdict in verdicts] == [more.get("max_retries", 0)] * 2
    assert [verdict.blocked for verdict in verdicts] == ["threshold" in more] * 2
    assert bool(images.isfinite().all())


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize("way", ["protect", "Sampler", "submit"])
@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_half_precision_in_the_released_form(half, way, metric, tmp_path):
    index = index_of(tmp_path, Typed(embedder_named("tiny")) if metric == "cosine" else None)
    limits = {"cosine": (-1.0, -1.0), "nl2": (-2.2, -2.2)}[metric]
    bounds = {"lambda_min": limits[0], "lambda_max": limits[1]}
    config = amg.AMGConfig.preset("released", **bounds, on_memorized="flag")
    _, verdicts = draw(way, half, index, config)
    assert {"dissimilarity"} <= {term for one in verdicts for step in one.trace for term in step.terms}


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("way", ["protect", "Sampler"])
def test_half_precision_in_other_parameterisations(half, way, prediction, tmp_path):
    half.scheduler = diffusers.DDIMScheduler.from_config(half.scheduler.config, prediction_type=prediction)
    index = index_of(tmp_path, Typed(embedder_named("tiny")))
    _, verdicts = draw(way, half, index, acting(index, gradient="full"))
    assert_acted(way, index, verdicts)


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize("way", ["protect", "Sampler", "submit"])
def test_half_precision_with_a_student(half, way, tmp_path):
    index = index_of(tmp_path, Typed(embedder_named("tiny")))
    torch.manual_seed(3)
    band = Agreement(0.0, 1.1, 10, 1.0, 1.0, 1.0, (-1.0,) * len(LIMITS), (0.0,) * len(LIMITS))
    student = Student(origin_of(half, index), width=8, blocks=1, agreement=(band,)).eval()
    save_student(student, tmp_path / "student.safetensors", {})
    more = {"lambda_min": 0.6, "lambda_max": 0.6, "rewind_threshold": 0.6}
    _, verdicts = draw(way, half, index, acting(index, **more, student=tmp_path / "student.safetensors"))
    assert_acted(way, index, verdicts)


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize("way", ["protect", "Sampler", "submit"])
def test_half_precision_with_a_calibration(half, way, tmp_path):
    """Its rule calls every sample ordinary at the first check, its alarm every one a copy at step 2."""
    index = index_of(tmp_path, Typed(embedder_named("tiny")))
    half.scheduler.set_timesteps(5)
    key = key_for(half, index, half.scheduler, 7.5, acting(index).for_metric("cosine"))
    rule = {"signal": "gap", "sign": 1.0, "threshold": 1e9}
    region = {"mean": [1.0] * 4, "deviation": [1.0] * 4}
    alarm = {"step": 2, "signal": "region", "sign": 1.0, "threshold": -1.0}
    body = {"key": asdict(key), "gate": [{"step": 0, **rule}], "region": region, "alarm": alarm}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"format": FORMAT, "version": VERSION, **body}))
    _, verdicts = draw(way, half, index, acting(index, calibration=path))
    assert_acted(way, index, verdicts)
    for verdict in verdicts:
        assert verdict.trace[0].similarity is None and "rewind" in verdict.trace[2].terms
        assert all(len(step.signals) >= 3 for step in verdict.trace)


@pytest.mark.parametrize("half", HALVES, ids=str, indirect=True)
@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_the_similarity_is_that_of_the_float32_picture(half, metric, tmp_path):
    index = index_of(tmp_path, embedder_named("photos") if metric == "cosine" else None)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.5
    decoded = half.vae.decode(latents.to(half.vae.dtype) / half.vae.config.scaling_factor).sample
    expected = index.search((decoded.float() / 2 + 0.5).clamp(0, 1)).similarity
    similarity = similarity_for(index, denoiser_for(half))
    found = similarity.measure(latents)
    torch.testing.assert_close(found.similarity, expected, rtol=0, atol=1e-5)
    whole = similarity_for(index, denoiser_for(tiny_sd()))
    torch.testing.assert_close(found.similarity, whole.measure(latents).similarity, rtol=0, atol=3e-3)
    assert bool(similarity.gradient(latents, found).flatten(1).any(1).all())


def test_float16_decoders_give_the_gradient_of_small_cotangents(tmp_path):
    """Divided by 2¹⁵ all of them, the picture's gradient would be below what float16 holds."""
    index = index_of(tmp_path, embedder_named("tiny"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.5
    whole, half = tiny_sd(), tiny_sd().to(torch.float16)
    plain, found = index.embedder, []
    faint = index.attach(amg.embed.wrap(lambda images: plain(images * 2.0**-15 + 0.5), **named(plain)))
    for pipe in (whole, half):
        similarity = similarity_for(faint, denoiser_for(pipe))
        found.append(similarity.gradient(latents, similarity.measure(latents)))
    unit = [gradient.flatten(1) / gradient.flatten(1).norm(dim=1, keepdim=True) for gradient in found]
    assert bool(((unit[0] * unit[1]).sum(1) > 0.99).all())


def named(embedder):
    return {name: getattr(embedder, name) for name in ("name", "dimension", "sha", "preprocessing")}


@pytest.mark.parametrize(("way", "name"), [*EVERY, ("Sampler", None), ("protect", None)])
def test_inference_mode_gives_the_pictures_of_no_grad(way, name, tmp_path):
    """Weights, embedder and index made under it too."""
    gradient = "frozen" if way == "AMGScheduler" or name is None else "full"

    def drawn(mode, folder):
        folder.mkdir()
        with mode():
            index = index_of(folder, embedder_named(name) if name else None)
            return draw(way, tiny_sd(), index, acting(index, gradient=gradient), steps=4), index

    (plain, _), _ = drawn(torch.no_grad, tmp_path / "no_grad")
    (images, verdicts), index = drawn(torch.inference_mode, tmp_path / "inference")
    assert_same_pictures(images, plain)
    assert_acted(way, index, verdicts)


@pytest.mark.parametrize("way", WAYS)
def test_weights_made_in_inference_mode_and_used_outside(way, tmp_path):
    index, gradient = (
        index_of(tmp_path, embedder_named("tiny")),
        "frozen" if way == "AMGScheduler" else "full",
    )
    expected, _ = draw(way, tiny_sd(), index, acting(index, gradient=gradient), steps=4)
    with torch.inference_mode():
        pipe, loaded = tiny_sd(), index.attach(embedder_named("tiny"))
    images, verdicts = draw(way, pipe, loaded, acting(index, gradient=gradient), steps=4)
    assert_same_pictures(images, expected)
    assert_acted(way, index, verdicts)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "nl2"])
@pytest.mark.parametrize("way", ["protect", "Sampler", "submit"])
def test_the_host_s_default_dtype_changes_nothing(way, metric, dtype, tmp_path):
    index = index_of(tmp_path, embedder_named("photos") if metric == "cosine" else None)
    expected, verdicts = draw(way, tiny_sd(), index, acting(index))
    pipe = tiny_sd()
    with default_dtype(dtype):
        images, found = draw(way, pipe, index, acting(index))
    torch.testing.assert_close(images, expected, rtol=0, atol=1.01 / 255)
    assert_acted(way, index, found)
    assert [one.rewinds for one in found] == [one.rewinds for one in verdicts]
    for one, other in zip(found, verdicts, strict=True):
        assert one.similarity == pytest.approx(other.similarity, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_networks_and_indexes_made_under_another_default_dtype_are_the_same(dtype, tmp_path):
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    expected, index = load_photos()(images), index_of(tmp_path, load_photos())
    (tmp_path / "other").mkdir()
    with default_dtype(dtype):
        embedder = load_photos()
        found, other = embedder(images), index_of(tmp_path / "other", embedder)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert torch.equal(index.rows, other.rows) and torch.equal(index.codes.codes, other.codes.codes)


@pytest.mark.parametrize(("way", "name"), [*EVERY, ("Sampler", None), ("protect", None)])
def test_autocast_around_the_call(way, name, tmp_path):
    index = index_of(tmp_path, Typed(embedder_named(name)) if name else None)
    with torch.autocast("cpu", torch.bfloat16):
        gradient = "frozen" if way == "AMGScheduler" or name is None else "full"
        images, verdicts = draw(way, tiny_sd(), index, acting(index, gradient=gradient))
    assert_acted(way, index, verdicts)
    assert_closest(index, images, verdicts)  # without autocast


def test_autocast_and_inference_mode_together(tmp_path):
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        index = index_of(tmp_path, Typed(embedder_named("tiny")))
        for way in WAYS:
            config = acting(index, gradient="frozen" if way == "AMGScheduler" else "full")
            assert_acted(way, index, draw(way, tiny_sd(), index, config)[1])


def test_an_index_built_or_searched_under_autocast_is_the_same(tmp_path):
    index, images = index_of(tmp_path, embedder_named("photos")), torch.rand(4, 3, 16, 16)
    expected = index.search(images, k=3)
    (tmp_path / "other").mkdir()
    with torch.autocast("cpu", torch.bfloat16):
        other = index_of(tmp_path / "other", embedder_named("photos"))
        found = index.search(images, k=3)
    assert torch.equal(index.rows, other.rows)
    assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.row, expected.row)
