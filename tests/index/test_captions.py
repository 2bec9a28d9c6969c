"""Captions as people's files hold them: bad text is replaced, counted and named; nothing foreign is read."""

import json
import os
from pathlib import Path

import pytest
import torch

from amg.index import Index, IndexBuildError
from amg.index.sources.listing import BESIDE
from amg.index.text import (
    CONTROL,
    HALF_PAIR,
    MOST_BYTES,
    NO_FILE,
    NOT_READ,
    NOT_UTF8,
    OUTSIDE,
    SEVERAL,
    TOO_LARGE,
    make_caption,
)

pyarrow = pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
NAMES = ["a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"]
LISTED = [f"caption {at}" for at in range(6)]


def build(images, captions=None, path=None, **options) -> Index:
    return Index.build(images, captions, None, path, progress=False, **options)


def refuse(tmp_path: Path, message: str, *arguments, **options) -> None:
    with pytest.raises(IndexBuildError, match=message):
        build(*arguments, path=tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists() and not (tmp_path / "refused.partial").exists()


def lines(path: Path, *records: dict, encoding: str = "utf-8") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding=encoding)
    return path


def parquet(path: Path, pictures: torch.Tensor, texts) -> Path:
    import io

    import pyarrow.parquet

    encoded = []
    for picture in pictures:
        content = io.BytesIO()
        PIL.fromarray(picture.permute(1, 2, 0).numpy()).save(content, "PNG")
        encoded.append({"bytes": content.getvalue(), "path": None})
    columns = {"image": encoded, "text": texts}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_captions(tmp_path, folder, encoding):
    (folder / "a" / "0.txt").write_text("ein Käfer\n", encoding=encoding)
    beside = build(folder, path=tmp_path / "s")
    assert beside.captions[0] == "ein Käfer" and beside.manifest.notes == {}
    records = [{"file": name, "caption": text} for name, text in zip(NAMES, LISTED, strict=True)]
    named = lines(tmp_path / "c.jsonl", *records, encoding=encoding)
    index = build(folder, named, tmp_path / "j")
    assert index.captions == LISTED and index.manifest.notes == {}
    whole = tmp_path / "c.json"
    whole.write_text(json.dumps(dict(zip(NAMES, LISTED, strict=True))), encoding=encoding)
    assert build(folder, whole, tmp_path / "d").captions == LISTED


def test_bytes_in_another_encoding_are_replaced_counted_and_named(tmp_path, folder, pictures):
    (folder / "a" / "0.txt").write_bytes("ein Käfer".encode("latin-1"))
    (folder / "b" / "4.txt").write_bytes(b"\xff\xfd\x80")
    index = build(folder, path=tmp_path / "s")
    assert index.captions == ["ein K\ufffdfer", None, "picture 2", None, "\ufffd\ufffd\ufffd", None]
    assert index.manifest.notes == {NOT_UTF8: 2}
    assert index.manifest.examples[NOT_UTF8] == ["a/0.txt", "b/4.txt"]
    text = "".join(f'{{"index": {at}, "caption": "K\xe4fer {at}"}}\n' for at in range(6))
    (tmp_path / "c.jsonl").write_bytes(text.encode("latin-1"))
    index = build(folder, tmp_path / "c.jsonl", tmp_path / "j")
    assert index.captions == [f"K\ufffdfer {at}" for at in range(6)]
    assert index.manifest.notes == {NOT_UTF8: 6}
    assert index.manifest.examples[NOT_UTF8] == [f"{tmp_path / 'c.jsonl'}:{at}" for at in (1, 2, 3)]
    (tmp_path / "c.json").write_bytes(
        json.dumps({n: "Käfer" for n in NAMES}, ensure_ascii=False).encode("latin-1")
    )
    index = build(folder, tmp_path / "c.json", tmp_path / "d")
    assert index.captions == ["K\ufffdfer"] * 6 and index.manifest.notes == {NOT_UTF8: 6}
    bad = pyarrow.array([b"K\xe4fer", b"fine"]).cast(pyarrow.binary()).view(pyarrow.string())
    index = build(parquet(tmp_path / "t.parquet", pictures[:2], bad), "text", tmp_path / "p")
    assert index.captions == ["K\ufffdfer", "fine"]
    assert index.manifest.examples == {NOT_UTF8: ["t.parquet#0"]} and index.manifest.notes == {NOT_UTF8: 1}


