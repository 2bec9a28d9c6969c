"""Lazy search along real trajectories of a bundled model: the same pictures, fewer full searches."""

import dataclasses

import pytest
import torch

import amg
from amg import zoo
from amg.index import lazy
from amg.zoo.photos import training_set


@pytest.mark.slow
def test_lazy_search_changes_nothing_on_a_bundled_model(tmp_path, monkeypatch):
    pipe, index = zoo.load("photos-sd"), zoo.build_index("photos-sd", tmp_path / "photos-sd.amg")
    prompts = [training_set(64).captions[0], "a photo of a temple, top left"]
    searches, proved = [], []
    plain = lazy.nearest_lazily

    def counted(searcher, queries, kept, **more):
        before = sum(own.skipped for own in kept)
        found = plain(searcher, queries, kept, **more)
        searches.append((len(kept), sum(own.skipped for own in kept) - before))
        proved.append(sum(own.closed for own in kept))
        return found

    monkeypatch.setattr("amg.index.index.nearest_lazily", counted)
    outcomes = []
    for lazily in (True, False):
        config = amg.AMGConfig.preset("main", check_at=(), lazy_search=lazily, on_memorized="flag")
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        sampler = amg.Sampler(pipe, index, config)
        outcomes.append(
            sampler(prompts, generator=generators, num_inference_steps=12, output_type="pt", progress=False)
        )
        assert bool(searches) == lazily
        total, skipped = (sum(column) for column in zip(*searches, strict=True)) if searches else (0, 0)
        assert 0 < skipped < total or not lazily
        searches.clear()
    assert torch.equal(outcomes[0].images, outcomes[1].images)
    assert any(proved)
    for own, other in zip(outcomes[0].amg, outcomes[1].amg, strict=True):
        assert dataclasses.replace(own, trace=()) == dataclasses.replace(other, trace=())
        for step, full in zip(own.trace, other.trace, strict=True):
            assert step == full or step.similarity <= full.similarity <= step.threshold
