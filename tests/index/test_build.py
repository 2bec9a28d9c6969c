"""Every kind of input makes the same index; duplicates fold with counts and captions."""

import io
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from amg.index import Index, IndexBuildError

pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


def build(images, captions=None, embedder=None, path=None, **options) -> Index:
    return Index.build(images, captions, embedder, path, progress=False, **options)


def to_pil(picture: torch.Tensor):
    return PIL.fromarray(picture.permute(1, 2, 0).numpy())


def write_parquet(path: Path, pictures: torch.Tensor, struct: bool = True, **columns) -> Path:
    import pyarrow
    import pyarrow.parquet

    encoded = []
    for at, picture in enumerate(pictures):
        content = io.BytesIO()
        to_pil(picture).save(content, "PNG")
        encoded.append({"bytes": content.getvalue(), "path": f"p{at}.png"} if struct else content.getvalue())
    table = pyarrow.table({"img": encoded, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def test_pixel_rows_are_the_pixels(tmp_path, pictures):
    index = build(pictures, path=tmp_path / "i")
    assert torch.equal(index.rows, pictures.flatten(1))
    assert (index.metric, index.dimension, index.count, index.image_size) == ("nl2", 192, 80, (8, 8))
    assert index.ids[:2] == ["0", "1"] and index.captions == [None] * 80
    assert index.counts.tolist() == [1] * 80 and index.caption_counts().tolist() == [0] * 80


def test_every_source_gives_the_same_rows(tmp_path, pictures):
    some = pictures[:20]
    folder = tmp_path / "folder"
    folder.mkdir()
    for at, picture in enumerate(some):
        to_pil(picture).save(folder / f"{at:03d}.png")
    tables = tmp_path / "tables"
    tables.mkdir()
    write_parquet(tables / "0.parquet", some[:9])
    write_parquet(tables / "1.parquet", some[9:])
    sources = {
        "uint8": some,
        "float": some.float() / 255,
        "list": [to_pil(picture) for picture in some],
        "iterator": (to_pil(picture) for picture in some),
        "folder": folder,
        "parquet": write_parquet(tmp_path / "one.parquet", some),
        "bytes": write_parquet(tmp_path / "bytes.parquet", some, struct=False),
        "parquets": tables,
    }
    for name, source in sources.items():
        index = build(source, path=tmp_path / f"{name}.amg")
        assert torch.equal(index.rows, some.flatten(1)), name
        index.verify()
    assert Index.open(tmp_path / "folder.amg").ids[3] == "003.png"
    assert Index.open(tmp_path / "parquet.amg").ids[3] == "p3.png"
    assert Index.open(tmp_path / "bytes.amg").sources[8] == "bytes.parquet#8"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cosine_rows_are_the_unit_embeddings(tmp_path, pictures, embedder, dtype):
    index = build(pictures, embedder=embedder, path=tmp_path / "i", dtype=dtype, near_duplicate=False)
    expected = torch.nn.functional.normalize(embedder(pictures.double() / 255), dim=1)
    assert index.rows.dtype == getattr(torch, dtype) and index.image_size is None
    assert (index.rows.double() - expected).abs().max() < (1e-6 if dtype == "float32" else 3e-4)
    assert index.manifest.embedder.name == "toy" and index.manifest.embedder.sha256 == "a" * 64


def test_images_of_many_sizes_are_embedded_together(tmp_path, embedder):
    sizes = [(8, 8), (16, 8), (8, 8), (12, 20), (16, 8)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    index = build(
        [to_pil(image) for image in images], embedder=embedder, path=tmp_path / "i", dtype="float32"
    )
    expected = torch.cat([embedder(image[None] / 255) for image in images])
    torch.testing.assert_close(index.rows, torch.nn.functional.normalize(expected, dim=1), atol=1e-6, rtol=0)


def test_size_resizes_images_and_queries_alike(tmp_path):
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((16, 16), (20, 12), (9, 9))]
    index = build([to_pil(image) for image in images], path=tmp_path / "i", size=8)
    assert index.image_size == (8, 8) and index.manifest.preprocessing.endswith("8x8, uint8, CHW")
    for row, image in enumerate(images):
        expected = torch.nn.functional.interpolate(
            image[None] / 255, size=(8, 8), mode="bilinear", antialias=True
        )
        difference = (index.rows[row].float() / 255 - expected.flatten()).abs().max()
        assert difference <= 0.5 / 255 + 1e-6
        assert index.search(image[None]).row.tolist() == [row]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = (torch.arange(64).view(8, 8) * 4).to(torch.uint8)
    if mode == "I;16":
        picture = PIL.fromarray((grey.int() * 257).numpy().astype("uint16"))
    else:
        picture = PIL.fromarray(grey.numpy()).convert("RGB").convert(mode)
    index = build([picture], path=tmp_path / "i")
    expected = grey if mode == "I;16" else torch.from_numpy(__import__("numpy").array(picture.convert("RGB")))
    expected = expected.expand(3, 8, 8) if mode == "I;16" else expected.permute(2, 0, 1)
    assert torch.equal(index.rows[0], expected.flatten())


TURNS = {  # EXIF orientation → what a viewer does to the stored pixels [3, H, W]
    1: lambda image: image,
    2: lambda image: image.flip(2),
    3: lambda image: image.rot90(2, (1, 2)),
    4: lambda image: image.flip(1),
    5: lambda image: image.transpose(1, 2),
    6: lambda image: image.rot90(-1, (1, 2)),
    7: lambda image: image.rot90(2, (1, 2)).transpose(1, 2),
    8: lambda image: image.rot90(1, (1, 2)),
    9: lambda image: image,  # no such orientation
}


@pytest.mark.parametrize(
    ("suffix", "orientation"),
    [*(("png", orientation) for orientation in TURNS), ("jpg", 6), ("tif", 8), ("webp", 5)],
)
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "folder" / f"turned.{suffix}"
    file.parent.mkdir()
    exif = PIL.Exif()
    exif[0x0112] = orientation
    stored = torch.randint(0, 256, (3, 6, 10), dtype=torch.uint8)
    to_pil(stored).save(file, exif=exif, lossless=True)
    if suffix == "jpg":
        stored = torch.from_numpy(numpy.array(PIL.open(file))).permute(2, 0, 1)
    shown = TURNS[orientation](stored)
    table = pyarrow.table({"image": [file.read_bytes()]})
    pyarrow.parquet.write_table(table, tmp_path / "turned.parquet")
    for source in (file.parent, tmp_path / "turned.parquet", [PIL.open(file)]):
        index = build(source, path=tmp_path / "i")
        assert index.image_size == tuple(shown.shape[1:]) and torch.equal(index.rows[0], shown.flatten())
        assert index.nearest(shown.flatten()[None] / 255).row.tolist() == [0]
        assert index.search([PIL.open(file)]).similarity.item() == 0
        shutil.rmtree(tmp_path / "i")


def test_damaged_exif_is_as_good_as_none(tmp_path):
    picture = torch.randint(0, 256, (3, 6, 10), dtype=torch.uint8)
    folder = tmp_path / "folder"
    folder.mkdir()
    to_pil(picture).save(folder / "a.png", exif=b"Exif\0\0nonsense")
    with pytest.raises(Exception, match="TIFF"):
        PIL.open(folder / "a.png").getexif()
    index = build(folder, path=tmp_path / "i")
    assert index.manifest.skipped == () and torch.equal(index.rows[0], picture.flatten())


def test_captions_from_everywhere(tmp_path, pictures, folder):
    some = pictures[:6]
    listed = [f"caption {at}" for at in range(6)]
    by_file = tmp_path / "file.jsonl"
    names = ["a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"]
    by_file.write_text(
        "".join(json.dumps({"file": n, "caption": c}) + "\n" for n, c in zip(names, listed, strict=True))
    )
    by_index = tmp_path / "index.jsonl"
    by_index.write_text(
        "".join(json.dumps({"index": at, "caption": c}) + "\n" for at, c in reversed([*enumerate(listed)]))
    )
    by_id = tmp_path / "id.jsonl"
    by_id.write_text(
        "".join(json.dumps({"id": f"n{at}", "caption": c}) + "\n" for at, c in enumerate(listed))
    )
    table = write_parquet(tmp_path / "t.parquet", some, text=listed, label=[*range(6)])
    assert build(some, listed, path=tmp_path / "1").captions == listed
    assert build(folder, str(by_file), path=tmp_path / "2").captions == listed
    assert build(some, by_index, path=tmp_path / "3").captions == listed
    assert build(some, by_id, path=tmp_path / "4", ids=[f"n{at}" for at in range(6)]).captions == listed
    assert build(table, "text", path=tmp_path / "5").captions == listed
    assert build(table, "label", path=tmp_path / "6").captions == [*"012345"]
    sidecar = ["picture 0", None, "picture 2", None, "picture 4", None]
    assert build(folder, path=tmp_path / "7").captions == sidecar


def test_exact_copies_fold_with_counts_and_the_most_frequent_caption(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 4)
    order = [0, 1, 0, 2, 0, 1, 0, 3]
    captions = ["x", None, "y", "y", "y", "b", None, None]
    for near in (False, True):
        path = tmp_path / str(near)
        index = build(pictures[order], captions, path=path, near_duplicate=near, batch_size=2)
        assert torch.equal(index.rows, pictures[:4].flatten(1))
        assert index.counts.tolist() == [4, 2, 1, 1] and index.manifest.images == 8
        assert index.captions == ["y", "b", "y", None] and index.ids == ["0", "1", "3", "7"]
        assert index.caption_counts().tolist() == [3, 1, 3, 0]


def test_near_copies_fold_at_the_stated_distance(tmp_path):
    base = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    images = torch.cat([base, base + 5, base + 6, base + 11])
    # RMS 5 / 255 = 0.0196 folds, 6 / 255 = 0.0235 does not; base + 11 is 5 from base + 6
    index = build(images, path=tmp_path / "default")
    assert index.counts.tolist() == [2, 2] and index.ids == ["0", "2"]
    assert build(images, path=tmp_path / "off", near_duplicate=False).count == 4
    assert build(images, path=tmp_path / "wide", near_duplicate=0.1).counts.tolist() == [4]


def test_cosine_near_copies_fold_at_0_98(tmp_path):
    class Angles:
        name, dimension, sha = "angles", 2, "b" * 64

        def __call__(self, images):
            angle = images[:, 0, 0, 0] * 255 / 100
            return torch.stack([angle.cos(), angle.sin()], 1)

    values = [0, 19, 21, 100]  # cos .19 = .982 folds, cos .21 = .978 does not
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(values, dtype=torch.uint8)
    assert build(images, embedder=Angles(), path=tmp_path / "i").counts.tolist() == [2, 1, 1]


def test_index_is_never_pickled_and_reads_lazily(tmp_path, pictures, embedder):
    index = build(pictures, embedder=embedder, path=tmp_path / "i")
    files = sorted(file.name for file in (tmp_path / "i").iterdir())
    codes = ["codes.errors.f32", "codes.i8", "codes.scales.f32", "codes.squares.i32"]
    assert files == [*codes, "guard.f16", "manifest.json", "meta.parquet", "pictures.parquet", "rows.f16"]
    assert not (tmp_path / "i.partial").exists()
    (tmp_path / "i" / "meta.parquet").rename(tmp_path / "meta")
    assert index.nearest(index.rows[:1].float()).row.tolist() == [0]


def test_codes_belong_to_the_rows(tmp_path, pictures, embedder):
    index = build(pictures, embedder=embedder, path=tmp_path / "i")
    codes, count = index.codes, index.count
    by_rows = codes.codes.permute(1, 3, 0, 2, 4).reshape(len(codes.scales), -1)[:count, : index.dimension]
    decoded = by_rows.double() * codes.scales[:count].double()[:, None]
    assert ((decoded - index.rows.double()).norm(dim=1) <= codes.errors[:count].double()).all()
    assert (codes.errors[:count] < 0.05).all()
    assert torch.equal(codes.squares[:count], by_rows.int().square().sum(1).int())


@pytest.mark.parametrize("resume", [True, False])
def test_an_existing_path_is_left_alone(tmp_path, pictures, resume):
    build(pictures, path=tmp_path / "i")
    with pytest.raises(IndexBuildError, match="exists already"):
        build(pictures[:3], path=tmp_path / "i", resume=resume)
    assert Index.open(tmp_path / "i").count == 80