def test_half_a_surrogate_pair_is_replaced_counted_and_named(tmp_path, folder, pictures):
    records = [{"file": name, "caption": f"smile \ud83d {at}"} for at, name in enumerate(NAMES)]
    records[3]["caption"] = "whole \U0001f600"
    index = build(folder, lines(tmp_path / "c.jsonl", *records), tmp_path / "j")
    assert index.captions[0] == "smile \ufffd 0" and index.captions[3] == "whole \U0001f600"
    assert index.manifest.notes == {HALF_PAIR: 5}
    assert index.manifest.examples[HALF_PAIR][:2] == [f"{tmp_path / 'c.jsonl'}:{at}" for at in (1, 2)]
    index = build(pictures[:2], ["\udc80", "b"], tmp_path / "l")
    assert index.captions == ["\ufffd", "b"] and index.manifest.examples == {HALF_PAIR: ["`captions`[0]"]}
    refuse(tmp_path, "half a surrogate pair", pictures[:2], ids=["a", "\ud800"])


def test_control_characters_become_spaces(tmp_path, folder, pictures):
    (folder / "a" / "0.txt").write_bytes(b"a\0cat\x1b[31m\ton\na mat\x7f")
    index = build(folder, path=tmp_path / "s")
    assert index.captions[0] == "a cat [31m\ton\na mat"
    assert index.manifest.notes == {CONTROL: 1} and index.manifest.examples[CONTROL] == ["a/0.txt"]
    index = build(pictures[:2], ["a\0b", "c\u0085d"], tmp_path / "l")
    assert index.captions == ["a b", "c d"] and index.manifest.notes == {CONTROL: 2}


def test_of_several_captions_the_first_that_is_not_empty_is_taken(tmp_path, folder, pictures):
    several = [["a", "b"], ["", None, " ", "c", "d"], [], None, ["e"], [None, ""]]
    taken, notes = ["a", "c", None, None, "e", None], {SEVERAL: 2}
    some = pictures[:6]
    table = parquet(tmp_path / "t.parquet", some, pyarrow.array(several, pyarrow.list_(pyarrow.string())))
    records = [{"file": name, "caption": text} for name, text in zip(NAMES, several, strict=True)]
    for name, images, captions in (
        ("list", some, several),
        ("parquet", table, "text"),
        ("jsonl", folder, lines(tmp_path / "c.jsonl", *records)),
        ("dict", folder, dict(zip(NAMES, several, strict=True))),
    ):
        index = build(images, captions, tmp_path / name)
        assert index.captions == taken and index.manifest.notes == notes, name
    assert build(table, "text", tmp_path / "again").manifest.examples == {
        SEVERAL: ["t.parquet#0", "t.parquet#1"]
    }


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.list_(pyarrow.string()),
        pyarrow.large_list(pyarrow.string()),
        pyarrow.list_(pyarrow.string(), 1),
        pyarrow.null(),
        pyarrow.int64(),
    ],
    ids=str,
)
def test_caption_columns_of_every_sensible_type(tmp_path, pictures, kind):
    values: list = ["x", None, "y"]
    expected: list = values
    if pyarrow.types.is_null(kind):
        values = expected = [None] * 3
    elif pyarrow.types.is_integer(kind):
        values, expected = [3, None, 5], ["3", None, "5"]
    elif "list" in str(kind):
        values = [["x"], None, ["y"]]
    array = (
        pyarrow.array(values, kind)
        if "dictionary" not in str(kind)
        else pyarrow.array(values).dictionary_encode()
    )
    table = parquet(tmp_path / "t.parquet", pictures[:3], array)
    assert build(table, "text", tmp_path / "i").captions == expected


@pytest.mark.parametrize(
    "values",
    [
        [{"en": "a"}, {"en": "b"}],
        [1.5, 2.5],
        [True, False],
        [[["a"]], [["b"]]],
        [[1], [2]],
        [[{"text": "a"}], [{"text": "b"}]],
    ],
)
def test_other_caption_columns_are_refused_by_name_before_reading(tmp_path, pictures, values, monkeypatch):
    table = parquet(tmp_path / "t.parquet", pictures[:2], pyarrow.array(values))
    monkeypatch.setattr("amg.index.sources.table.read_group", lambda *_: pytest.fail("read"))
    refuse(tmp_path, r"column 'text'.*text, integers or lists of text.*t\.parquet it holds", table, "text")
    refuse(tmp_path, "column 'image', which holds the images", table, "image")


