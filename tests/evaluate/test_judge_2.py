"""`photos-judge-2` knows every whole photograph, whatever its colours, size or side, and no crop of it."""

import pytest
import torch

pytest.importorskip("skimage")
from amg.zoo.judge_2 import SIZE, load_judge_2
from amg.zoo.photos import training_set


@pytest.fixture(scope="module")
def data():
    return training_set(64)


def called_copies(images):
    return load_judge_2().copy_probability(images) > 0.5


def test_whole_photographs_are_recognised_changed_or_not(data):
    whole = data.images[data.counts > 1].float() / 255
    assert len(whole) == 16
    for changed in (
        whole,
        whole.flip(-1),
        whole.mean(1, keepdim=True).expand(-1, 3, -1, -1),
        0.2 + 0.6 * whole,
    ):
        assert int(called_copies(changed).sum()) == 16


def test_crops_are_not(data):
    crops = data.images[data.counts == 1].float() / 255
    assert len(crops) == 1600 and float(called_copies(crops).float().mean()) < 0.01


def test_it_sees_no_more_than_a_patch_at_a_time():
    """A change in one corner leaves the votes of the patches that do not reach it as they were."""
    judge, images = load_judge_2(), torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    votes = []
    for image in (images, images.clone().index_fill_(3, torch.arange(4), 0.0)):
        place = judge.get_buffer("place").expand(1, -1, -1, -1)
        with torch.no_grad():
            votes.append(judge.patches(torch.cat([image * 4 - 2, place], 1)))
    changed = (votes[0] != votes[1]).any(1)[0].any(0)
    assert changed[:2].all() and not changed[2:].any()
