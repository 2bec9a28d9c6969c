"""Later tries whose prompt is lowered, in `Sampler` and `protect`: the same pictures, said in the verdict."""

import pytest
import torch

import amg
from amg.guidance.lower import ITERATIONS

from .. import pipelines_tiny
from .conftest import TinyEmbedder, diffusers, tiny_ddpm, tiny_sd

PROMPTS = ["abc de fg", "x y z"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An index without captions."""
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    embedder = TinyEmbedder().eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("bare") / "bare.amg"
    return amg.Index.build(images, None, embedder, path, progress=False)


def config(how, **options):
    """Every sample goes back once, and is delivered."""
    given = {"lambda_min": 0.99, "lambda_max": 0.99, "check_at": (), "rewind_at": (0.5,), "max_rewinds": 1}
    given |= {"rewind_threshold": -0.99, "on_memorized": "flag", "max_evaluations": None}
    return amg.AMGConfig.preset("main", **{**given, **options}, rewind_prompt=how)


def noise():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def drawn(make, index, asked):
    """(sampler's output, protected pipeline's)."""
    call = {"num_inference_steps": 6, "output_type": "pt"}
    with amg.Sampler(make(), index, asked) as sampler:
        ours = sampler(PROMPTS, generator=noise(), progress=False, **call)
    return ours, amg.protect(make(), index, asked)(PROMPTS, generator=noise(), **call)


@pytest.mark.filterwarnings("ignore:`index` has captions for 0")
@pytest.mark.parametrize("how", ["attribution", "embedding"])
def test_sampler_and_protect_draw_the_same(how, bare):
    ours, theirs = drawn(tiny_sd, bare, config(how))
    same, _ = drawn(tiny_sd, bare, config("same"))
    assert float((ours.images - theirs.images).abs().max()) <= 1 / 255
    assert not torch.equal(ours.images, same.images)
    for mine, other, plain, prompt in zip(ours.amg, theirs.amg, same.amg, PROMPTS, strict=True):
        assert mine.rewinds == other.rewinds == 1 and mine.caption == other.caption
        assert mine.optimised is other.optimised is (how == "embedding")
        assert mine.evaluations == other.evaluations
        spent = mine.evaluations - plain.evaluations
        if how == "attribution":
            assert spent == 2 * len(prompt.split()) + 1
            assert mine.caption and set(mine.caption.split()) < set(prompt.split())
        else:
            assert 2 <= spent <= ITERATIONS + 1 and mine.caption is None
    assert amg.Verdict.from_dict(ours.amg[0].as_dict()) == ours.amg[0]


@pytest.mark.filterwarnings("ignore:`index` has captions for 0")
@pytest.mark.parametrize(
    ("family", "how"),
    [
        *((family, how) for family in ("sdxl", "sd3") for how in ("attribution", "embedding")),
        *((family, "attribution") for family in ("sd_img2img", "sd_inpaint_9")),
        *((family, "embedding") for family in ("pixart", "flux_cfg")),  # called by embeddings
    ],
)
def test_other_families_lower_too(family, how, bare):
    pipe, call = pipelines_tiny.build(family, steps=6)
    call = {**call, "output_type": "pt", **({"prompt": PROMPTS} if "prompt" in call else {})}
    asked, found = config(how, block_input_copies=True), []
    if "prompt" in call:
        with amg.Sampler(pipe, bare, asked) as sampler:
            found += sampler(**call, generator=noise(), progress=False).amg
    if not family.startswith("sd_"):  # their pictures are drawn again by their own call
        found += amg.protect(pipe, bare, asked)(**call, generator=noise()).amg
        assert pipe.amg_level == "full"
    for verdict in found:
        assert verdict.rewinds == 1 and verdict.optimised is (how == "embedding")
        assert (verdict.caption is not None) is (how == "attribution")


@pytest.mark.filterwarnings("ignore:`index` has captions for 0")
@pytest.mark.parametrize("how", ["attribution", "embedding"])
def test_re_runs_lower_further_and_modes_change_nothing(how, bare):
    options = {"rewind_at": (), "threshold": -1.0, "on_memorized": "resample", "max_retries": 2}
    asked, call = config(how, **options), {"num_inference_steps": 4, "output_type": "pt", "progress": False}
    with amg.Sampler(tiny_sd(), bare, asked) as sampler:
        plain = sampler(PROMPTS, generator=noise(), **call)
        with torch.inference_mode():
            other = sampler(PROMPTS, generator=noise(), **call)
    for one, two in zip(plain.amg, other.amg, strict=True):
        assert one.blocked and one.retries == 2 and one.optimised is (how == "embedding")
        assert (one.caption, one.evaluations) == (two.caption, two.evaluations)
        assert abs(one.similarity - two.similarity) < 1e-4


@pytest.mark.filterwarnings("ignore:`index` has captions for 0")
def test_a_freed_text_encoder_leaves_the_embedding(bare):
    pipe = tiny_sd()
    cond, uncond = pipe.encode_prompt(["abc de"], "cpu", 1, True)
    pipe.text_encoder = None
    call = {"prompt_embeds": cond, "negative_prompt_embeds": uncond, "num_inference_steps": 4}
    for how, optimised in (("embedding", True), ("attribution", False)):
        with pytest.warns(UserWarning, match="captions cannot be encoded"):
            sampler = amg.Sampler(pipe, bare, config(how))
            (verdict,) = sampler(**call, output_type="pt", progress=False).amg
        assert verdict.optimised is optimised and verdict.caption is None and verdict.rewinds == 1


def test_who_lowers_is_not_warned_of_the_same_prompt(bare, recwarn):
    for make in (amg.Sampler, amg.protect):
        make(tiny_sd(), bare, config("embedding"))
    assert not [one for one in recwarn if "captions" in str(one.message)]


def test_what_takes_no_text_refuses(bare, tmp_path):
    refused = r'`rewind_prompt` must be "same" for {}, .*got \'attribution\''
    pixels = amg.Index.build(torch.rand(60, 3, 8, 8), None, None, tmp_path / "pixels.amg", progress=False)
    asked = amg.AMGConfig.preset("main", rewind_prompt="attribution")
    for make in (amg.Sampler, amg.protect):
        with pytest.raises(ValueError, match=refused.format("DDPMPipeline")):
            make(tiny_ddpm(), pixels, asked)
    with pytest.raises(ValueError, match=refused.format("a loop of your own")):
        amg.AMGScheduler(diffusers.DDIMScheduler(), pixels, asked)
