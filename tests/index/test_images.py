"""Pictures as people have them: told by content, links, depths, alpha, frames; what is left out is said."""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch

from amg.index import Index, IndexBuildError
from amg.index.decode import FRAME_FILES, FRAMES, HIGH_BYTES, RASTER_FORMATS, RUNS_PROGRAMS, open_picture
from amg.index.sources.listing import BESIDE, HIDDEN, OWN, SEEN, SPECIAL, VECTOR, list_folder

pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n"


def build(images, captions=None, embedder=None, path=None, **options) -> Index:
    return Index.build(images, captions, embedder, path, progress=False, **options)


def to_pil(picture: torch.Tensor):
    return PIL.fromarray(picture.permute(1, 2, 0).numpy())


def save(picture, file: Path, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (to_pil(picture) if isinstance(picture, torch.Tensor) else picture).save(file, **options)
    return file


def names(folder: Path) -> list[str]:
    return [picture.name for picture in list_folder(folder).pictures]


def test_every_format_on_the_list_is_indexed_whatever_its_suffix(tmp_path, pictures):
    suffixes = {
        "AVIF": "avif",
        "BMP": "bmp",
        "DDS": "dds",
        "GIF": "gif",
        "JPEG": "jfif",
        "JPEG2000": "jp2",
        "PNG": "png",
        "PPM": "ppm",
        "QOI": "qoi",
        "TIFF": "tif",
        "WEBP": "webp",
    }
    by_suffix_alone = {"ICO": "ico", "PCX": "pcx", "SGI": "sgi", "TGA": "tga"}
    PIL.init()
    assert {*suffixes, *by_suffix_alone, "SUN"} == set(RASTER_FORMATS)
    root = tmp_path / "root"
    for at, (kind, suffix) in enumerate((suffixes | by_suffix_alone).items()):
        picture = to_pil(pictures[at]).resize((16, 16), PIL.Resampling.NEAREST)
        options = {"sizes": [(16, 16)]} if kind == "ICO" else {}
        file = save(picture, root / f"named.{suffix}", format=kind, **options)
        if kind in suffixes:
            shutil.copy(file, root / f"bare_{suffix}")
            shutil.copy(file, root / f"odd_{suffix}.dat")
            shutil.copy(file, root / f"wrong_{suffix}.txt")
    sun = root / "named.ras"
    head = struct.pack(">8I", 0x59A66A95, 16, 16, 24, 16 * 16 * 3, 1, 0, 0)
    sun.write_bytes(head + pictures[40].repeat(1, 2, 2).permute(1, 2, 0).flip(2).numpy().tobytes())
    shutil.copy(sun, root / "bare_ras")
    index = build(root, path=tmp_path / "i", near_duplicate=False)
    assert index.manifest.skipped == () and index.manifest.passed_over == {}
    assert index.manifest.images == 4 * len(suffixes) + len(by_suffix_alone) + 2
    assert index.count == len(suffixes) + len(by_suffix_alone) + 1, "copies fold into the named file's row"
    assert index.captions == [None] * index.count, "a picture named .txt is nobody's caption"
    for kind, suffix in (suffixes | by_suffix_alone).items():
        expected = torch.from_numpy(numpy.array(PIL.open(root / f"named.{suffix}").convert("RGB")))
        row = next(at for at, name in enumerate(index.sources) if name.endswith(suffix))
        assert torch.equal(index.rows[row], expected.permute(2, 0, 1).flatten()), kind


def test_what_is_no_picture_is_counted_by_reason(tmp_path, folder):
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / ".git").mkdir()
    shutil.copy(folder / "a" / "0.png", folder / ".git" / "hidden.png")
    numpy.save(folder / "latents.npy", numpy.zeros(3))
    (folder / "figure.eps").write_bytes(EPS)
    (folder / "paper").write_bytes(b"%PDF-1.7\n")
    (folder / "BMW.txt").write_text("BM is how this begins, and P6 3 dogs")
    (folder / "dogs").write_text("P6 puppies in a row")
    (folder / "meta.jsonl").write_text("{}\n")
    (folder / "shard.tar").write_bytes(b"a" * 600)
    os.mkfifo(folder / "pipe.png")
    index = build(folder, path=tmp_path / "i")
    assert index.manifest.images == 6 and index.manifest.skipped == ()
    assert index.manifest.passed_over == {
        HIDDEN: 3,
        BESIDE: 3,
        VECTOR: 2,
        SPECIAL: 1,
        "arrays or weights": 1,
        "text or tables": 2,
        "archives, not opened": 1,
        "no picture": 1,
    }
    assert index.manifest.examples[BESIDE] == ["a/0.txt", "a/2.txt", "b/4.txt"]
    assert index.manifest.examples[SPECIAL] == ["pipe.png"]
    assert Index.open(tmp_path / "i").manifest == index.manifest


