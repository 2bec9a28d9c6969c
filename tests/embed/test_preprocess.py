"""Preprocessing in plain torch against PIL, and the arithmetic of sizes, crops and padding."""

import numpy as np
import pytest
import torch
from PIL import Image

from amg.embed.network import Preprocess, check_images, crop_or_pad, resize, short_side_size
from amg.embed.sscd import sscd_preprocess

IDENTITY = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def picture(height, width, low=0, high=255, seed=0):
    """A PIL picture with smooth shading, hard edges and noise, in the range [low, high]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    shading = 127 + 100 * np.sin(rows / 17)[..., None] * np.cos(columns[..., None] / (11, 23, 31))
    shading[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 128)
    noisy = shading + rng.normal(0, 12, (height, width, 3))
    scaled = low + noisy.clip(0, 255) * (high - low) / 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def tensor(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]


@pytest.mark.parametrize("size", [(400, 333), (300, 301), (611, 288), (64, 64), (50, 90)])
def test_short_side_288_is_pils_bilinear_resize(size):
    height, width = size
    long = int(288 * max(size) / min(size))
    target = (288, long) if height <= width else (long, 288)
    image = picture(*size)
    published = tensor(image.resize(target[::-1], Image.Resampling.BILINEAR))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ours = sscd_preprocess()(tensor(image))
    assert ours.shape == (1, 3, *target)
    back = ours * std.view(3, 1, 1) + mean.view(3, 1, 1)
    difference = (back - published).abs() * 255
    assert difference.max() <= 1.01  # PIL rounds to 8 bits after each of its two passes
    assert difference.mean() < 0.35


@pytest.mark.parametrize(("interpolation", "filter_"), [("bilinear", "BILINEAR"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("target", [(320, 320), (96, 48), (200, 500)])
def test_resize_is_pils_with_the_aspect_ratio_lost(interpolation, filter_, target):
    image = picture(230, 310, 50, 205)  # bicubic overshoot stays in range: PIL clips it after each pass
    published = tensor(image.resize(target[::-1], Image.Resampling[filter_]))
    difference = (resize(tensor(image), target, interpolation) - published).abs() * 255
    assert difference.max() <= 1.3  # bicubic weights have both signs: a little more rounding
    assert difference.mean() < 0.4


def test_bicubic_overshoot_stays_in_range():
    step = torch.zeros(1, 3, 32, 32)
    step[..., 16:] = 1
    enlarged = resize(step, (96, 96), "bicubic")
    assert enlarged.min() == 0 and enlarged.max() == 1


def test_normalisation_is_minus_mean_over_std():
    images = torch.rand(2, 3, 288, 288, generator=torch.Generator().manual_seed(1))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    want = (images.double().numpy() - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(sscd_preprocess()(images).numpy(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "want"), [(288, 288, (288, 288)), (333, 400, (288, 345)), (1000, 17, (16941, 288))]
)
def test_short_side_size_rounds_down(height, width, want):
    assert short_side_size(height, width, 288) == want


def test_crop_takes_the_centre_and_padding_fills_around_it():
    images = torch.arange(5 * 8, dtype=torch.float32).view(1, 1, 5, 8)
    assert torch.equal(crop_or_pad(images, (3, 4), 0), images[..., 1:4, 2:6])
    padded = crop_or_pad(images, (8, 4), -1)
    assert torch.equal(padded[..., 1:6, :], images[..., 2:6])
    assert (padded[..., :1, :] == -1).all() and (padded[..., 6:, :] == -1).all()


@pytest.mark.parametrize("mode", ["square", "short_crop", "long_pad"])
@pytest.mark.parametrize("size", [(30, 70), (70, 30), (48, 48), (200, 150)])
def test_output_size_is_the_size_asked_for(mode, size):
    preprocess = Preprocess((48, 48), mode=mode, interpolation="bicubic", **IDENTITY)
    assert preprocess(torch.rand(1, 3, *size)).shape == (1, 3, 48, 48)


def test_the_manifest_line_states_the_recipe():
    want = "short side 288; bilinear, antialiased; mean 0.485 0.456 0.406; std 0.229 0.224 0.225"
    assert str(sscd_preprocess()) == want
    assert str(sscd_preprocess("square320")) == want.replace("short side 288", "resized to 320x320")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "stretch"}, "`mode` must be one of short, square, short_crop, long_pad, got 'stretch'"),
        ({"interpolation": "nearest"}, "`interpolation` must be 'bilinear' or 'bicubic', got 'nearest'"),
        ({"size": (288, 320)}, "`size` must be square for mode 'short'"),
    ],
)
def test_unknown_settings_are_refused(changes, message):
    settings = {"size": (288, 288), "mode": "short", "interpolation": "bilinear", **IDENTITY} | changes
    with pytest.raises(ValueError, match=message):
        Preprocess(settings.pop("size"), **settings)


def test_unpublished_resize_is_refused():
    with pytest.raises(ValueError, match="`resize` must be one of short288, square320, got 'square224'"):
        sscd_preprocess("square224")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.float16),
        torch.zeros(0, 3, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match=r"`images` must be a non-empty \[B, 3, H, W\] float32, got"):
        check_images(images)


def test_something_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"`images` must be a torch\.Tensor, got ndarray"):
        check_images(np.zeros((1, 3, 8, 8), np.float32))
