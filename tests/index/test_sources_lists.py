"""Lists of paths with captions, arrays in files, single pictures, and several sources in one index."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy
import pytest
import torch

from amg.index import IndexBuildError
from amg.index.sources.lists import NO_FILE, URL

pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
NAMES = ["b/3.png", "a/0.png", "a/2.png"]
ORDER = [3, 0, 2]
TEXTS = ['a "dog"', "two, cats", "ümlaut"]
PAIRS = list(zip(NAMES, TEXTS, strict=True))

LISTS = {
    "jsonl": "".join(json.dumps({"file": name, "caption": text}) + "\n" for name, text in PAIRS),
    "json": json.dumps([{"image": name, "text": text} for name, text in PAIRS]),
    "dict.json": json.dumps(dict(PAIRS)),
    "coco.json": json.dumps(
        {
            "images": [{"id": 7 + at, "file_name": name} for at, name in enumerate(NAMES)],
            "annotations": [{"image_id": 7 + at, "caption": text} for at, text in enumerate(TEXTS)],
        }
    ),
    "csv": 'path,n,caption\nb/3.png,1,"a ""dog"""\na/0.png,2,"two, cats"\na/2.png,3,ümlaut\n',
    "tsv": 'caption\tfilename\n"a ""dog"""\tb/3.png\ntwo, cats\ta/0.png\nümlaut\ta/2.png\n',
    "semicolon.csv": 'file;caption\nb/3.png;"a ""dog"""\na/0.png;two, cats\na/2.png;ümlaut\n',
    "bare.csv": 'b/3.png,"a ""dog"""\na/0.png,"two, cats"\n\na/2.png,ümlaut\n',
}


@pytest.mark.parametrize("kind", [*LISTS])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_paths_with_captions(folder, pictures, make, kind, encoding):
    path = folder / f"list.{kind}"
    path.write_bytes(LISTS[kind].encode(encoding))
    index = make(path)
    assert torch.equal(index.rows, pictures[ORDER].flatten(1))
    assert index.captions == TEXTS and index.ids == NAMES and index.coverage == 1


def test_a_text_file_of_paths(folder, pictures, make, tmp_path):
    absolute = [str(folder / "a/1.png"), "b/4.png", f"file://{folder}/b/5.png"]
    (folder / "list.txt").write_text("\r\n".join(absolute) + "\r\n")
    index = make(folder / "list.txt")
    assert torch.equal(index.rows, pictures[[1, 4, 5]].flatten(1)) and index.captions == [None] * 3


def test_what_is_listed_and_cannot_be_had_is_counted(folder, pictures, make):
    (folder / "link.png").symlink_to("nowhere.png")
    names = ["a/0.png", "gone.png", "https://x/y.jpg", "link.png", "a", "b/3.png"]
    (folder / "list.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    index = make(folder / "list.jsonl")
    assert torch.equal(index.rows, pictures[[0, 3]].flatten(1)) and index.coverage == 2 / 6
    reasons = {entry.id: entry.reason for entry in index.manifest.skipped}
    assert reasons == {
        "gone.png": NO_FILE,
        "https://x/y.jpg": URL,
        "link.png": "a link to nothing",
        "a": "Is a directory",
    }


def test_lists_that_are_wrong_are_named(folder, make):
    for name, text, message in [
        ("a.jsonl", '{"file": "a/0.png"}\n{oops\n', r"a\.jsonl:2 is not valid JSON"),
        ("b.jsonl", '{"caption": "x"}\n', r"b\.jsonl:1 must have the path of a picture .* it has caption"),
        ("c.csv", "name,caption\nx,y\n", r"c\.csv:2 must have the path of a picture under one of file_name"),
        ("d.json", "[1]", r"d\.json\[0\] must be an object with a path, got int"),
        ("e.csv", "path,caption\n", "lists no pictures"),
        ("f.csv", "path\na/0.png\n", "`captions` names 'text'; f.csv:2 has path"),
    ]:
        (folder / name).write_text(text)
        with pytest.raises(IndexBuildError, match=message):
            make(folder / name, "text" if name == "f.csv" else None)


def test_a_column_of_a_list_may_be_named(folder, pictures, make):
    (folder / "l.csv").write_text("photo,path,alt\na/0.png,b/3.png,x\n")
    index = make(folder / "l.csv", "alt", image_column="photo")
    assert torch.equal(index.rows[0], pictures[0].flatten()) and index.captions == ["x"]


def test_an_interrupted_build_of_a_list_resumes(folder, pictures, tmp_path, png, interrupted_twice):
    for at in range(14):
        (folder / f"{at}.png").write_bytes(png(pictures[at]))
    (folder / "l.csv").write_text("path,caption\n" + "".join(f"{at}.png,c{at}\n" for at in range(14)))
    index = interrupted_twice(lambda: folder / "l.csv", tmp_path)
    assert torch.equal(index.rows, pictures[:14].flatten(1)) and index.captions[13] == "c13"


def test_a_picture_alone_and_several_of_them(folder, pictures, make):
    assert make(folder / "a" / "1.png").ids == ["1.png"]
    index = make([folder / "b" / "4.png", str(folder / "a" / "1.png")])
    assert torch.equal(index.rows, pictures[[4, 1]].flatten(1)) and index.ids == ["b/4.png", "a/1.png"]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "grey"])