def test_pictures_that_are_not_read_are_skipped_by_name(tmp_path, folder):
    (folder / "a" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "a" / "phone").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    save(PIL.new("RGB", (8, 8)), folder / "a" / "raw.tif").rename(folder / "a" / "raw.dng")
    (folder / "a" / "fake.png").write_bytes(EPS)
    (folder / "a" / "empty.jpg").write_bytes(b"")
    index = build(folder, path=tmp_path / "i")
    reasons = {entry.id: entry.reason for entry in index.manifest.skipped}
    assert sorted(reasons) == ["a/empty.jpg", "a/fake.png", "a/phone", "a/phone.heic", "a/raw.dng"]
    assert "PostScript" in reasons["a/fake.png"] and ".heic is not read" in reasons["a/phone.heic"]
    assert "a format that is not read" in reasons["a/phone"] and index.manifest.images == 6
    with pytest.raises(IndexBuildError, match=r"a/empty\.jpg cannot be read"):
        build(folder, path=tmp_path / "strict", on_error="raise")


@pytest.mark.parametrize("name", ["fake.png", "fake.jpg", "fake.tga", "fake"])
def test_no_other_program_is_started(tmp_path, folder, monkeypatch, name):
    import pyarrow
    import pyarrow.parquet

    eps = pytest.importorskip("PIL.EpsImagePlugin")
    monkeypatch.setattr(eps, "Ghostscript", lambda *_, **__: pytest.fail("started Ghostscript"))
    assert not {*RUNS_PROGRAMS} & {*RASTER_FORMATS}
    with pytest.raises(PIL.UnidentifiedImageError):
        open_picture(EPS, name)
    (folder / name).write_bytes(EPS)
    index = build(folder, path=tmp_path / "i")
    left_out = [entry.id for entry in index.manifest.skipped] + index.manifest.examples.get(VECTOR, [])
    assert left_out == [name] and index.manifest.images == 6
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [(folder / "a/0.png").read_bytes(), EPS]}), tmp_path / "t.parquet"
    )
    assert len(build(tmp_path / "t.parquet", path=tmp_path / "t").manifest.skipped) == 1
    lazy = PIL.open(folder / name)  # as a caller may hand it over, not yet drawn
    assert len(build([PIL.open(folder / "a/0.png"), lazy], path=tmp_path / "p").manifest.skipped) == 1
    with pytest.raises(ValueError, match="EPS is not read"):
        index.search([PIL.open(folder / name)])


def test_class_folders_that_are_links_are_followed_once(tmp_path, pictures):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for at, file in enumerate(
        (root / "cats/0.png", root / "cats/1.png", outside / "dogs/2.png", outside / "dogs/pups/3.png")
    ):
        save(pictures[at], file)
    (outside / "dogs" / "2.txt").write_text("a dog")
    (root / "a_dogs").symlink_to(outside / "dogs")
    (root / "more").symlink_to(outside / "dogs", target_is_directory=True)
    (root / "also_cats").symlink_to("cats")
    (root / "cats" / "up").symlink_to("..")
    (outside / "dogs" / "back").symlink_to(root)
    (root / "linked.png").symlink_to(outside / "dogs" / "2.png")
    index = build(root, path=tmp_path / "i", near_duplicate=False)
    assert index.ids == ["a_dogs/2.png", "a_dogs/pups/3.png", "cats/0.png", "cats/1.png"]
    assert index.manifest.images == 5 and index.counts.tolist() == [2, 1, 1, 1]
    assert index.manifest.passed_over == {SEEN: 4, BESIDE: 1} and index.manifest.skipped == ()
    assert index.captions == ["a dog", None, None, None]


