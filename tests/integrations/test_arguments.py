"""What is of another kind than an argument takes is refused at once, by name, constraint and value."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import amg

from .. import pipelines_tiny

diffusers = pytest.importorskip("diffusers")

BARE = "`index` must have its embedder attached (`Index.open(path, embedder)`), got none for Index("
HELD = {  # what index, config and also may not be: (index, config, also) -> the error
    "a path": (lambda index: ("a.amg", None, ()), "`index` must be an amg.Index, got 'a.amg': open it by"),
    "a list": (lambda index: ([index], None, ()), "`index` must be an amg.Index, got [Index("),
    "nothing": (lambda index: (None, None, ()), "`index` must be an amg.Index, got None"),
    "a lone further index": (
        lambda index: (index, None, index),
        "`also` must be a list of indexes, got Index(",
    ),
    "a path among them": (lambda index: (index, None, ["b"]), "`also[0]` must be an amg.Index, got 'b'"),
    "a text of them": (lambda index: (index, None, "b"), "`also` must be a list of indexes, got 'b'"),
    "a preset's name": (
        lambda index: (index, "main", ()),
        "`config` must be an AMGConfig or None, got 'main': give `AMGConfig.preset('main')`",
    ),
    "a dict": (lambda index: (index, {}, ()), "`config` must be an AMGConfig or None, got {}"),
    "an index without its embedder": (lambda index: (amg.Index.open(index.path), None, ()), BARE),
    "a further one without": (
        lambda index: (index, None, [amg.Index.open(index.path)]),
        "`also[0]` must have its embedder attached",
    ),
}


@pytest.mark.parametrize("what", HELD)
@pytest.mark.parametrize("way", ["protect", "Sampler", "check", "AMGScheduler"])
def test_what_pictures_are_held_to(way, what, sd, embedding_index):
    make, message = HELD[what]
    index, config, also = make(embedding_index)
    if way == "AMGScheduler" and also != ():
        pytest.skip("takes no further indexes")
    acts = {
        "protect": lambda: amg.protect(sd, index, config, also),
        "Sampler": lambda: amg.Sampler(sd, index, config, also),
        "check": lambda: amg.check(torch.rand(1, 3, 16, 16), index, config, also),
        "AMGScheduler": lambda: amg.AMGScheduler(sd.scheduler, index, config),
    }
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        acts[way]()
    assert not hasattr(sd, "_amg_protection")


GENERATOR = torch.Generator()
WRONG = [  # arguments of a call, the error
    ({"prompt": 5}, "`prompt` must be a text or a list of texts, got 5"),
    ({"prompt": [1, "a"]}, "`prompt` must be a text or a list of texts, got [1, 'a']"),
    ({"prompt": []}, "`prompt` must be a text or a list of texts, got []"),
    ({"prompt": b"a"}, "`prompt` must be a text or a list of texts, got b'a'"),
    ({"negative_prompt": 5}, "`negative_prompt` must be a text or a list of texts, got 5"),
    ({"negative_prompt": ["a"]}, "`negative_prompt` must be a text, or a list of 2 as `prompt` is, got 1"),
    ({"class_labels": "1"}, "`class_labels` must be a list of numbers, got '1'"),
    ({"class_labels": 1}, "`class_labels` must be a list of numbers, got 1"),
    ({"batch_size": "2"}, "`batch_size` must be an integer, got '2'"),
    ({"num_inference_steps": "4"}, "`num_inference_steps` must be an integer, got '4'"),
    ({"num_inference_steps": 4.0}, "`num_inference_steps` must be an integer, got 4.0"),
    ({"num_inference_steps": [4]}, "`num_inference_steps` must be an integer, got [4]"),
    ({"num_inference_steps": None}, "`num_inference_steps` must be an integer where neither `timesteps` nor"),
    ({"timesteps": []}, "`timesteps` must hold at least one number, got []"),
    ({"sigmas": torch.zeros(0)}, "`sigmas` must hold at least one number, got tensor([])"),
    (
        {"timesteps": [900, 500]},
        "`timesteps` must be None with DDIMScheduler, whose `set_timesteps` does not",
    ),
    ({"guidance_scale": "7.5"}, "`guidance_scale` must be a number, got '7.5'"),
    ({"guidance_scale": [7.5]}, "`guidance_scale` must be a number, got [7.5]"),
    ({"guidance_rescale": "0"}, "`guidance_rescale` must be a number, got '0'"),
    ({"eta": None}, "`eta` must be a number, got None"),
    ({"num_images_per_prompt": "1"}, "`num_images_per_prompt` must be an integer, got '1'"),
    ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be >= 1, got 0"),
    ({"latents": [0.0]}, "`latents` must be a tensor, got [0.0]"),
    ({"prompt_embeds": "a"}, "`prompt_embeds` must be a tensor, got 'a'"),
    ({"output_type": ["pt"]}, '`output_type` must be "pil"'),
    ({"height": "16"}, "`height` must be an integer, got '16'"),
    ({"timesteps": "5"}, "`timesteps` must be a list of numbers, got '5'"),
    ({"timesteps": 5}, "`timesteps` must be a list of numbers, got 5"),
    ({"sigmas": ["a"]}, "`sigmas` must be a list of numbers, got ['a']"),
    ({"clip_skip": "1"}, "`clip_skip` must be an integer, got '1'"),
]
GENERATORS = [
    (7, "`generator` must be a torch.Generator, or a list of them, got 7"),
    ([GENERATOR, 7], "`generator` must be a torch.Generator, or a list of them, got ["),
    ([GENERATOR], "`generator` must be one, or a list of 2, one per image, got 1"),
    ([GENERATOR] * 3, "`generator` must be one, or a list of 2, one per image, got 3"),
    ((GENERATOR,) * 3, "`generator` must be one, or a list of 2, one per image, got 3"),
]


@pytest.fixture
def sampler(sd, embedding_index):
    with amg.Sampler(sd, embedding_index) as sampler:
        yield sampler


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_request(given, message, sampler):
    asked = {"prompt": ["a", "b"], "num_inference_steps": 2, **given}
    for act in (lambda: sampler(**asked), lambda: sampler.submit(amg.Request(**asked))):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            act()


@pytest.mark.parametrize(("generator", "message"), GENERATORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("way", ["Sampler", "protect", "protect pixels"])
def test_generators(way, generator, message, request):
    """At once: before the network is called."""
    pixels = way == "protect pixels"
    pipe = request.getfixturevalue("ddpm" if pixels else "sd")
    index = request.getfixturevalue("pixel_index" if pixels else "embedding_index")
    pipe.unet.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    guarded = amg.Sampler(pipe, index) if way == "Sampler" else amg.protect(pipe, index)
    asked = {"batch_size": 2} if pixels else {"prompt": ["a", "b"]}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        guarded(**asked, num_inference_steps=2, generator=generator)


@pytest.mark.parametrize("family", ["dit", "flux", "sd3"])
def test_generators_of_a_watched_pipeline(family, embedding_index):
    pipe, call = pipelines_tiny.build(family)
    call.pop("generator", None)
    amg.protect(pipe, embedding_index)
    with pytest.raises(ValueError, match="`generator` must be one, or a list of 2, one per image, got 3"):
        pipe(**call, generator=[GENERATOR] * 3)


@pytest.mark.parametrize("request_", ["a cat", {"prompt": "a cat"}, None])
def test_what_is_no_request(request_, sampler):
    with pytest.raises(TypeError, match=r"`request` must be an amg\.Request, got "):
        sampler.submit(request_)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": "12"}, "`seed` must be an integer, or a list of one per image, got '12'"),
        ({"seed": [1, "2"]}, "`seed` must be an integer, or a list of one per image, got [1, '2']"),
        ({"seed": 1.5}, "`seed` must be an integer, or a list of one per image, got 1.5"),
        ({"seed": [1]}, "`generator` must be one, or a list of 2, one per image, got 1"),
        ({"deadline": "soon"}, "`deadline` must be a number, got 'soon'"),
    ],
)
def test_what_submit_alone_takes(given, message, sampler):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        sampler.submit(amg.Request(prompt=["a", "b"], num_inference_steps=2, **given))


@pytest.mark.parametrize("bad", ["16", 2.5, True])
@pytest.mark.parametrize("name", ["max_batch", "max_pending"])
def test_how_much_a_sampler_takes(name, bad, sd, embedding_index):
    with pytest.raises(TypeError, match=f"`{name}` must be an integer >= 1, got {bad!r}"):
        amg.Sampler(sd, embedding_index, **{name: bad})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.png", "`images` must hold PIL images to be checked, got str"),
        (["a.png"], "`images` must hold PIL images to be checked, got str"),
        (None, "`images` must hold PIL images to be checked, got NoneType"),
        (iter(()), "`images` must hold PIL images to be checked, got tuple_iterator"),
    ],
)
def test_pictures_to_check(images, message, embedding_index):
    with pytest.raises(TypeError, match=message):
        amg.check(images, embedding_index)


def test_numpys_numbers_and_tuples_are_taken(sampler):
    out = sampler(
        ("a", "b"),
        num_inference_steps=np.int64(2),
        guidance_scale=np.float32(3),
        generator=(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        progress=False,
    )
    assert len(out.amg) == 2


@pytest.mark.parametrize("listed", [{"timesteps": [900, 500, 100]}, {"sigmas": [9.0, 3.0, 0.5]}])
def test_steps_may_be_none_where_they_are_listed(listed, sd, embedding_index):
    """As the plain pipelines take it."""
    sd.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd.scheduler.config)
    asked = {"prompt": ["a", "b"], "output_type": "pt", **listed}
    with amg.Sampler(sd, embedding_index, amg.AMGConfig.preset("off")) as sampler:
        found = sampler(num_inference_steps=None, generator=torch.Generator().manual_seed(1), **asked)
        submitted = sampler.submit(amg.Request(num_inference_steps=None, seed=1, **asked)).result()
    plain = sd(num_inference_steps=None, generator=torch.Generator().manual_seed(1), **asked).images
    torch.testing.assert_close(found.images, plain, rtol=0, atol=0.5 / 255 + 1e-4)
    assert torch.equal(submitted.images, found.images)