def test_a_dict_by_path_or_id(tmp_path, folder, pictures, monkeypatch):
    for at, prefix in enumerate(("", f"{folder}/")):
        captions = {prefix + name: text for name, text in zip(NAMES, LISTED, strict=True)}
        assert build(folder, captions, tmp_path / str(at)).captions == LISTED
    by_path = {folder / name: text for name, text in zip(NAMES, LISTED, strict=True)}
    assert build(folder, by_path, tmp_path / "path").captions == LISTED
    monkeypatch.chdir(folder.parent)
    assert build(folder.name, by_path, tmp_path / "absolute").captions == LISTED
    relative = {f"{folder.name}/{name}": text for name, text in zip(NAMES, LISTED, strict=True)}
    assert build(Path(folder.name), relative, tmp_path / "relative").captions == LISTED
    records = [
        {"file": f"{folder}/{name}", "caption": text} for name, text in zip(NAMES, LISTED, strict=True)
    ]
    assert build(folder, lines(tmp_path / "c.jsonl", *records), tmp_path / "lines").captions == LISTED
    by_id = {"x": "first", "y": None}
    index = build(pictures[:2], by_id, tmp_path / "id", ids=["x", "y"])
    assert index.captions == ["first", None]
    refuse(tmp_path, "none for file or id 'y'", pictures[:2], {"x": "a", "z": "b"}, ids=["x", "y"])
    refuse(tmp_path, "1 captions for 2 images", pictures[:2], {"x": "a"}, ids=["x", "y"])
    refuse(tmp_path, "keys, got 0", pictures[:2], {0: "a", 1: "b"})
    refuse(tmp_path, r"`captions`\['x'\] must be a str", pictures[:2], {"x": 1, "y": "b"}, ids=["x", "y"])
    refuse(tmp_path, "is empty", pictures[:2], {})