def test_a_link_to_a_folder_that_has_its_own_name_here_does_not_rename_it(tmp_path, pictures):
    save(pictures[0], tmp_path / "z_real" / "0.png")
    (tmp_path / "a_link").symlink_to("z_real")
    assert names(tmp_path) == ["z_real/0.png"]


def test_links_that_lead_nowhere_are_skipped_entries(tmp_path, folder):
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "gone_class").symlink_to(tmp_path / "nowhere")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    index = build(folder, path=tmp_path / "i")
    reasons = {entry.id: entry.reason for entry in index.manifest.skipped}
    assert sorted(reasons) == ["gone.png", "gone_class", "loop.jpg"] and index.manifest.images == 6
    assert (
        reasons["gone.png"] == reasons["gone_class"] == "a link to nothing" and "links" in reasons["loop.jpg"]
    )
    assert index.manifest.passed_over == {BESIDE: 3, "text or tables: a link to nothing": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_without_permission_is_a_skipped_entry(tmp_path, folder):
    (folder / "b").chmod(0)
    try:
        index = build(folder, path=tmp_path / "i")
    finally:
        (folder / "b").chmod(0o755)
    assert [entry.id for entry in index.manifest.skipped] == ["b"] and index.manifest.images == 3


def test_a_folder_that_cannot_be_listed_is_a_skipped_entry(tmp_path, folder, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("amg.index.sources.listing.os.scandir", refusing)
    found = list_folder(folder).pictures
    assert found[-1][:3] == ("b", 0, "a folder that cannot be listed: Permission denied") and len(found) == 4


def test_file_names_that_are_not_utf8(tmp_path, pictures):
    root = tmp_path / "root"
    root.mkdir()
    to_pil(pictures[0]).save(os.fsencode(root) + b"/caf\xe9.png", "PNG")
    index = build(root, path=tmp_path / "i")
    assert index.ids == ["caf\ufffd.png"] and torch.equal(index.rows[0], pictures[0].flatten())


def ramp(top: int, seed: int = 0, size: int = 16) -> numpy.ndarray:
    """uint16 [size, size] from 0 to `top`, in an order of its own."""
    values = numpy.linspace(0, top, size * size).round().astype(numpy.uint16)
    return numpy.random.default_rng(seed).permutation(values).reshape(size, size)


def write_png16(
    file: Path, samples: numpy.ndarray, *chunks: tuple[bytes, bytes], interlaced: bool = False
) -> Path:
    """A 16-bit PNG of [H, W, channels], which Pillow does not write: each row filtered by Sub."""
    height, width, channels = samples.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    content = samples.astype(">u2").tobytes()
    stride, step = width * channels * 2, channels * 2
    lines = numpy.frombuffer(content, numpy.uint8).reshape(height, stride)
    filtered = lines.copy()
    filtered[:, step:] -= lines[:, :-step]
    data = b"".join(b"\1" + line.tobytes() for line in filtered)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    written = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
        crc = zlib.crc32(kind + body)
        written += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(written)
    return file


def write_tiff16(file: Path, samples: numpy.ndarray, order: str) -> Path:
    """An uncompressed 16-bit RGB TIFF in either byte order."""
    height, width, channels = samples.shape
    data = samples.astype(f"{order}u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 14), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data))]
    mark = b"II" if order == "<" else b"MM"
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    content = mark + struct.pack(f"{order}HI", 42, 14 + len(data)) + bits + data
    content += struct.pack(f"{order}H", len(tags))
    for tag, kind, count, value in tags:
        packed = (
            struct.pack(f"{order}HH", value, 0)
            if kind == 3 and count == 1
            else struct.pack(f"{order}I", value)
        )
        content += struct.pack(f"{order}HHI", tag, kind, count) + packed
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content + struct.pack(f"{order}I", 0))
    return file


@pytest.mark.parametrize(
    ("top", "shift"), [(65535, 8), (20000, 8), (16383, 6), (3800, 4), (4095, 4), (1023, 2), (255, 0), (9, 0)]
)
@pytest.mark.parametrize("suffix", ["png", "tif", "pil"])
def test_sixteen_bit_grey_is_scaled_by_its_own_range(tmp_path, top, shift, suffix):
    depth = ramp(top)
    picture = PIL.fromarray(depth)
    assert picture.mode == "I;16"
    source = [picture] if suffix == "pil" else save(picture, tmp_path / "root" / f"scan.{suffix}").parent
    index = build(source, path=tmp_path / "i")
    expected = torch.from_numpy((depth >> shift).astype(numpy.uint8)).expand(3, 16, 16)
    assert torch.equal(index.rows[0], expected.flatten())
    assert index.search([picture]).similarity.item() == 0, "a query is scaled alike"
    named = {f"16 bits a channel with values of {shift + 8} bits, scaled by those": 1}
    assert index.manifest.notes == ({} if shift == 8 else named)
    assert "16 bits a channel to 8 by the file's own range" in index.manifest.preprocessing


@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_twelve_bit_scans_stay_different_and_keep_their_brightness(tmp_path, kind):
    root = tmp_path / "root"
    for at in range(8):
        line = numpy.linspace(0, 1, 32) ** (0.4 + 0.35 * at)
        depth = (
            (3800 * line[None].repeat(32, 0)).astype(numpy.uint16) if kind == "smooth" else ramp(3800, at, 32)
        )
        save(PIL.fromarray(depth), root / f"{at}.png")
    index = build(root, path=tmp_path / "i")
    assert index.count == 8 and index.counts.tolist() == [1] * 8
    assert int(index.rows.amax()) == 3800 >> 4
    embedded = build(root, path=tmp_path / "off", near_duplicate=False)
    assert torch.equal(embedded.rows, index.rows)


@pytest.mark.parametrize(("top", "shift"), [(65535, 8), (3800, 4), (200, 0)])
@pytest.mark.parametrize("kind", ["png", "png alpha", "png grey alpha", "tiff <", "tiff >", "tiff deflate"])
def test_sixteen_bit_colour_is_scaled_alike(tmp_path, top, shift, kind):
    channels = [ramp(top, seed) for seed in range(3)]
    file = tmp_path / "root" / "scan"
    opaque = numpy.full((16, 16), 65535, numpy.uint16)
    if kind == "png grey alpha":
        channels = channels[:1] * 3
        write_png16(file, numpy.stack([channels[0], opaque], -1))
    elif kind == "png alpha":
        write_png16(file, numpy.stack([*channels, opaque], -1))
    elif kind == "png":
        write_png16(file, numpy.stack(channels, -1))
    else:
        write_tiff16(file, numpy.stack(channels, -1), kind[-1] if kind != "tiff deflate" else "<")
    if kind == "tiff deflate":
        pytest.importorskip("tifffile").imwrite(file, numpy.stack(channels, -1), compression="zlib")
    index = build(file.parent, path=tmp_path / "i")
    expected = torch.from_numpy(numpy.stack(channels) >> shift).to(torch.uint8)
    assert torch.equal(index.rows[0], expected.flatten())
    assert index.search([PIL.open(file)]).similarity.item() == 0
    assert list(index.manifest.notes.values()) == ([] if shift == 8 else [1])


def test_sixteen_bit_colour_that_only_its_high_bytes_are_left_of_is_noted(tmp_path):
    file = write_png16(tmp_path / "root" / "scan.png", numpy.stack([ramp(3800)] * 3, -1))
    loaded = PIL.open(file)
    assert build([loaded], path=tmp_path / "whole").manifest.notes == {
        "16 bits a channel with values of 12 bits, scaled by those": 1
    }
    header = b"P6 16 16 65535\n"
    (tmp_path / "ppm").mkdir()
    (tmp_path / "ppm" / "scan.ppm").write_bytes(
        header + numpy.stack([ramp(3800)] * 3, -1).astype(">u2").tobytes()
    )
    assert build(tmp_path / "ppm", path=tmp_path / "i").manifest.notes == {HIGH_BYTES: 1}


def test_sixteen_bit_planes_that_pillow_garbles_are_skipped(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    root = save(PIL.new("RGB", (16, 16)), tmp_path / "root" / "a.png").parent
    planes = numpy.stack([ramp(3800, seed) for seed in range(3)])
    tifffile.imwrite(root / "b.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(root / "c.tif", (planes >> 4).astype("u1"), photometric="rgb", planarconfig="separate")
    index = build(root, path=tmp_path / "i")
    assert [entry.id for entry in index.manifest.skipped] == ["b.tif"]
    assert torch.equal(index.rows[1], torch.from_numpy((planes >> 4).astype("u1")).flatten())


def test_a_phone_picture_of_two_images_is_a_jpeg(tmp_path, pictures):
    root = tmp_path / "root"
    frames = [to_pil(picture.repeat(1, 2, 2)) for picture in pictures[:2]]
    save(frames[0], root / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert PIL.open(root / "phone.jpg").format == "MPO"
    assert build(root, path=tmp_path / "i").manifest.notes == {FRAMES: 1, FRAME_FILES: 1}


def test_a_stated_depth_is_kept(tmp_path):
    """A PGM says its own maximum; a picture that is dark under it stays dark."""
    root = tmp_path / "root"
    root.mkdir()
    depth = ramp(4095)
    (root / "a.pgm").write_bytes(b"P5 16 16 4095\n" + depth.astype(">u2").tobytes())
    row = build(root, path=tmp_path / "i").rows[0].view(3, 16, 16)[0].numpy()
    assert numpy.abs(row - depth / 4095 * 255).max() <= 1


@pytest.mark.parametrize(
    ("mode", "values", "reason"),
    [
        ("I", [-1, 5], "outside 16 bits"),
        ("I", [0, 70000], "outside 16 bits"),
        ("F", [0.0, 0.5], "float pixels"),
    ],
)
def test_values_without_a_known_range_are_skipped_with_the_reason(tmp_path, mode, values, reason):
    picture = PIL.new(mode, (2, 1))
    picture.putdata(values)
    root = save(picture, tmp_path / "root" / "odd.tif").parent
    save(PIL.new("RGB", (2, 1)), root / "good.png")
    (entry,) = build(root, path=tmp_path / "i").manifest.skipped
    assert entry.id == "odd.tif" and reason in entry.reason
    with pytest.raises(ValueError, match=reason):
        Index.open(tmp_path / "i").search([picture])


def transparent(mode: str, hidden: int, file: Path) -> Path:
    """An 8 x 8 picture of `mode`: grey 100, and a transparent right half that hides a colour."""
    picture = PIL.new("RGBA", (8, 8), (100, 100, 100, 255))
    picture.paste((hidden, hidden, hidden, 0), (4, 0, 8, 8))
    options = {}
    if mode in ("LA", "RGBA"):
        picture = picture.convert(mode)
    elif mode == "P":
        picture = PIL.new("P", (8, 8), 0)
        picture.putpalette([100] * 3 + [hidden] * 3)
        picture.paste(1, (4, 0, 8, 8))
        options = {"transparency": 1}
    else:
        picture = picture.convert(mode)
        options = {"transparency": hidden if mode == "L" else (hidden,) * 3}
    return save(picture, file, **options)


@pytest.mark.parametrize(
    ("background", "shown"),
    [("white", (255,) * 3), ("black", (0,) * 3), ("#FF8000", (255, 128, 0)), ("#ffffff", (255,) * 3)],
)
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGBA", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("RGB", "png"),
        ("L", "png"),
        ("P", "gif"),
        ("RGBA", "tif"),
    ],
)
def test_hidden_colours_are_not_indexed(tmp_path, mode, suffix, background, shown):
    root = tmp_path / "root"
    for hidden in (7, 90, 200):
        transparent(mode, hidden, root / f"{hidden}.{suffix}")
    index = build(root, path=tmp_path / "i", background=background)
    visible = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    visible[:, :, 4:] = torch.tensor(shown, dtype=torch.uint8).view(3, 1, 1)
    assert index.count == 1 and torch.equal(index.rows[0], visible.flatten())
    name = "white" if background == "#ffffff" else background.lower()
    assert index.manifest.notes == {f"transparent, composited over {name}": 3}
    assert index.manifest.background == name and f"transparent over {name}" in index.manifest.preprocessing
    query = PIL.open(root / f"90.{suffix}")
    assert index.search([query]).similarity.item() == 0, "a query is composited alike"
    assert Index.open(tmp_path / "i").search([to_pil(visible)]).similarity.item() == 0
    listed = build(
        [PIL.open(file) for file in sorted(root.iterdir())], path=tmp_path / "l", background=background
    )
    assert torch.equal(listed.rows, index.rows)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa"])
def test_rarer_modes_with_alpha(tmp_path, mode):
    picture = PIL.new("LA", (8, 8), (100, 255))
    picture.paste((30, 0), (4, 0, 8, 8))
    if mode == "PA":
        picture = PIL.new("PA", (8, 8), (1, 255))
        picture.paste((2, 0), (4, 0, 8, 8))
        picture.putpalette([0, 0, 0, 100, 100, 100, 30, 30, 30])
    else:
        picture = picture.convert("RGBA" if mode == "RGBa" else "LA").convert(mode)
    row = build([picture], path=tmp_path / "i").rows[0].view(3, 8, 8)
    assert row[:, :, :4].unique().tolist() == [100] and row[:, :, 4:].unique().tolist() == [255]


def test_half_transparent_pixels_and_opaque_pictures(tmp_path):
    alpha = torch.arange(64).view(1, 8, 8) * 4
    colour = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(5))
    picture = to_pil(torch.cat([colour, alpha]).to(torch.uint8))
    row = build([picture], path=tmp_path / "i").rows[0].view(3, 8, 8)
    exact = (colour * alpha + 255 * (255 - alpha)) / 255
    assert (row - exact).abs().max() <= 0.5
    opaque = picture.copy()
    opaque.putalpha(255)
    index = build([opaque], path=tmp_path / "o")
    assert torch.equal(index.rows[0], colour.to(torch.uint8).flatten()) and index.manifest.notes == {}


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_transparency(tmp_path, channels):
    depth = ramp(3800)
    depth[depth == 1000] = 1001
    depth[3, 5] = 1000
    chunk = (b"tRNS", struct.pack(">H", 1000) * channels)
    file = write_png16(tmp_path / "root" / "t.png", numpy.stack([depth] * channels, -1), chunk)
    row = build(file.parent, path=tmp_path / "i").rows[0].view(3, 16, 16)
    expected = torch.from_numpy((depth >> 4).astype(numpy.uint8)).expand(3, 16, 16).clone()
    expected[:, 3, 5] = 255
    assert torch.equal(row, expected)


@pytest.mark.parametrize("background", ["grey", "#fff", "#12345g", 7, None, "white ", ""])
def test_backgrounds_that_are_none(tmp_path, pictures, background):
    with pytest.raises(IndexBuildError, match=r"`background` must be .*#rrggbb"):
        build(pictures, path=tmp_path / "i", background=background)
    assert not (tmp_path / "i.partial").exists()


def test_an_index_without_a_background_takes_queries_as_it_was_built(tmp_path):
    """Indexes of earlier versions dropped alpha; their queries still do."""
    import json

    from amg.index.store import _digest_of

    picture = PIL.new("RGBA", (8, 8), (40, 50, 60, 0))
    build([picture.convert("RGB")], path=tmp_path / "i")
    file = tmp_path / "i" / "manifest.json"
    record = json.loads(file.read_text())
    for name in ("background", "examples", "notes", "passed_over"):
        del record[name]
    file.write_text(json.dumps({**record, "sha256": _digest_of(record)}))
    index = Index.open(tmp_path / "i")
    assert index.manifest.background is None and index.search([picture]).similarity.item() == 0


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png", "avif"])
def test_frames_after_the_first_are_counted(tmp_path, pictures, suffix):
    root = tmp_path / "root"
    frames = [to_pil(picture.repeat(1, 2, 2)) for picture in pictures[:4]]
    save(frames[0], root / f"many.{suffix}", save_all=True, append_images=frames[1:])
    save(frames[1], root / f"two.{suffix}", save_all=True, append_images=frames[3:])
    save(frames[2], root / "one.png")
    index = build(root, path=tmp_path / "i")
    assert index.count == 3 and index.manifest.notes == {FRAMES: 4, FRAME_FILES: 2}
    assert index.manifest.examples[FRAME_FILES] == [f"many.{suffix}", f"two.{suffix}"]
    first = torch.from_numpy(numpy.array(PIL.open(root / f"many.{suffix}").convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(index.rows[0], first.flatten())
    opened = [PIL.open(file) for file in sorted(root.iterdir())]
    assert build(opened, path=tmp_path / "p").manifest.notes == {FRAMES: 4, FRAME_FILES: 2}


def test_notes_survive_a_killed_build(tmp_path, monkeypatch):
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 4)
    root = tmp_path / "root"
    for at in range(12):
        depth = ramp(3800, at)
        save(PIL.fromarray(depth), root / f"{at:02d}.png")
        (root / f"{at:02d}.txt").write_bytes(b"caf\xe9 " + str(at).encode())
    (root / "13.png").write_bytes(b"?")
    (root / "readme.md").write_text("#")
    read, stop = Path.read_bytes, [True]

    def failing(file: Path) -> bytes:
        if file.name == "09.png" and stop:
            raise KeyboardInterrupt
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(KeyboardInterrupt):
        build(root, path=tmp_path / "i", batch_size=2)
    assert (tmp_path / "i.partial" / "state.json").is_file()
    stop.clear()
    resumed = build(root, path=tmp_path / "i", batch_size=2)
    whole = build(root, path=tmp_path / "whole", batch_size=2)
    assert resumed.manifest == whole.manifest
    assert resumed.manifest.notes == {
        "16 bits a channel with values of 12 bits, scaled by those": 12,
        "caption bytes that are not UTF-8, replaced": 12,
    }
    assert len(resumed.manifest.skipped) == 1
    assert resumed.manifest.passed_over == {BESIDE: 12, "text or tables": 1}
    with pytest.raises(IndexBuildError, match="unfinished build with a different background"):
        stop.append(True)
        shutil.rmtree(tmp_path / "i")
        with pytest.raises(KeyboardInterrupt):
            build(root, path=tmp_path / "i", batch_size=2)
        build(root, path=tmp_path / "i", batch_size=2, background="black")


def encoded(pictures: torch.Tensor) -> list[bytes]:
    """Pictures as BMP bytes, all of one length."""
    contents = []
    for picture in pictures:
        file = io.BytesIO()
        to_pil(picture).save(file, "BMP")
        contents.append(file.getvalue())
    return contents


@pytest.mark.parametrize("struct_column", [True, False])
@pytest.mark.parametrize("kind", ["binary", "large", "view", "fixed", "dictionary"])
def test_every_column_of_bytes_is_read(tmp_path, pictures, kind, struct_column):
    import pyarrow
    import pyarrow.parquet

    cells = pyarrow.array(encoded(pictures[:6]))
    types = {"large": pyarrow.large_binary(), "view": pyarrow.binary_view(), "fixed": pyarrow.binary(246)}
    cells = cells.dictionary_encode() if kind == "dictionary" else cells.cast(types.get(kind, cells.type))
    if struct_column:
        names = pyarrow.array([f"{at}.bmp" for at in range(6)]).dictionary_encode()
        cells = pyarrow.StructArray.from_arrays([cells, names], ["bytes", "path"])
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "t.parquet")
    written = pyarrow.parquet.read_schema(tmp_path / "t.parquet").field("image").type
    assert written == cells.type
    index = build(tmp_path / "t.parquet", path=tmp_path / "i")
    assert torch.equal(index.rows, pictures[:6].flatten(1)) and index.manifest.skipped == ()
    assert index.ids[1] == ("1.bmp" if struct_column else "t.parquet#1")


def test_a_hash_of_fixed_length_is_not_taken_for_an_image(tmp_path, pictures):
    import pyarrow
    import pyarrow.parquet

    hashes = pyarrow.array([bytes([at] * 16) for at in range(6)], pyarrow.binary(16))
    pyarrow.parquet.write_table(
        pyarrow.table({"md5": hashes, "content": encoded(pictures[:6])}), tmp_path / "t.parquet"
    )
    assert torch.equal(build(tmp_path / "t.parquet", path=tmp_path / "i").rows, pictures[:6].flatten(1))


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("path", [1, 2], "must hold text in its field 'path', got int64"),
        ("path", [["a"], ["b"]], r"must hold text in its field 'path', got list<element: string>"),
        ("path", [{"a": "b"}, None], "must hold text in its field 'path', got struct<"),
        ("bytes", [[66, 77], [66]], r"must hold binary in its field 'bytes', got list<element: int64>"),
        ("bytes", [1, 2], "must hold binary in its field 'bytes', got int64"),
        ("bytes", [1.5, None], "must hold binary in its field 'bytes', got double"),
    ],
)
def test_a_struct_of_other_types_is_refused_at_once(tmp_path, pictures, field, values, message):
    import pyarrow
    import pyarrow.parquet

    fields = {"bytes": pyarrow.array(encoded(pictures[:2])), "path": pyarrow.array(["a", "b"])}
    fields[field] = pyarrow.array(values)
    column = pyarrow.StructArray.from_arrays([*fields.values()], [*fields])
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / "t.parquet")
    with pytest.raises(IndexBuildError, match=rf"`images`: column 'image' of .*t\.parquet {message}"):
        build(tmp_path / "t.parquet", path=tmp_path / "i")
    assert not list(tmp_path.glob("i*"))