def test_arrays_in_memory_and_in_files(tmp_path, pictures, make, dtype, interrupted_twice):
    values = pictures[:14].permute(0, 2, 3, 1).numpy()
    expected = pictures[:14]
    if dtype == "float32":
        values = values.astype("float32") / 255
    elif dtype == "grey":
        values = values[..., 0]
        expected = pictures[:14, :1].expand(-1, 3, -1, -1)
    numpy.save(tmp_path / "x.npy", values)
    for images in (values, tmp_path / "x.npy"):
        assert torch.equal(make(images).rows, expected.flatten(1))
    assert make(tmp_path / "x.npy").sources[3] == "x.npy#3"
    assert torch.equal(interrupted_twice(lambda: tmp_path / "x.npy", tmp_path).rows, expected.flatten(1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (numpy.zeros((2, 3, 8, 8), "float32"), r"got ndarray \[2, 3, 8, 8\] float32 \(channels first: torch"),
        (numpy.zeros((2, 8, 8, 3), "int32"), "int32"),
        (numpy.zeros((0, 8, 8, 3), "uint8"), "empty"),
        (numpy.full((2, 8, 8, 3), -1.0), r"in \[0, 1\], image 0 has -1 to -1: undo its normalisation"),
        (numpy.array([{}, {}]), r"got ndarray \[2\] object"),
    ],
)
def test_arrays_of_other_kinds_are_refused(tmp_path, make, values, message):
    with pytest.raises(IndexBuildError, match=message):
        make(values)


def test_an_array_file_is_never_unpickled(tmp_path, make):
    numpy.save(tmp_path / "x.npy", numpy.array([{}, {}]), allow_pickle=True)
    with pytest.raises(IndexBuildError, match=r"x\.npy cannot be read as an array"):
        make(tmp_path / "x.npy")


def several(tmp_path: Path, folder: Path, pictures, png) -> list[Path]:
    """Six pictures in a folder, four in an archive (one damaged), two on a list."""
    with tarfile.open(tmp_path / "more.tar", "w") as archive:
        for at in range(6, 10):
            (tmp_path / "part").write_bytes(png(pictures[at]) if at != 7 else b"?")
            archive.add(tmp_path / "part", f"{at}.png")
    (tmp_path / "part").unlink()
    (tmp_path / "lists").mkdir()
    for at in (10, 11):
        (tmp_path / "lists" / f"{at}.png").write_bytes(png(pictures[at]))
    (tmp_path / "lists" / "l.csv").write_text("path,caption\n10.png,ten\n11.png,eleven\n")
    return [folder, tmp_path / "more.tar", tmp_path / "lists" / "l.csv"]


def test_several_sources_in_one_index(tmp_path, folder, pictures, png, make, interrupted_twice):
    paths = several(tmp_path, folder, pictures, png)
    index = make(paths)
    known = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert torch.equal(index.rows, pictures[known].flatten(1)) and index.coverage == 11 / 12
    assert index.ids[:1] == ["images/a/0.png"] and index.ids[6] == "more.tar/6.png"
    assert index.ids[9:] == ["lists/10.png", "lists/11.png"]
    assert index.captions[:3] == ["picture 0", None, "picture 2"] and index.captions[9:] == ["ten", "eleven"]
    assert index.manifest.skipped[0].position == 7 and index.manifest.skipped[0].id == "more.tar/7.png"
    assert index.manifest.examples["captions beside a picture"][0] == "images/a/0.txt"
    again = interrupted_twice(lambda: list(map(str, paths)), tmp_path / "r")
    assert torch.equal(again.rows, index.rows) and again.manifest.skipped == index.manifest.skipped
    assert again.manifest.passed_over == index.manifest.passed_over and again.ids == index.ids