def test_an_index_that_is_somebody_elses_number(tmp_path, folder, pictures):
    pairs = list(zip(NAMES, LISTED, strict=True))
    foreign = [{"index": 7000 - 3 * at, "file": n, "caption": c} for at, (n, c) in enumerate(pairs)]
    assert build(folder, lines(tmp_path / "1.jsonl", *foreign), tmp_path / "1").captions == LISTED
    shuffled = [{"index": at, "file": n, "caption": c} for at, (n, c) in enumerate(reversed(pairs))]
    assert build(folder, lines(tmp_path / "2.jsonl", *shuffled), tmp_path / "2").captions == LISTED
    repeated = [{"index": 5, "file": n, "caption": c} for n, c in pairs]
    assert build(folder, lines(tmp_path / "3.jsonl", *repeated), tmp_path / "3").captions == LISTED
    text = [{"index": "laion-7", "id": 4, "file": n, "caption": c} for n, c in pairs]
    assert build(folder, lines(tmp_path / "4.jsonl", *text), tmp_path / "4").captions == LISTED
    other = [
        {"index": at, "file": f"http://{n}", "id": f"x{at}", "caption": c} for at, (n, c) in enumerate(pairs)
    ]
    mixed = lines(tmp_path / "5.jsonl", *other)
    assert build(folder, mixed, tmp_path / "5").captions == LISTED, "by index: neither url nor id fits"
    assert build(pictures[:6], mixed, tmp_path / "6").captions == LISTED
    assert (
        build(pictures[:6], mixed, tmp_path / "7", ids=[f"x{5 - at}" for at in range(6)]).captions
        == LISTED[::-1]
    )
    drawn = (PIL.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures[:6])
    assert build(drawn, mixed, tmp_path / "8").captions == LISTED, "nothing is drawn to find the key"
    shuffled[-1]["file"] = (
        "z/9.png"  # the first image has no line of its own, and index 5 is not its position
    )
    refuse(
        tmp_path, "keyed by 'file' for a/1.png and by 'index'", folder, lines(tmp_path / "9.jsonl", *shuffled)
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": true, "caption": "x"}', ":1 has a key of the wrong type"),
        ('{"index": "a", "id": 3, "caption": "x"}', ":1 has a key of the wrong type"),
        ('{"file": "a", "caption": 3}', r":1 must be a str or None .* got int"),
        ('{"file": "a", "caption": {"en": "x"}}', ":1 must be a str or None .* got dict"),
        ('{"file": "a", "caption": [["x"]]}', ":1 must be a str or None .* got list"),
        ("[" * 100_000, ":1 is not valid JSON"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path, folder, line, message):
    (tmp_path / "c.jsonl").write_text(line + "\n")
    refuse(tmp_path, rf"`captions`: .*c\.jsonl{message}", folder, tmp_path / "c.jsonl")


def test_one_image_without_a_caption_in_a_given_set_is_named(tmp_path, folder):
    captions = dict(zip(NAMES, LISTED, strict=True))
    del captions["b/3.png"]
    refuse(tmp_path, "5 captions for 6 images", folder, captions)
    refuse(tmp_path, "none for file or id 'b/3.png'", folder, captions | {"b/8.png": "x"})
    assert build(folder, captions | {"b/3.png": None}, tmp_path / "i").captions[3] is None


def test_sidecars_are_read_only_within_the_folder(tmp_path, folder):
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0")
    (folder / "a" / "1.txt").symlink_to(secret)
    (folder / "b" / "3.txt").symlink_to(Path("..", "a", "0.txt"))
    (folder / "b" / "5.txt").symlink_to(folder / "b" / "nothing")
    index = build(folder, path=tmp_path / "i")
    assert index.captions == ["picture 0", None, "picture 2", "picture 0", "picture 4", None]
    assert index.manifest.notes == {OUTSIDE: 1, NO_FILE: 1}
    assert index.manifest.examples[OUTSIDE] == ["a/1.txt"] and index.manifest.examples[NO_FILE] == ["b/5.txt"]


def test_sidecars_in_a_linked_class_folder(tmp_path, folder):
    (tmp_path / "secret").write_text("root:x:0:0")
    (folder / "b" / "3.txt").symlink_to(tmp_path / "secret")
    (folder / "b" / "5.txt").symlink_to("4.txt")
    root = tmp_path / "classes"
    root.mkdir()
    (root / "dogs").symlink_to(folder / "b")
    index = build(root, path=tmp_path / "i")
    assert index.ids == ["dogs/3.png", "dogs/4.png", "dogs/5.png"]
    assert index.captions == [None, "picture 4", "picture 4"]
    assert index.manifest.examples[OUTSIDE] == ["dogs/3.txt"]


def test_large_and_unreadable_sidecars_are_not_read(tmp_path, folder, monkeypatch):
    (folder / "a" / "0.txt").write_bytes(b"x" * (MOST_BYTES + 1))
    (folder / "a" / "1.txt").write_bytes(b"y" * MOST_BYTES)
    index = build(folder, path=tmp_path / "i")
    assert index.captions[0] is None and len(index.captions[1]) == MOST_BYTES
    assert index.manifest.notes == {TOO_LARGE: 1} and index.manifest.examples[TOO_LARGE] == ["a/0.txt"]

    def refusing(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("amg.index.text.open", refusing, raising=False)
    index = build(folder, path=tmp_path / "n")
    assert index.captions == [None] * 6 and index.manifest.notes == {NOT_READ: 4}


def test_make_caption_by_itself():
    assert make_caption("  two words ", "w").text == "  two words "
    assert make_caption(" \n", "w").text is None and make_caption([], "w").text is None
    assert make_caption(b"\xff\xfea\0b\0", "w").text == "ab"
    with pytest.raises(IndexBuildError, match=r"w must be a str or None .*, got float"):
        make_caption(["a", 1.5], "w")


def test_sidecars_by_the_whole_name_and_in_capitals(tmp_path, folder):
    for file in folder.rglob("*.txt"):
        file.unlink()
    (folder / "a" / "0.png.txt").write_text("whole name")
    (folder / "a" / "1.TXT").write_text("capitals")
    (folder / "a" / "2.png.txt").write_text("more exact")
    (folder / "a" / "2.txt").write_text("less exact")
    (folder / "b" / "3.PNG.txt").write_text("of another name")
    (folder / "b" / "4.TXT").write_text("capitals")
    (folder / "b" / "4.txt").write_text("usual")
    index = build(folder, path=tmp_path / "i")
    assert index.captions == ["whole name", "capitals", "more exact", None, "usual", None]
    assert index.manifest.passed_over == {BESIDE: 4, "text or tables": 3}
    assert index.manifest.examples["text or tables"] == ["a/2.txt", "b/3.PNG.txt", "b/4.TXT"]


def test_a_sidecar_that_is_no_file_is_counted(tmp_path, folder):
    (folder / "a" / "1.txt").mkdir()
    (folder / "b" / "3.TXT").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "b" / "5.png.txt")
    (folder / "b" / "x.txt").mkdir()
    index = build(folder, path=tmp_path / "i")
    assert index.captions == ["picture 0", None, "picture 2", None, "picture 4", None]
    assert index.manifest.notes == {NO_FILE: 3}
    assert index.manifest.examples[NO_FILE] == ["a/1.txt", "b/3.TXT", "b/5.png.txt"]


@pytest.mark.parametrize("form", ["./{}", ".//{}", "x/../{}", "{top}/./{}", "{absolute}/a/../{}"])
@pytest.mark.parametrize("kind", ["dict", "json", "jsonl"])
def test_paths_are_matched_however_they_are_written(tmp_path, folder, monkeypatch, kind, form):
    monkeypatch.chdir(tmp_path)
    names = [form.format(name, top=folder.name, absolute=folder) for name in NAMES]
    given: object = dict(zip(names, LISTED, strict=True))
    if kind == "json":
        Path("c.json").write_text(json.dumps(given))
        given = "c.json"
    elif kind == "jsonl":
        records = [{"file": name, "caption": text} for name, text in zip(names, LISTED, strict=True)]
        given = str(lines(Path("c.jsonl"), *records))
    assert build(folder.name, given, tmp_path / "i").captions == LISTED


def test_a_path_that_is_written_as_it_is_comes_first(tmp_path, folder):
    captions = dict(zip(NAMES, LISTED, strict=True))
    refuse(tmp_path, "7 captions for 6 images", folder, captions | {"./a/0.png": "another"})


def test_ids_are_not_taken_for_paths(tmp_path, pictures):
    ids = ["a//b", "a/b", "./a"]
    captions = {"a/b": "one", "a//b": "two", "./a": "three"}
    index = build(pictures[:3], captions, tmp_path / "i", ids=ids)
    assert index.captions == ["two", "one", "three"]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "ein Käfer läuft über Gras, 5 €",
        "собака на траве",
        "lines\nof\na\npoem\n",
        "two\nlines\n",
        "x",
        "a \U0001f600 face",
    ],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_unmistakable_encodings_are_read(tmp_path, folder, encoding, text):
    (folder / "a" / "0.txt").write_bytes(text.encode(encoding))
    index = build(folder, path=tmp_path / "i")
    assert index.captions[0] == text.strip() and index.manifest.notes == {}


