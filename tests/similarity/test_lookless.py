"""Measuring reads no value on the host, and one sample's NaN is its own."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import amg
from amg.similarity import Measured, Similarity
from amg.similarity.cosine import CosineSimilarity
from amg.similarity.nl2 import NL2Similarity

from .. import reads, toy

BAD, OTHERS = 2, [0, 1, 3, 4]
WAYS = ["cosine", "nl2", "nl2 of latents"]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, amg.Index]:
    path = Path(tmp_path_factory.mktemp("indexes"))
    return {metric: toy.build(metric, path / metric) for metric in ("cosine", "nl2")}


def clamped(x0_hat: Tensor) -> Tensor:
    """A decoder that would show an infinity as white."""
    return toy.decode(x0_hat).clamp(0, 1)


def similarity_of(
    indexes: dict[str, amg.Index], way: str, decode: Callable[[Tensor], Tensor] = clamped
) -> Similarity:
    metric, *of_latents = way.split(" ", 1)
    if metric == "cosine":
        return CosineSimilarity(indexes[metric], decode)
    return NL2Similarity(indexes[metric], decode, pixels=not of_latents)


def samples() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(8)) * 1.8 - 0.9


def parts_of(similarity: Similarity, x0_hat: Tensor, threshold: float | Tensor) -> dict[str, Tensor]:
    """Everything a similarity says of x0_hat."""
    measured, both = similarity.measure(x0_hat), similarity.measure_with_gradient(x0_hat)
    assert measured.images is not None and both.images is not None
    return {
        "similarity": measured.similarity,
        "images": measured.images,
        "gradient": similarity.gradient(x0_hat, measured),
        "shift": similarity.shift(x0_hat, measured, threshold),
        "both: similarity": both.similarity,
        "both: images": both.images,
        "both: gradient": similarity.gradient(x0_hat, both),
        "both: shift": similarity.shift(x0_hat, both, threshold),
        **{name: value for name, value in measured.extras.items()},
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_is_nan_and_disturbs_nobody(indexes: dict, way: str, bad: float) -> None:
    similarity, x0_hat = similarity_of(indexes, way), samples()
    expected = parts_of(similarity, x0_hat, -2.0)
    x0_hat[BAD, 1, 3, 3] = bad
    for name, found in parts_of(similarity, x0_hat, -2.0).items():
        assert torch.equal(found[OTHERS], expected[name][OTHERS]), name
        assert bool(found[BAD].isnan().all()), name
        assert bool(found[OTHERS].isfinite().all()) and float(found[OTHERS].abs().max()) > 0, name
    assert int(similarity.measure(x0_hat).row[BAD]) == 0
    for row in OTHERS:
        alone = parts_of(similarity, x0_hat[[row]], -2.0)
        for name, value in alone.items():
            torch.testing.assert_close(value[0], expected[name][row], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_that_the_decoder_spoils_is_nan(indexes: dict, way: str) -> None:
    def decode(x0_hat: Tensor) -> Tensor:
        return toy.decode(x0_hat) + torch.where(x0_hat > 0.95, math.inf, 0.0)

    x0_hat = samples()
    x0_hat[BAD, 0, 0, 0] = 0.96
    measured = similarity_of(indexes, way, decode).measure(x0_hat)
    assert measured.similarity.isnan().tolist() == [row == BAD for row in range(5)]


def test_a_picture_without_a_direction_is_nan(indexes: dict) -> None:
    """The toy embeds a grey picture as zeros."""
    similarity, x0_hat = similarity_of(indexes, "cosine"), samples()
    x0_hat[BAD] = 0
    for name, found in parts_of(similarity, x0_hat, -2.0).items():
        if "images" not in name:
            assert bool(found[BAD].isnan().all()) and bool(found[OTHERS].isfinite().all()), name


def test_a_gradient_that_overflows_is_nan_for_its_sample_alone(indexes: dict) -> None:
    def decode(x0_hat: Tensor) -> Tensor:
        return toy.decode(x0_hat) + torch.where(x0_hat > 0.95, 1e-30, 0.0) * torch.sqrt(0.96 - x0_hat)

    x0_hat = samples()
    x0_hat[BAD, 0, 0, 0] = 0.96  # the root's slope there is infinite
    similarity = similarity_of(indexes, "cosine", decode)
    measured = similarity.measure(x0_hat)
    assert bool(measured.similarity.isfinite().all())
    for found in (similarity.gradient(x0_hat, measured), similarity.shift(x0_hat, measured, -1.0)):
        assert bool(found[BAD].isnan().all()) and bool(found[OTHERS].isfinite().all())


@pytest.mark.parametrize("way", WAYS)
def test_each_sample_may_have_its_own_threshold(indexes: dict, way: str) -> None:
    similarity, x0_hat = similarity_of(indexes, way), samples()
    measured = similarity.measure(x0_hat)
    thresholds = measured.similarity - torch.tensor([0.01, -0.5, 0.03, 0.2, 0.1])
    found = similarity.shift(x0_hat, measured, thresholds)
    for row, threshold in enumerate(thresholds.tolist()):
        assert torch.equal(found[row], similarity.shift(x0_hat, measured, threshold)[row])
    assert [float(one.abs().max()) > 0 for one in found] == [True, False, True, True, True]


@pytest.mark.parametrize("way", WAYS)
def test_no_value_is_read(indexes: dict, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    similarity, x0_hat = similarity_of(indexes, way), samples()
    x0_hat[BAD, 0, 0, 0] = math.nan
    found = reads.watch(monkeypatch)
    parts_of(similarity, x0_hat, torch.full((5,), 0.1))
    assert found == []


def tiny_decoder() -> torch.nn.Module:
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Sigmoid())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_everything_runs_on_a_device_whose_values_nobody_can_read(
    indexes: dict, way: str, mode: Callable
) -> None:
    decoder = tiny_decoder().requires_grad_(False)
    moved = {metric: index.to("meta") for metric, index in indexes.items()}
    expected = parts_of(similarity_of(indexes, way, decoder), samples(), torch.full((5,), 0.1))
    with mode():
        x0_hat, threshold = samples().to("meta"), torch.full((5,), 0.1, device="meta")
        found = parts_of(similarity_of(moved, way, decoder.to("meta")), x0_hat, threshold)
    for name, value in found.items():
        assert value.is_meta, name
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name


@pytest.mark.parametrize("spec", ["network", "photos"])
def test_networks_embed_on_that_device(spec: str) -> None:
    if spec == "photos":
        embedder = amg.embed.load("photos").to("meta")
    else:
        preprocess = amg.embed.network.Preprocess(
            (8, 8), mode="short_crop", interpolation="bicubic", mean=[0.5] * 3, std=[0.2] * 3
        )
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
        embedder = amg.embed.network.NetworkEmbedder(preprocess, net, name="n", dimension=16, sha="0" * 64)
    found = amg.embed.precision.embedded(embedder, torch.rand(2, 3, 20, 30, device="meta"))
    assert found.is_meta and found.shape == (2, embedder.dimension)


def test_what_was_measured_can_be_cut(indexes: dict) -> None:
    similarity, x0_hat = similarity_of(indexes, "cosine"), samples()
    both = similarity.measure_with_gradient(x0_hat)
    cut: Measured = both.take(torch.tensor([3, 0]))
    assert cut.images is not None and both.images is not None
    assert torch.equal(cut.images, both.images[[3, 0]])
    assert torch.equal(both.images, clamped(x0_hat))
