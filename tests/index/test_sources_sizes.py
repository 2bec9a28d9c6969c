"""Large pictures and long ones: memory is bounded by bytes, not by the number of pictures."""

import io
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from amg.index import Index
from amg.index.decode import REDUCED, decode_image
from amg.index.encode import MOST_SQUARES, resize_images
from amg.index.guard import sketch
from amg.index.shards import SQUEEZED

pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


def smooth(height: int, width: int, seed: int = 0):
    """A picture with structure at every scale, like a photograph's."""
    values = numpy.zeros((height, width, 3))
    random = numpy.random.default_rng(seed)
    for side in (4, 16, 64):
        coarse = PIL.fromarray(random.integers(0, 256, (side, side, 3), dtype=numpy.uint8))
        values += numpy.asarray(coarse.resize((width, height), PIL.Resampling.BICUBIC)) / 3
    return PIL.fromarray(values.astype(numpy.uint8))


def jpeg(picture) -> bytes:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=95)
    return content.getvalue()


BUILD = """
import resource, sys, torch
torch.set_num_threads(1)
from amg.index import Index

class Embedder:
    name, dimension, sha = "toy", 12, "a" * 64
    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(1) - 0.3

Embedder()(torch.rand(1, 3, 2000, 3000))  # the embedder's own
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = Index.build(sys.argv[1], None, Embedder(), sys.argv[2], progress=False)
assert index.manifest.images == int(sys.argv[3]), index.manifest
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "parquet", "list"])
def test_photographs_of_six_megapixels_need_less_than_a_gigabyte(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    contents = [jpeg(smooth(2000, 3000)) + bytes([at]) for at in range(8)]
    root = tmp_path / "root"
    root.mkdir()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"image": contents}), root / "t.parquet")
    else:
        for at, content in enumerate(contents):
            (root / f"{at}.jpg").write_bytes(content)
    (tmp_path / "l.csv").write_text("path\n" + "".join(f"root/{at}.jpg\n" for at in range(8)))
    source = tmp_path / "l.csv" if kind == "list" else root
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(source), str(tmp_path / "i"), "8"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(run.stdout) < 1 << 20, "KiB"


class Recording:
    """An embedder that keeps what it was given."""

    name, dimension, sha = "recording", 12, "a" * 64

    def __init__(self) -> None:
        self.given: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.given.append(tuple(images.shape))
        return torch.nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(1) - 0.3


def test_batches_are_bounded_by_bytes(tmp_path, monkeypatch, make):
    monkeypatch.setattr("amg.index.shards.BATCH_BYTES", 4 * 3 * 100 * 100 * 5)
    random = numpy.random.default_rng(0)
    images = [PIL.fromarray(random.integers(0, 256, (100, 100, 3), dtype=numpy.uint8)) for _ in range(12)]
    images.append(PIL.fromarray(random.integers(0, 256, (400, 400, 3), dtype=numpy.uint8)))
    embedder = Recording()
    index = make(images, None, embedder, near_duplicate=False, dtype="float32")
    assert embedder.given == [(5, 3, 100, 100), (5, 3, 100, 100), (2, 3, 100, 100), (1, 3, 400, 400)]
    expected = torch.cat(
        [Recording()(torch.from_numpy(numpy.array(i)).permute(2, 0, 1)[None] / 255) for i in images]
    )
    torch.testing.assert_close(index.rows, torch.nn.functional.normalize(expected), atol=1e-6, rtol=0)
    small = Recording()
    make(images, None, small, size=10, near_duplicate=False)
    assert small.given == [(13, 3, 10, 10)], "resized one by one, embedded together"


@pytest.mark.parametrize(("height", "width"), [(2, 4000), (4000, 2), (1, 17)])
def test_a_long_picture_does_not_become_a_giant(tmp_path, make, height, width):
    embedder = Recording()
    line = PIL.fromarray(numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8))
    index = make([line, smooth(8, 8)], None, embedder, dtype="float32")
    short = min(height, width)
    shape = (short, MOST_SQUARES * short) if height < width else (MOST_SQUARES * short, short)
    assert (1, 3, *shape) in embedder.given and index.manifest.notes == {SQUEEZED: 1}
    opened = Index.open(index.path, embedder)
    found = opened.search([line])
    assert found.row.tolist() == [0] and found.similarity.item() > 1 - 1e-5, "a query is squeezed alike"
    assert max(max(given[2:]) for given in embedder.given) == MOST_SQUARES * short


def test_a_long_picture_under_sscds_preprocessing(tmp_path, make):
    from amg.embed.sscd import sscd_preprocess

    preprocess, sizes = sscd_preprocess(), []

    class Short:
        name, dimension, sha = "short", 12, "a" * 64

        def __call__(self, images):
            sizes.append(tuple(preprocess(images).shape[2:]))
            return torch.nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(1) - 0.3

    (tmp_path / "root").mkdir()
    smooth(2, 4000).save(tmp_path / "root" / "line.png")
    index = make(tmp_path / "root", None, Short())
    assert sizes == [(288, 288 * MOST_SQUARES)] and index.coverage == 1


def test_pixel_indexes_keep_long_pictures_as_they_are(make):
    index = make([smooth(2, 400)])
    assert index.image_size == (2, 400) and index.manifest.notes == {}


@pytest.mark.parametrize(
    ("size", "height", "width", "scale"),
    [
        (32, 1104, 1504, 8),
        (64, 1104, 1504, 4),
        (200, 1104, 1504, 1),
        (32, 1100, 1500, 4),
        (32, 1101, 1500, 1),
    ],
)
def test_a_jpeg_at_a_reduced_size_is_the_picture_at_that_size(size, height, width, scale):
    content = jpeg(smooth(height, width))
    whole, reduced = decode_image(content).pixels, decode_image(content, least=4 * size).pixels
    assert tuple(reduced.shape[1:]) == (height // scale, width // scale)
    resized = [resize_images(pixels[None] / 255, (size, size)) for pixels in (whole, reduced)]
    assert (resized[0] - resized[1]).square().mean().sqrt() < 0.2 / 255
    alike = (sketch(whole[None] / 255).float() * sketch(reduced[None] / 255).float()).sum()
    assert alike > 0.9995


def test_a_jpeg_for_a_pixel_index_is_found_again_whole(tmp_path, make):
    (tmp_path / "root").mkdir()
    for at in range(3):
        (tmp_path / "root" / f"{at}.jpg").write_bytes(jpeg(smooth(704, 912, at)))
    index = make(tmp_path / "root", size=32)
    assert "JPEG at the smallest of its sizes of 128 or more" in index.manifest.preprocessing
    queries = [PIL.open(tmp_path / "root" / f"{at}.jpg") for at in range(3)]
    assert index.search(queries).row.tolist() == [0, 1, 2]
    row = index.rows[0].view(3, 32, 32).float() / 255
    whole = torch.from_numpy(numpy.array(PIL.open(tmp_path / "root" / "0.jpg"))).permute(2, 0, 1)
    assert (row - resize_images(whole[None] / 255, (32, 32))[0]).abs().max() < 1.5 / 255


@pytest.mark.parametrize("kind", ["jpg", "png", "PIL"])
@pytest.mark.parametrize("turned", [False, True])
def test_giants_are_reduced_and_noted(tmp_path, monkeypatch, make, kind, turned):
    monkeypatch.setattr("amg.index.decode.MOST_PIXELS", 100_000)
    picture = smooth(700, 900)
    exif = PIL.Exif()
    exif[0x0112] = 6 if turned else 1
    root = tmp_path / "root"
    root.mkdir()
    file = root / f"a.{'png' if kind == 'PIL' else kind}"
    picture.save(file, exif=exif, quality=95)
    index = make([PIL.open(file)] if kind == "PIL" else root)
    height, width = index.image_size
    assert index.manifest.notes == {REDUCED: 1} and height * width <= 100_000
    shown = picture.rotate(-90, expand=True) if turned else picture
    assert abs(height / width - shown.height / shown.width) < 0.02
    row = index.rows[0].view(3, height, width).float() / 255
    values = torch.from_numpy(numpy.array(shown)).permute(2, 0, 1)[None] / 255
    assert (row - resize_images(values, (height, width))[0]).abs().mean() < 4 / 255


def test_a_bomb_is_skipped_with_the_reason(tmp_path, make):
    root = tmp_path / "root"
    root.mkdir()
    head = b"P5 60000 60000 255\n"
    (root / "bomb.pgm").write_bytes(head + b"\0" * 100)
    smooth(8, 8).save(root / "good.png")
    index = make(root)
    assert index.coverage == 0.5 and "decompression bomb" in index.manifest.skipped[0].reason


def test_damaged_pictures_in_the_middle_of_a_batch_leave_the_others(tmp_path, make):
    root = tmp_path / "root"
    root.mkdir()
    for at in range(6):
        smooth(8, 8, at).save(root / f"{at}.png")
    (root / "3.png").write_bytes((root / "3.png").read_bytes()[:50])
    embedder = Recording()
    index = make(root, None, embedder, near_duplicate=False)
    assert embedder.given == [(5, 3, 8, 8)] and index.ids == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert Path(index.path / "skipped.jsonl").read_text().count("\n") == 1