def test_a_column_of_lists_is_no_image_column_and_its_type_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([[66, 77]], pyarrow.list_(pyarrow.uint8()))
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / "t.parquet")
    with pytest.raises(IndexBuildError, match=r"no image column among image: list<element: uint8>"):
        build(tmp_path / "t.parquet", path=tmp_path / "i")


def test_an_index_within_its_own_folder_is_passed_over(tmp_path, folder, pictures):
    (folder / "bad.png").write_bytes(b"?")  # an index that has a list of what was skipped
    for name in ("i.amg", "b/other"):
        index = build(folder, path=folder / name)
        assert (index.path / "skipped.jsonl").is_file()
        assert index.ids == ["a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"]
    save(pictures[9], folder / "i.amg" / "mine.png")  # not of the index
    index = build(folder, path=tmp_path / "j")
    assert index.ids[-1] == "i.amg/mine.png" and index.count == 7
    assert index.manifest.passed_over == {BESIDE: 3, OWN: 2}
    assert index.manifest.examples[OWN] == ["b/other", "i.amg"]


def test_an_unfinished_index_within_its_own_folder_is_passed_over_and_resumes(
    tmp_path, folder, pictures, monkeypatch
):
    import amg.index.journal as journal

    with monkeypatch.context() as patch:
        patch.setattr("amg.index.plan.SHARD_IMAGES", 2)
        commit = journal.Journal.commit

        def stopping(self, *arguments):
            commit(self, *arguments)
            raise KeyboardInterrupt

        patch.setattr(journal.Journal, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            build(folder, path=folder / "i.amg", batch_size=2)
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 2)
    assert (folder / "i.amg.partial" / "shards" / "0000000.parquet").is_file()
    assert build(folder, path=tmp_path / "j", batch_size=2).manifest.passed_over == {BESIDE: 3, OWN: 1}
    index = build(folder, path=folder / "i.amg", batch_size=2)
    assert index.count == 6 and not (folder / "i.amg.partial").exists()


def test_a_folder_that_only_is_called_like_an_index_is_indexed(tmp_path, folder, pictures):
    save(pictures[9], folder / "holidays.amg" / "cat.png")
    (folder / "holidays.amg" / "manifest.json").write_text('{"format": "amg-index"}')
    assert "holidays.amg/cat.png" in build(folder, path=tmp_path / "i").ids
