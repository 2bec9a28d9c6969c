"""A bank of ordinary prompts: what later tries go to where the index knows no caption."""

import pytest
import torch

import amg
from amg.guidance.gate import Gate
from amg.guidance.ordinary import Ordinary, bank_of
from amg.guidance.prompts import Prompts

from ..integrations.conftest import TinyEmbedder, tiny_sd

BANK = ("a cat on a sofa", "a cat in rain", "a red boat", "often said")


class Rows:
    """What `Ordinary` asks of an index: captions, of which one occurs often."""

    metric = "cosine"

    def __init__(self, captions, often=()):
        self.captions, self.often = captions, often

    def caption_counts(self):
        return torch.tensor([100 if text in self.often else 1 for text in self.captions])


def test_the_prompts_nearest_to_the_prompt_are_taken_never_itself():
    index = Rows([None, None])
    ordinary = Ordinary((*BANK, "the cat"))
    (found,) = ordinary.captions(index, [0], ["the cat"])
    assert found and set(found) <= {"a cat on a sofa", "a cat in rain"}
    assert ordinary.captions(index, [-1], ["a red boat at sea"]) == [["a red boat"]]


def test_any_of_them_where_no_word_is_shared_or_the_prompt_is_not_known():
    index = Rows([None])
    assert Ordinary(BANK).captions(index, [0, 0], ["xyz", None]) == [[*BANK], [*BANK]]
    assert Ordinary().captions(index, [0], ["a cat"]) == [[]]


def test_what_the_index_says_often_is_no_way_out():
    index = Rows([None, "often said"], often=("often said",))
    assert Ordinary(BANK).captions(index, [0], ["often said"]) == [list(BANK[:3])]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be a list of texts"),
        (["a", " "], r"got ' ' in it"),
        (["a", 3], "got 3 in it"),
        (7, "got 7"),
        ("missing.txt", "must be a file of prompts, got missing.txt"),
    ],
)
def test_a_bank_that_is_none_is_refused(value, message):
    with pytest.raises(ValueError, match=rf"`ordinary_prompts` .*{message}|`ordinary_prompts`.*{message}"):
        amg.AMGConfig.preset("main", ordinary_prompts=value)


def test_a_file_is_read_when_the_config_is_made(tmp_path):
    path = tmp_path / "bank.txt"
    path.write_text('\ufeffa cat\n\n{"caption": "a dog"}\n', encoding="utf-8")
    config = amg.AMGConfig.preset("main", ordinary_prompts=path)
    path.unlink()
    assert config.ordinary_prompts == ("a cat", "a dog")
    assert hash(config) == hash(amg.AMGConfig.preset("main", ordinary_prompts=["a cat", "a dog"]))
    path.write_bytes(b"\xff\xfe a")
    with pytest.raises(ValueError, match="UTF-8"):
        amg.AMGConfig.preset("main", ordinary_prompts=path)


def test_a_calibration_s_own_prompts_serve_where_none_are_given():
    config, gate = amg.AMGConfig.preset("main"), Gate(ordinary=("a", "b"))
    assert bank_of(config, gate) == ("a", "b") and bank_of(config, None) == ()
    given = amg.AMGConfig.preset("main", ordinary_prompts=["c"])
    assert bank_of(given, gate) == Prompts(["c"])


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An index without captions."""
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    embedder = TinyEmbedder().eval().requires_grad_(False)
    return amg.Index.build(
        images, None, embedder, tmp_path_factory.mktemp("bare") / "bare.amg", progress=False
    )


def config(**options):
    given = {
        "lambda_min": 0.99,
        "lambda_max": 0.99,
        "check_at": (),
        "rewind_at": (0.5,),
        "rewind_threshold": -0.99,
        "max_rewinds": 1,
        "on_memorized": "flag",
        "max_evaluations": None,
    }
    return amg.AMGConfig.preset("main", **given, **options)


def test_later_tries_go_to_the_bank_alike_in_protect_and_sampler(bare):
    call = {"num_inference_steps": 6, "output_type": "pt"}
    pipe, prompts = tiny_sd(), ["abc def", "xyz"]
    bank = ("abc ghi", "def", "no")
    noise = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)]  # noqa: E731
    with amg.Sampler(pipe, bare, config(ordinary_prompts=bank)) as sampler:
        ours = sampler(prompts, generator=noise(), progress=False, **call)
    theirs = amg.protect(pipe, bare, config(ordinary_prompts=bank))(prompts, generator=noise(), **call)
    for mine, other in zip(ours.amg, theirs.amg, strict=True):
        assert mine.rewinds == 1 and mine.caption == other.caption
    assert ours.amg[0].caption in ("abc ghi", "def") and ours.amg[1].caption in bank
    assert float((ours.images - theirs.images).abs().max()) <= 1 / 255


def test_who_gives_neither_is_warned(bare, recwarn):
    with pytest.warns(UserWarning, match=r"captions for 0 of its 60 rows.*or give `ordinary_prompts=`"):
        amg.Sampler(tiny_sd(), bare, config())
    recwarn.clear()
    amg.Sampler(tiny_sd(), bare, config(ordinary_prompts=["a"]))
    amg.protect(tiny_sd(), bare, config(ordinary_prompts=["a"]))
    assert not [one for one in recwarn if "captions" in str(one.message)]


def test_pixels_under_a_latent_model_are_warned_of_and_go_to_the_bank(tmp_path):
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    pixels = amg.Index.build(images, ["abc"] * 60, None, tmp_path / "pixels.amg", progress=False)
    given = {"check_at": (), "rewind_at": (0.5,), "rewind_threshold": -1.99, "max_rewinds": 1}
    options = amg.AMGConfig.preset(
        "main", lambda_min=0.0, lambda_max=0.0, on_memorized="flag", ordinary_prompts=["def"], **given
    )
    with pytest.warns(UserWarning, match="compares pixels"):
        pipe = amg.protect(tiny_sd(), pixels, options)
    out = pipe("abc", num_inference_steps=6, output_type="pt")
    assert out.amg[0].rewinds == 1 and out.amg[0].caption == "def"
