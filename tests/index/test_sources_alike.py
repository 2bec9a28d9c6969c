"""A picture is read alike wherever it lies: every kind of source gives the same rows, notes and reasons."""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

from amg.index import Index, IndexBuildError
from amg.index.decode import FRAME_FILES, FRAMES
from amg.index.text import HALF_PAIR, NOT_UTF8

pyarrow = pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
KINDS = [
    "folder",
    "tar",
    "tar.gz",
    "parquet",
    "arrow",
    "csv",
    "jsonl",
    "files",
    "bytes",
    "dicts",
    "img2dataset",
]


def saved(picture, kind: str, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def odd_files() -> dict[str, bytes]:
    """Files by name, in path order: what people have in their folders."""
    random = numpy.random.default_rng(0)
    noise = [PIL.fromarray(random.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)) for _ in range(8)]
    scan = PIL.fromarray(random.permutation(numpy.linspace(0, 3800, 256)).reshape(16, 16).astype("uint16"))
    clear = noise[1].copy()
    clear.putalpha(PIL.fromarray((numpy.arange(256) % 2 * 255).astype("uint8").reshape(16, 16)))
    exif = PIL.Exif()
    exif[0x0112] = 6
    gradient = PIL.linear_gradient("L").resize((16, 16)).convert("RGB")
    whole, later = saved(noise[2], "PNG"), [noise[5].quantize(), noise[6].quantize()]
    return {
        "a.avif": saved(noise[3], "AVIF", quality=100),
        "b.jfif": saved(gradient, "JPEG", quality=95),
        "c.gif": saved(noise[4].quantize(), "GIF", save_all=True, append_images=later),
        "d.jp2": saved(noise[5], "JPEG2000"),
        "e.JPG": saved(gradient.rotate(90), "JPEG", exif=exif),
        "f.png": saved(scan, "PNG"),
        "g.png": saved(clear, "PNG"),
        "h.ppm": saved(noise[6], "PPM"),
        "i.tga": saved(noise[7], "TGA"),
        "j.png": whole[: len(whole) // 2],
        "k.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "l.jpg": b"",
    }


UNREADABLE = 3  # the last of these


def source_of(kind: str, top: Path, files: dict[str, bytes]):
    """The same files as a source of a kind, each with its name as its caption."""
    import pyarrow.parquet

    top.mkdir()
    captions = [f"caption {name}" for name in files]
    cells = [{"bytes": content, "path": name} for name, content in files.items()]
    if kind in ("folder", "csv", "jsonl", "files", "img2dataset"):
        for (name, content), caption in zip(files.items(), captions, strict=True):
            (top / name).write_bytes(content)
            (top / name).with_suffix(".txt").write_text(caption)
    if kind == "folder":
        return top
    if kind == "csv":
        (top / "l.csv").write_text("path,caption\n" + "".join(f"{name},caption {name}\n" for name in files))
        return top / "l.csv"
    if kind == "jsonl":
        rows = [{"file_name": name, "text": f"caption {name}"} for name in files]
        (top / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return top / "l.jsonl"
    if kind == "img2dataset":
        keys = [name.partition(".")[0] for name in files]
        table = pyarrow.table({"key": keys, "status": ["success"] * len(keys), "caption": captions})
        pyarrow.parquet.write_table(table, top.with_suffix(".parquet"))
        return top.parent
    if kind == "files":
        return [top / name for name in files]
    if kind.startswith("tar"):
        with tarfile.open(top / f"x.{kind}", "w:gz" if kind == "tar.gz" else "w") as archive:
            for (name, content), caption in zip(files.items(), captions, strict=True):
                for member, value in ((name, content), (f"{name.partition('.')[0]}.txt", caption.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(value)
                    archive.addfile(info, io.BytesIO(value))
        return top
    if kind == "parquet":
        table = pyarrow.table({"image": cells, "caption": captions})
        pyarrow.parquet.write_table(table, top / "t.parquet", row_group_size=5)
        return top
    if kind == "arrow":
        table = pyarrow.table({"image": cells, "caption": captions})
        with pyarrow.ipc.new_file(top / "t.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
        return top / "t.arrow"
    if kind == "dicts":
        return [{"image": cell, "text": text} for cell, text in zip(cells, captions, strict=True)]
    return list(zip(files.values(), captions, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_odd_pictures_are_read_alike_from_every_kind(tmp_path, make, kind):
    files = odd_files()
    if kind == "bytes":  # TGA has no signature, and bytes have no name
        files["i.tga"] = saved(PIL.open(io.BytesIO(files["i.tga"]), formats=["TGA"]), "BMP")
    reference = make(source_of("folder", tmp_path / "reference", odd_files()), near_duplicate=False)
    (tmp_path / "set").mkdir()
    index = make(source_of(kind, tmp_path / "set" / "00000", files), near_duplicate=False)
    assert torch.equal(index.rows, reference.rows) and index.count == len(files) - UNREADABLE
    assert index.manifest.notes == reference.manifest.notes
    assert index.manifest.notes[FRAMES] == 2 and index.manifest.notes[FRAME_FILES] == 1
    expected = (
        [None] * index.count if kind == "files" else [f"caption {name}" for name in files][: index.count]
    )
    assert index.captions == expected
    assert index.coverage == reference.coverage == 9 / 12
    reasons = Counter(entry.reason for entry in index.manifest.skipped)
    assert any("PostScript" in reason for reason in reasons) and reasons.total() == 3


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "csv", "dicts"])
def test_options_reach_every_kind(tmp_path, make, kind):
    source = source_of(kind, tmp_path / kind, {name: odd_files()[name] for name in ("f.png", "g.png")})
    black, white = make(source, background="black"), make(source)
    assert torch.equal(black.rows[0], white.rows[0]) and black.rows[1].min() == 0
    hidden = white.rows[1].view(3, 16, 16)[:, 0, 0::2]
    assert bool((hidden == 255).all()) and bool((black.rows[1].view(3, 16, 16)[:, 0, 0::2] == 0).all())
    assert make(source, size=8).image_size == (8, 8)


@pytest.mark.parametrize("kind", ["folder", "tar", "csv", "jsonl", "metadata"])
def test_bad_text_is_replaced_and_noted_in_every_kind(tmp_path, pictures, png, make, kind):
    top = tmp_path / "root"
    top.mkdir()
    members = {"a.png": png(pictures[0]), "b.png": png(pictures[1])}
    half, latin = '{"%s": "b.png", "caption": "half \\ud83d pair"}', b"caf\xe9"
    for name, content in members.items():
        (top / name).write_bytes(content)
    source = top
    if kind == "folder":
        (top / "a.txt").write_bytes(latin)
        (top / "b.json").write_text(half % "x")
    elif kind == "tar":
        members |= {"a.txt": latin, "b.json": (half % "x").encode()}
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in sorted(members):
                info = tarfile.TarInfo(name)
                info.size = len(members[name])
                archive.addfile(info, io.BytesIO(members[name]))
        source = tmp_path / "x.tar"
    elif kind == "csv":
        (top / "l.csv").write_bytes(b"path,caption\na.png," + latin + b"\nb.png,half \xed\xa0\xbd pair\n")
        source = top / "l.csv"
    else:
        name = "l.jsonl" if kind == "jsonl" else "metadata.jsonl"
        first = b'{"file_name": "a.png", "caption": "' + latin + b'"}\n'
        (top / name).write_bytes(first + (half % "file_name").encode())
        source = top / name if kind == "jsonl" else top
    index = make(source)
    assert index.captions[0] == "caf\ufffd" and index.captions[1].replace("\ufffd", "?").startswith("half ?")
    assert {*index.manifest.notes} <= {NOT_UTF8, HALF_PAIR}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "metadata"])
def test_names_that_are_no_text(tmp_path, pictures, png, make, kind):
    top = tmp_path / "root"
    top.mkdir()
    (top / "a.png").write_bytes(png(pictures[0]))
    names = ["a", "\\ud83d", "b\\u0000"]  # as escapes in JSON
    rows = [f'{{"file_name": "{name}.png", "text": "x"}}' for name in names]
    if kind == "csv":
        (top / "l.csv").write_bytes(b"path,caption\na.png,x\n\xff.png,y\n" + b"c" * 5000 + b".png,z\n")
        source = top / "l.csv"
    else:
        name = "l.jsonl" if kind == "jsonl" else "metadata.jsonl"
        (top / name).write_text("\n".join(rows))
        source = top / name if kind == "jsonl" else top
    index = make(source)
    assert index.ids == ["a.png"] and index.captions == ["x"] and index.coverage == 1 / 3


def test_member_names_that_are_not_utf8(tmp_path, pictures, png, make):
    content = png(pictures[0])
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo(os.fsdecode(b"caf\xe9.png"))
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    assert make(tmp_path / "x.tar").ids == ["x.tar/caf\ufffd.png"]


def test_an_index_among_archives_is_passed_over(tmp_path, make):
    top = source_of("tar", tmp_path / "tar", odd_files())
    first = make(top, path=top / "i.amg")
    assert (top / "i.amg" / "skipped.jsonl").is_file()
    again = make(top)
    assert torch.equal(again.rows, first.rows) and again.coverage == first.coverage


def test_search_names_what_it_cannot_read_and_answers_the_rest(tmp_path, make, capsys):
    from amg.cli import main

    top = source_of("folder", tmp_path / "f", odd_files())
    index = make(top)
    words = [str(top / name) for name in ("j.png", "h.ppm", "gone.png", "i.tga")]
    assert main(["index", "search", *words, "--index", str(index.path)]) == 2
    printed = capsys.readouterr()
    assert [line.split()[1:4] for line in printed.out.splitlines()] == [["1.", "nL2", "0.0000"]] * 2
    errors = printed.err.splitlines()
    assert len(errors) == 2 and "j.png cannot be searched for" in errors[0] and "gone.png" in errors[1]


def test_strict_names_the_member(tmp_path, make):
    with pytest.raises(IndexBuildError, match=r"x\.tar/j\.png cannot be read"):
        make(source_of("tar", tmp_path / "tar", odd_files()), on_error="raise")
    assert not list(tmp_path.glob("*.partial")) and isinstance(Index, type)
