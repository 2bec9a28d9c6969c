"""The demo measures against the index of its own training set, whatever lies in its folder."""

from __future__ import annotations

import pytest
import torch

import amg

pytest.importorskip("diffusers")
pytest.importorskip("skimage")


@pytest.mark.parametrize(("name", "metric"), [("photos-ddpm", None), ("photos-ddpm", "cosine")])
def test_an_index_from_before_is_taken_and_another_refused(tmp_path, name, metric):
    from amg.commands.demo import open_index
    from amg.embed.photos import load_photos
    from amg.zoo.photos import training_set

    made = open_index(name, tmp_path / "a.amg", metric)
    again = open_index(name, tmp_path / "a.amg", metric)
    assert torch.equal(again.rows, made.rows)
    data = training_set(32)
    embedder = load_photos() if metric == "cosine" else None
    pictures = 255 - data.images
    copies = data.counts.tolist()
    assert made.manifest.images == sum(copies) > len(copies) >= made.count
    others = [
        ("edited.amg", pictures, data.ids),
        ("fewer.amg", data.images, data.ids),
        ("named.amg", data.images, [f"x{number}" for number in range(len(data.ids))]),
    ]
    for path, given, ids in others if metric is None else others[:1]:
        amg.Index.build(given, None, embedder, tmp_path / path, ids=ids, progress=False)
        with pytest.raises(ValueError, match=f"{path} must be the index of {name}'s training set"):
            open_index(name, tmp_path / path, metric)
