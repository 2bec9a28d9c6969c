"""The final check is over every picture indexed: those that were folded into another's row as well."""

import math

import pytest
import torch

from amg.index import Index


class Angles:
    """The first pixel's red is an angle in hundredths of a radian."""

    name, dimension, sha = "angles", 2, "b" * 64

    def __call__(self, images):
        angle = (images[:, 0, 0, 0] * 255).round() / 100
        return torch.stack([angle.cos(), angle.sin()], 1)


def picture(angle: int) -> torch.Tensor:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[0, 0, 0] = angle
    return image


def build(images, path, **options):
    return Index.build(images, path=path, progress=False, **options)


def test_a_copy_of_a_folded_picture_is_found(tmp_path):
    """At .19 rad a picture folds (cosine .982); a query .9 rad from it is 1.09 rad from its row."""
    query = picture(109)[None].float() / 255
    near = build(torch.stack([picture(0), picture(19)]), tmp_path / "j", embedder=Angles(), dtype="float32")
    assert near.count == 1 and near.members.rows.tolist() == [0]
    assert near.search(query).similarity.item() == pytest.approx(math.cos(1.09), abs=1e-5)
    assert near.closest(query).similarity.item() == pytest.approx(math.cos(0.9), abs=1e-5)
    assert near.closest(query).row.item() == 0


def test_only_pictures_that_differ_from_their_row_are_kept(tmp_path):
    images = torch.stack([picture(0), picture(0), picture(19), picture(19), picture(200)])
    index = build(images, tmp_path / "i", embedder=Angles(), dtype="float32")
    assert index.counts.tolist() == [4, 1] and index.members.rows.tolist() == [0]
    assert len(index.guard.rows) == 3 and index.guard.rows.tolist() == [0, 1, 0]


def test_pictures_that_an_embedder_cannot_tell_apart_keep_their_sketches(tmp_path):
    """Equal vectors, other pictures: the guard knows them."""
    one, other = picture(7), picture(7)
    one[:, 2:], other[:, :, 2:] = 200, 200
    index = build(torch.stack([one, other]), tmp_path / "i", embedder=Angles(), dtype="float32")
    assert index.count == 1 and len(index.guard.rows) == 2
    found = index.closest(other[None].float() / 255).guard
    assert found.similarity.item() == pytest.approx(1, abs=1e-3) and found.row.item() == 0


def test_pixels_over_the_denominator_of_the_rows(tmp_path):
    """nL2: the nearest is any picture, the mean is over distinct ones, or copies would hide a copy."""
    pictures = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(2))
    near = pictures[5].clone()
    near[0, 0, :4] = (near[0, 0, :4] + 40) % 256
    rows = build(pictures.to(torch.uint8), tmp_path / "rows")
    both = build(torch.cat([pictures, near[None]]).to(torch.uint8), tmp_path / "both", near_duplicate=0.2)
    assert both.count == 60 and both.members.rows.tolist() == [5]
    query = (near.float() / 255)[None]
    assert both.closest(query).similarity.item() == 0 and both.closest(query).row.item() == 5
    shifted = (query + 0.01).clamp(0, 1)
    double, truth = shifted.double().flatten(), near.double().flatten() / 255
    distances = ((pictures.flatten(1).double() / 255 - double) ** 2).mean(1).sqrt()
    expected = -((truth - double) ** 2).mean().sqrt() / (0.5 * distances.sort().values[:50].mean())
    assert both.closest(shifted).similarity.item() == pytest.approx(expected.item(), rel=1e-5)
    assert both.closest(shifted).similarity.item() > rows.closest(shifted).similarity.item()


def test_an_index_without_folded_pictures_has_no_members(tmp_path, pictures):
    index = build(pictures, tmp_path / "i")
    assert index.members is None and not [*(tmp_path / "i").glob("members*")]
    whole = pictures.float() / 255
    assert torch.equal(index.closest(whole).similarity, index.nearest(index.embed(whole)).similarity)


@pytest.mark.parametrize("parts", [1, 4])
def test_near_duplicates_do_not_hide_a_copy(tmp_path, parts):
    """nL2 of a copy is the same with 0 and with 60 near-duplicates of its picture in the index, and with the
    pictures in one index and in four that were merged; unfolded they would be all of the 50 nearest."""
    from amg.index import merge

    generator = torch.Generator().manual_seed(3)
    small = torch.rand(100, 3, 4, 4, generator=generator)
    distinct = torch.nn.functional.interpolate(small, (16, 16), mode="bilinear")
    noise = 0.012 * torch.randn(60, 3, 16, 16, generator=generator)
    near = (distinct[:1] + noise).clamp(0, 1)
    copy = (distinct[:1] + 0.012 * torch.randn(1, 3, 16, 16, generator=generator)).clamp(0, 1)

    def value(pictures, name, **options):
        ids = [str(number) for number in range(len(pictures))]
        for part in range(parts):
            some = slice(len(pictures) * part // parts, len(pictures) * (part + 1) // parts)
            build(pictures[some], tmp_path / f"{name}{part}", ids=ids[some], **options)
        if parts > 1:
            merge([tmp_path / f"{name}{part}" for part in range(parts)], tmp_path / name, progress=False)
        index = Index.open(tmp_path / (name if parts > 1 else f"{name}0"))
        return -index.closest(copy).similarity.item(), index

    alone, _ = value(distinct, "alone")
    among, index = value(torch.cat([distinct, near]), "among")
    assert index.count == 100 and alone < 0.3
    assert among <= alone and among == pytest.approx(alone, rel=0.3)  # one of the 60 may be nearer
    hidden, _ = value(torch.cat([distinct, near]), "unfolded", near_duplicate=False)
    assert hidden > 1.4
