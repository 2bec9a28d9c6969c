"""load(), wrap() and check(): what is accepted and how the rest is refused."""

import dataclasses
import hashlib
import sys

import pytest
import torch

import amg.embed.open_clip as open_clip_module
from amg.embed import Embedder, check, load, wrap

SHA = hashlib.sha256(b"weights").hexdigest()


def average(images):
    return images.mean((2, 3))


def embedder(function=average, **changes):
    attributes = {"name": "mean", "dimension": 3, "sha": SHA, "preprocessing": "none"} | changes
    return wrap(function, **attributes)


def test_a_function_becomes_an_embedder():
    mine = embedder()
    check(mine)
    assert isinstance(mine, Embedder)
    images = torch.rand(2, 3, 5, 6)
    assert torch.equal(mine(images), average(images))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.name = "other"


def test_any_callable_with_the_attributes_passes():
    class Mine:
        name, dimension, sha, preprocessing = "mine", 3, SHA, "none"

        def __call__(self, images):
            return images.amax((2, 3))

    check(Mine())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "`embedder.name` must be one non-empty line, got ''"),
        ({"name": 3}, "`embedder.name` must be one non-empty line, got 3"),
        ({"preprocessing": "a\nb"}, "`embedder.preprocessing` must be one non-empty line"),
        ({"dimension": 0}, "`embedder.dimension` must be a positive int, got 0"),
        ({"dimension": True}, "`embedder.dimension` must be a positive int, got True"),
        ({"dimension": 3.0}, "`embedder.dimension` must be a positive int, got 3.0"),
        ({"sha": "abc"}, "`embedder.sha` must be 64 lower-case hex digits .* got 'abc'"),
        ({"sha": SHA.upper()}, "`embedder.sha` must be 64 lower-case hex digits"),
    ],
)
def test_attributes_that_no_manifest_could_hold_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        embedder(**changes)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda images: average(images)[:, :2],
            ValueError,
            r"must return \[2, 3\] float32 on cpu, got \[2, 2\]",
        ),
        (lambda images: average(images).double(), ValueError, r"got \[2, 3\] torch\.float64"),
        (lambda images: average(images).detach(), ValueError, "must be differentiable"),
        (lambda images: average(images) / 0, ValueError, "must return finite values"),
        (lambda images: average(images).tolist(), TypeError, "must return a torch.Tensor, got list"),
    ],
)
def test_check_runs_the_function(function, error, message):
    with pytest.raises(error, match=message):
        check(embedder(function))


def test_check_works_where_gradients_are_off():
    with torch.no_grad():
        check(embedder())


@pytest.mark.parametrize(
    ("thing", "message"), [("sscd", "must be callable, got str"), (average, "must have the attribute `name`")]
)
def test_check_refuses_what_is_no_embedder(thing, message):
    with pytest.raises(TypeError, match=message):
        check(thing)


@pytest.mark.parametrize(
    "spec", ["", "clip", "sscd", "sscd:", "photos:x", "open_clip:ViT-B-32", "open_clip::p", "SSCD:a"]
)
def test_unknown_specs_are_refused_with_the_known_ones(spec):
    with pytest.raises(ValueError, match=r"`spec` must be one of 'photos', 'sscd:PATH.safetensors', .*, got"):
        load(spec)


@pytest.mark.parametrize("spec", ["sscd:/absent/w.safetensors", "open_clip:ViT-B-32:/absent/w.pt"])
def test_missing_files_are_named(spec):
    with pytest.raises(FileNotFoundError, match=r"/absent/w"):
        load(spec)


def test_a_missing_open_clip_names_the_extra(monkeypatch, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'amg-sampler\[clip\]'"):
        load(f"open_clip:ViT-B-32:{tmp_path / 'w.pt'}")
    assert open_clip_module.MODES.keys() == {"shortest", "longest", "squash"}


def test_the_bundled_embedder():
    embedder = load("photos")
    check(embedder)
    images = torch.rand(2, 3, 64, 64)
    assert embedder(images).shape == (2, embedder.dimension) == (2, 512)
