"""A served index guides and checks as the same index in one process does."""

import pytest
import torch

import amg

from ...integrations.conftest import ddpm, embedder, embedding_index, pixel_index, sd  # noqa: F401
from .here import sharded

LAYERS = {"num_inference_steps": 9, "output_type": "pt"}


def config(metric):
    least = -0.5 if metric == "cosine" else -2.0  # which nearly everything reaches: steps are guided
    near = {"threshold": least, "lambda_min": least, "lambda_max": least}
    return amg.AMGConfig.preset("main", on_memorized="flag", guard_threshold=None, max_rewinds=1, **near)


@pytest.mark.parametrize("way", ["sampler", "protect"])
@pytest.mark.parametrize("metric", ["cosine", "nl2"])
def test_the_same_pictures_and_verdicts(metric, way, request):
    pipe = request.getfixturevalue("sd" if metric == "cosine" else "ddpm")
    index = request.getfixturevalue("embedding_index" if metric == "cosine" else "pixel_index")
    asked = (["a cat", "abc"],) if metric == "cosine" else ()
    options = LAYERS if metric == "cosine" else {**LAYERS, "batch_size": 2}

    def drawn(searched):
        options["generator"] = torch.Generator().manual_seed(4)
        if way == "protect":
            amg.protect(pipe, searched, config(metric))
            try:
                found = pipe(*asked, **options)
            finally:
                amg.unprotect(pipe)
            return torch.as_tensor(found.images), found.amg
        with amg.Sampler(pipe, searched, config(metric)) as sampler:
            found = sampler(*asked, progress=False, **options)
        return torch.as_tensor(found.images), found.amg

    images, verdicts = drawn(index)
    served_images, served_verdicts = drawn(sharded(index, 3))
    assert torch.equal(served_images, images) and served_verdicts == verdicts
    assert all(verdict.trace for verdict in verdicts)