@pytest.mark.parametrize("bom", [b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"\xff\xfe", b"\xfe\xff", b""])
def test_a_bom_alone_is_no_caption(tmp_path, folder, bom):
    (folder / "a" / "0.txt").write_bytes(bom)
    assert build(folder, path=tmp_path / "i").captions[0] is None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_caption_files_in_unmistakable_encodings_are_read(tmp_path, folder, encoding):
    records = [{"file": name, "caption": f"ein Käfer {at}"} for at, name in enumerate(NAMES)]
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(encoding)
    )
    wanted = [record["caption"] for record in records]
    assert build(folder, path, tmp_path / "i").captions == wanted
    given = json.dumps(dict(zip(NAMES, wanted, strict=True)), ensure_ascii=False)
    (tmp_path / "c.json").write_bytes(given.encode(encoding))
    assert build(folder, tmp_path / "c.json", tmp_path / "j").captions == wanted


@pytest.mark.parametrize(
    ("content", "text", "note"),
    [
        ("a dog\0".encode("utf-16-le") + b"x", None, True),  # half a pair is left over
        ("a dog".encode("utf-32-le") + b"x", None, True),
        (b"\xff\xfe\0\0" + b"\xff\xff\xff\xff", "\ufffd", True),
        (b"a\nb\nc\nd\n", "a\nb\nc\nd", False),
        (b"a\0dog", "a dog", False),  # zero bytes in UTF-8 are control characters
        ("犬が走る".encode("utf-16-le"), None, True),  # nothing tells
        ("犬が走る".encode(), "犬が走る", False),
    ],
)
def test_what_no_encoding_tells_is_noted(tmp_path, folder, content, text, note):
    (folder / "a" / "0.txt").write_bytes(content)
    index = build(folder, path=tmp_path / "i")
    assert (index.manifest.notes.get(NOT_UTF8) == 1) is note
    assert text is None or index.captions[0] == text
