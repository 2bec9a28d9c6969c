"""A pipeline's safety checker sees every picture that is delivered; the flags are those of that picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import amg

diffusers = pytest.importorskip("diffusers")
WAYS = ["protect", "Sampler", "submit"]
PROMPTS = ["abc", "cat, red", "z", "no"]
LEVEL = 1 / 255 + 1e-6


class Checker(torch.nn.Module):
    """Flags pictures whose red is above the median of what it was made for; remembers what it was shown."""

    device = torch.device("cpu")

    def __init__(self, limit, blanks=True):
        super().__init__()
        self.limit, self.blanks, self.seen, self.inputs = limit, blanks, [], []

    def flag(self, image):
        return bool(image[0].float().mean() > self.limit)

    def forward(self, clip_input, images):
        flags = [self.flag(image) for image in images]
        self.seen += [image.clone().float() / 2 + 0.5 for image in images]
        self.inputs.append(clip_input.dtype)
        for row, flag in enumerate(flags):
            if flag and self.blanks:
                images[row] = torch.zeros_like(images[row])
        return images, flags


def extractor(pictures, return_tensors):
    values = np.stack([np.asarray(picture) for picture in pictures]).astype("float32")
    inputs = SimpleNamespace(pixel_values=torch.from_numpy(values).permute(0, 3, 1, 2))
    inputs.to = lambda device: inputs
    return inputs


def with_checker(pipe, limit, blanks=True):
    pipe.safety_checker, pipe.feature_extractor = Checker(limit, blanks), extractor
    return pipe.safety_checker


def draw(way, pipe, index, config, output_type="pt", return_dict=True):
    asked = {"prompt": PROMPTS, "num_inference_steps": 4, "output_type": output_type}
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    if way == "protect":
        out = amg.protect(pipe, index, config)(**asked, generator=generators, return_dict=return_dict)
        amg.unprotect(pipe)
        return out
    with amg.Sampler(pipe, index, config) as sampler:
        if way == "Sampler":
            return sampler(**asked, generator=generators, progress=False)
        return sampler.submit(amg.Request(**asked, seed=[0, 1, 2, 3])).result(60)


def config(**more):
    return amg.AMGConfig.preset("off", **{"on_memorized": "flag", **more})


@pytest.fixture
def plain(sd, embedding_index):
    """What is delivered without a checker, the middle of its reds in [-1, 1] and of its similarities."""
    out = draw("Sampler", sd, embedding_index, config())
    assert out.nsfw_content_detected is None
    reds = (out.images[:, 0].mean((1, 2)) * 2 - 1).sort().values
    similar = sorted(one.similarity for one in out.amg)
    return out, float(reds[1:3].mean()), (similar[1] + similar[2]) / 2


def assert_shown(checker, images, flags):
    """Every picture was shown, its flag is its own, and it came out black if it was flagged."""
    assert type(flags) is list and all(type(flag) is bool for flag in flags)
    for image, flag in zip(images.float(), flags, strict=True):
        if flag and checker.blanks and float(image.abs().max()) == 0:
            continue
        same = [one for one in checker.seen if (one.clamp(0, 1) - image).abs().max() <= LEVEL]
        assert same and flag == checker.flag(same[-1] * 2 - 1)
        assert not (flag and checker.blanks)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blanks", [True, False])
def test_pictures_of_a_first_try(way, blanks, sd, embedding_index, plain):
    expected, limit, _ = plain
    checker = with_checker(sd, limit, blanks)
    out = draw(way, sd, embedding_index, config())
    wanted = [checker.flag(image * 2 - 1) for image in expected.images]
    assert out.nsfw_content_detected == wanted and sorted(wanted) == [False, False, True, True]
    assert_shown(checker, out.images, out.nsfw_content_detected)
    for image, before, flag in zip(out.images, expected.images, wanted, strict=True):
        blanked = torch.zeros_like(before) if flag and blanks else before
        assert (image - blanked).abs().max() <= LEVEL
    found = embedding_index.search(out.images)
    for verdict, similarity in zip(out.amg, found.similarity.tolist(), strict=True):
        assert verdict.similarity == pytest.approx(similarity, abs=2e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blanks", [True, False])
@pytest.mark.parametrize("retries", [1, 6])
def test_re_runs_and_what_is_blocked_are_shown_too(way, blanks, retries, sd, embedding_index, plain):
    _, limit, threshold = plain
    checker = with_checker(sd, limit, blanks)
    strong = {"threshold": threshold, "on_memorized": "resample", "max_retries": retries}
    out = draw(way, sd, embedding_index, config(**strong))
    assert any(one.retries for one in out.amg)
    assert_shown(checker, out.images, out.nsfw_content_detected)
    assert all(one.blocked or not one.memorized for one in out.amg)


@pytest.mark.parametrize("way", WAYS)
def test_all_blocked(way, sd, embedding_index, plain):
    checker = with_checker(sd, -2.0 if way == "protect" else plain[1], blanks=False)
    out = draw(way, sd, embedding_index, config(threshold=-1.0, on_memorized="block"))
    assert all(one.blocked for one in out.amg) and float(out.images.abs().max()) == 0
    assert_shown(checker, out.images, out.nsfw_content_detected)
    assert len(checker.seen) == 8


def test_flags_of_re_runs_replace_those_of_the_first_try(sd, embedding_index, plain):
    """The checker flags the first four pictures it is shown, whatever they are, and no other."""
    checker = with_checker(sd, plain[1], blanks=False)
    checker.flag = lambda image: len(checker.seen) < 4
    strong = {"threshold": plain[2], "on_memorized": "resample", "max_retries": 6}
    out = draw("protect", sd, embedding_index, config(**strong))
    assert out.nsfw_content_detected == [one.retries == 0 for one in out.amg]
    assert {one.retries > 0 for one in out.amg} == {True, False}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_other_output_types(way, output_type, sd, embedding_index, plain):
    expected, limit, _ = plain
    with_checker(sd, limit, blanks=False)
    out = draw(way, sd, embedding_index, config(), output_type)
    images = np.stack([np.asarray(image) for image in out.images]).astype("float64")
    images = images / 255 if output_type == "pil" else images
    assert np.abs(images.transpose(0, 3, 1, 2) - expected.images.numpy()).max() <= 2 * LEVEL
    assert sorted(out.nsfw_content_detected) == [False, False, True, True]


@pytest.mark.parametrize("way", WAYS)
def test_latents_are_not_shown_to_it(way, sd, embedding_index, plain):
    checker = with_checker(sd, plain[1])
    out = draw(way, sd, embedding_index, config(), "latent")
    assert out.nsfw_content_detected is None and not checker.seen


def test_tuples_carry_the_flags(sd, embedding_index, plain):
    checker = with_checker(sd, plain[1])
    strong = {"threshold": plain[2], "on_memorized": "resample", "max_retries": 2}
    images, flags = draw("protect", sd, embedding_index, config(**strong), return_dict=False)
    assert_shown(checker, images, flags)
    sd.safety_checker = None
    assert draw("protect", sd, embedding_index, config(), return_dict=False)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_half_precision(way, dtype, sd, embedding_index, plain):
    _, limit, threshold = plain
    diffusers.logging.set_verbosity_error()
    checker = with_checker(sd.to(dtype), limit)
    strong = {"threshold": threshold, "on_memorized": "resample", "max_retries": 2}
    out = draw(way, sd, embedding_index, config(**strong))
    assert len(out.nsfw_content_detected) == 4 and set(checker.inputs) == {dtype}


def test_a_checker_that_fails_leaves_nothing_behind(sd, embedding_index, plain):
    def fail(image, device, dtype):
        raise RuntimeError("stop")

    with_checker(sd, plain[1])
    sd.run_safety_checker = fail
    with pytest.raises(RuntimeError, match="stop"):
        draw("protect", sd, embedding_index, config())
    assert sd.run_safety_checker is fail
    del sd.run_safety_checker
    amg.unprotect(sd)
    assert draw("protect", sd, embedding_index, config()).nsfw_content_detected is not None
    assert "run_safety_checker" not in vars(sd)