def test_captions_of_several_sources_by_path(tmp_path, folder, pictures, png, make, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(folder / "b", other)
    captions = {str(folder / f"{'a' if at < 3 else 'b'}/{at}.png"): f"c{at}" for at in range(6)}
    captions |= {str(other / f"{at}.png"): f"d{at}" for at in (3, 4, 5)}
    index = make([folder, other], captions)
    assert index.captions == [f"c{at}" for at in range(6)], "equally frequent: the first"
    monkeypatch.chdir(tmp_path)
    relative = {str(Path(name).relative_to(tmp_path)): text for name, text in captions.items()}
    assert make(["images", "other"], relative).captions == index.captions


def test_the_same_source_twice_is_refused(folder, make):
    with pytest.raises(IndexBuildError, match=r"`images` names .* twice"):
        make([folder, f"{folder}/."])
    with pytest.raises(IndexBuildError, match="does not exist"):
        make([folder, folder / "nowhere"])


def test_other_files_are_refused_by_name(tmp_path, make):
    (tmp_path / "x.zip").write_bytes(b"PK\3\4")
    with pytest.raises(IndexBuildError, match=r"`images` must be a folder of images.*got the file .*x\.zip"):
        make(tmp_path / "x.zip")
    with pytest.raises(IndexBuildError, match="does not exist"):
        make("pipe:curl http://x/{0..3}.tar")


def test_a_parquet_file_of_paths_is_a_list(folder, pictures, make):
    import pyarrow.parquet

    columns = {"image_path": NAMES, "n": [1, 2, 3], "caption": TEXTS}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "l.parquet")
    index = make(folder / "l.parquet")
    assert torch.equal(index.rows, pictures[ORDER].flatten(1))
    assert index.captions == TEXTS and index.ids == NAMES


def test_paths_as_windows_writes_them(folder, pictures, make):
    (folder / "l.csv").write_text("path,caption\r\na\\0.png,zero\r\nb\\3.png,three\r\n")
    assert torch.equal(make(folder / "l.csv").rows, pictures[[0, 3]].flatten(1))


def test_a_pattern_of_names(folder, pictures, make):
    assert torch.equal(make(f"{folder}/*/[1-4].png").rows, pictures[1:5].flatten(1))
    with pytest.raises(IndexBuildError, match="does not exist"):
        make(f"{folder}/*.jpg")


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_captions_in_cells(folder, make, kind):
    names = ["a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"]
    comma = "," if kind == "csv" else "\t"
    path = folder.parent / f"c.{kind}"
    path.write_text("\ufefffile,caption\n".replace(",", comma) + "".join(f"{n}{comma}c {n}\n" for n in names))
    assert make(folder, str(path)).captions == [f"c {name}" for name in names]
    path.write_text("file,n\na/0.png,3\n".replace(",", comma))
    with pytest.raises(
        IndexBuildError, match=rf"`captions`: .*c\.{kind}:2 must have a path or id and a caption"
    ):
        make(folder, str(path))


def test_sixteen_bit_arrays_are_scaled(make):
    depth = (numpy.arange(64).reshape(8, 8) * 60).astype("uint16")
    expected = torch.from_numpy((depth >> 4).astype("uint8")).expand(3, 8, 8)
    assert torch.equal(make([depth]).rows[0], expected.flatten())


def test_a_damaged_table_among_pictures_is_a_skipped_entry(folder, make):
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    (folder / "old.feather").write_bytes(b"FEA1 and no more")
    index = make(folder)
    assert index.count == 6 and index.coverage == 6 / 8
    assert "cut.parquet cannot be read as Parquet" in index.manifest.skipped[0].reason
    with pytest.raises(IndexBuildError, match=r"cut\.parquet cannot be read"):
        make(folder, on_error="raise")
