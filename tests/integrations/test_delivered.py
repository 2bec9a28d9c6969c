"""What is checked is what is seen: pictures of other kinds are refused, on every way out of a pipeline."""

import copy
import pickle

import numpy as np
import PIL.Image
import pytest
import torch

import amg
from amg.protection.protect import to_tensor


def grey(mode: str = "L") -> PIL.Image.Image:
    return PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)


def test_opaque_pictures_are_taken_as_they_are_seen():
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    found = to_tensor([PIL.Image.fromarray(array), grey()])
    assert torch.equal(found[0], torch.from_numpy(array).permute(2, 0, 1).float() / 255)
    assert torch.equal(found[1, 2] * 255, torch.arange(256.0).view(16, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I", "F", "LAB", "CMYK", "P", "1"])
def test_pictures_that_are_seen_otherwise_are_refused(mode):
    """Alpha dropped, values clipped, colours read in another space: a copy that the check would not know."""
    picture = grey("RGB").convert(mode) if mode != "LAB" else PIL.Image.new("LAB", (16, 16))
    with pytest.raises(ValueError, match=f"mode RGB or L to be checked, got mode {mode}"):
        to_tensor([picture])


def test_hidden_colours_and_turned_pictures_are_refused():
    keyed, turned = grey("RGB"), grey("RGB")
    keyed.info["transparency"] = (0, 0, 0)
    turned.getexif()[0x0112] = 6
    for picture in (keyed, turned):
        with pytest.raises(ValueError, match="opaque, upright"):
            to_tensor([picture])


@pytest.mark.parametrize(
    "images", [None, [], ["a.png"], {"a": 1}, np.zeros((2, 16, 16)), np.zeros((2, 16, 16, 4)), [np.zeros(3)]]
)
def test_what_is_no_picture_is_refused_by_name(images):
    with pytest.raises((TypeError, ValueError), match="`images` must"):
        to_tensor(images)


def test_pictures_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="of one size"):
        to_tensor([grey(), grey().resize((8, 8))])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 8, 8), np.float32),
        None,
        torch.zeros(1, 3, 8, 8),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 8, 8, 3),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 0),
        torch.zeros(2, 3, 8, 8, device="meta"),
        torch.zeros(2, 3, 8, 8).to_sparse(),
        torch.zeros(2, 3, 8, 8, dtype=torch.complex64),
    ],
    ids=str,
)
def test_own_loops_may_hand_over_pictures_only(pixel_index, images):
    diffusers = pytest.importorskip("diffusers")
    scheduler = amg.AMGScheduler(diffusers.DDIMScheduler(), pixel_index)
    scheduler.set_timesteps(1)
    sample = torch.randn(2, 3, 8, 8)
    scheduler.step(sample * 0.1, scheduler.timesteps[0], sample)
    with pytest.raises((TypeError, ValueError), match=r"`images` must be"):
        scheduler.verdicts(images)


def test_an_index_is_copied_and_pickled_with_its_rows_shared(embedding_index):
    again = copy.deepcopy(embedding_index)
    assert again.rows.data_ptr() == embedding_index.rows.data_ptr() and again.seal is embedding_index.seal
    picture = torch.rand(2, 3, 16, 16)
    opened = pickle.loads(pickle.dumps(embedding_index))
    assert torch.equal(opened.closest(picture).similarity, embedding_index.closest(picture).similarity)


def test_an_index_that_changed_is_refused_before_any_step(sd, embedder, tmp_path):
    images, captions = torch.rand(60, 3, 16, 16), [f"caption {i}" for i in range(60)]
    index = amg.Index.build(images, captions, embedder, tmp_path / "i", progress=False)
    amg.protect(sd, index)
    sampler = amg.Sampler(amg.unprotect(copy.copy(sd)), index)
    (tmp_path / "i" / "rows.f16").write_bytes(b"")  # mapped pages beyond the end would end the process
    for call in (lambda: sd("a", num_inference_steps=2), lambda: sampler("a", num_inference_steps=2)):
        with pytest.raises(amg.index.IndexCorrupt, match=r"rows\.f16"):
            call()
