"""Searching for rows of NaN, infinities or zeros: NaN for them alone, and no value read."""

import math

import pytest
import torch

from amg.index import Index

from .. import reads

BAD = [1, 3]
OTHERS = [0, 2, 4]


def near_duplicates(pictures):
    """Every picture, and some of them again with one pixel changed: folded, so that there are members."""
    changed = pictures[:9].clone()
    changed[:, 0, 0, 0] ^= 4
    return torch.cat([pictures, changed])


@pytest.fixture(params=["cosine", "nl2"])
def index(request, tmp_path, pictures, embedder):
    options = {"embedder": embedder} if request.param == "cosine" else {}
    found = Index.build(near_duplicates(pictures), path=tmp_path / "i", progress=False, **options)
    assert found.members is not None and found.guard is not None and found.count == 80
    assert (found.codes is not None) == (request.param == "cosine")
    return found


def shown(pictures):
    """[5, 3, 8, 8]: folded pictures, and between pictures."""
    some = near_duplicates(pictures)[[80, 81, 3, 82, 5]].float() / 255
    some[2] = (some[2] + some[4]) / 2
    return some


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_the_rows_of_others_are_what_they_are_without(index, pictures, bad):
    vectors = index.encode(shown(pictures))
    expected = index.nearest(vectors)
    spoiled = vectors.clone()
    spoiled[BAD] = bad
    if bad == 0 and index.metric == "nl2":
        spoiled[BAD, 0] = -math.inf  # zeros are black, a picture like others
    found = index.nearest(spoiled)
    assert torch.equal(found.similarity[OTHERS], expected.similarity[OTHERS])
    assert torch.equal(found.row[OTHERS], expected.row[OTHERS])
    assert found.similarity[BAD].isnan().all() and found.row[BAD].tolist() == [0, 0]
    if index.metric == "nl2":
        for name in ("value", "distance", "denominator"):
            assert getattr(found.extras, name)[BAD].isnan().all()
            assert torch.equal(getattr(found.extras, name)[OTHERS], getattr(expected.extras, name)[OTHERS])
        assert found.extras.row.tolist() == found.row.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_final_check_s_search_too(index, pictures, bad):
    images = shown(pictures)
    expected = index.closest(images)
    images[BAD, 2, 1, 1] = bad
    found = index.closest(images)
    for ours, theirs in ((found, expected), (found.guard, expected.guard)):
        assert torch.equal(ours.similarity[OTHERS], theirs.similarity[OTHERS])
        assert torch.equal(ours.row[OTHERS], theirs.row[OTHERS])
        assert ours.similarity[BAD].isnan().all() and ours.row[BAD].tolist() == [0, 0]


def test_encoding_is_embedding_without_the_check(index, pictures):
    images = shown(pictures)
    assert torch.equal(index.encode(images), index.embed(images))
    if index.metric == "cosine":
        images[BAD] = 0.5  # the toy embeds grey as zeros
        assert index.encode(images).isnan().all(1).nonzero().flatten().tolist() == BAD
        with pytest.raises(ValueError, match=r"'toy' returned zero or non-finite vectors at \[1, 3\] of 5"):
            index.embed(images)


def test_no_value_is_read(index, pictures, monkeypatch):
    images = shown(pictures)
    images[BAD] = math.nan
    index.seal.check()  # reads the files once
    found = reads.watch(monkeypatch)
    index.nearest(index.encode(images))
    index.closest(images)
    index.guard.nearest(images)
    assert found == []


def test_an_index_on_a_device_whose_values_nobody_can_read(index, pictures):
    moved, images = index.to("meta"), shown(pictures)
    parts = [moved.rows, moved.guard.sketches, moved.guard.rows, moved.members.vectors, moved.members.rows]
    assert all(part.is_meta for part in (*parts, *(moved.codes or ())))
    here, there = index.nearest(index.encode(images)), moved.nearest(moved.encode(images.to("meta")))
    closest = (index.closest(images), moved.closest(images.to("meta")))
    alike = (index.guard.nearest(images), moved.guard.nearest(images.to("meta")))
    for ours, theirs in ((here, there), closest, (closest[0].guard, closest[1].guard), alike):
        for name in ("similarity", "row"):
            own, other = getattr(ours, name), getattr(theirs, name)
            assert other.is_meta and (own.shape, own.dtype) == (other.shape, other.dtype)
    assert (here.extras is None) == (there.extras is None)


def test_what_is_asked_by_hand_is_still_checked(index, pictures):
    vectors = index.encode(shown(pictures))
    vectors[BAD, 0] = math.nan
    with pytest.raises(ValueError, match=r"\[1, 3\] of 5"):
        index.search(vectors)
    with pytest.raises(ValueError, match=r"\[1, 3\] of 5"):
        index.search(vectors, 2)
