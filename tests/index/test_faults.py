"""Bad input and damaged files: a clear error each, nothing half-written, nothing believed."""

import json
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from amg.index import (
    EmbedderMismatch,
    Index,
    IndexBuildError,
    IndexCorrupt,
    IndexFault,
    IndexNotFound,
    IndexVersionError,
)
from amg.index.store import _digest_of

pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


def build(images, captions=None, embedder=None, path=None, **options) -> Index:
    return Index.build(images, captions, embedder, path, progress=False, **options)


def refuse_build(tmp_path: Path, message: str, *arguments, error=IndexBuildError, **options) -> None:
    path = tmp_path / "refused"
    with pytest.raises(error, match=message):
        build(*arguments, path=path, **options)
    assert not path.exists() and not path.with_name("refused.partial").exists()


def test_folders_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse_build(tmp_path, "folder without images", tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    refuse_build(tmp_path, "folder without images", str(tmp_path / "empty"))
    refuse_build(tmp_path, "does not exist", tmp_path / "nowhere")


def test_corrupt_images_are_skipped_counted_and_listed(tmp_path, folder):
    (folder / "a" / "1.png").write_bytes(b"not an image")
    whole = (folder / "b" / "4.png").read_bytes()
    (folder / "b" / "4.png").write_bytes(whole[: len(whole) // 2])
    index = build(folder, path=tmp_path / "i")
    assert index.ids == ["a/0.png", "a/2.png", "b/3.png", "b/5.png"]
    assert [(entry.position, entry.id) for entry in index.manifest.skipped] == [
        (1, "a/1.png"),
        (4, "b/4.png"),
    ]
    assert "not an image" in index.manifest.skipped[0].reason and index.manifest.skipped[1].reason
    assert index.manifest.images == 4
    assert index.captions == ["picture 0", "picture 2", None, None]
    listed = build(folder, [str(at) for at in range(6)], path=tmp_path / "listed")
    assert listed.captions == ["0", "2", "3", "5"]
    refuse_build(tmp_path, "a/1.png cannot be read", folder, on_error="raise")


def test_nothing_readable(tmp_path, embedder):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"?")
    refuse_build(tmp_path, "none of the", tmp_path / "bad")
    refuse_build(tmp_path, "none of the 1 images could be read", tmp_path / "bad", None, embedder)
    refuse_build(tmp_path, "none of the 1 images", tmp_path / "bad", size=8)
    refuse_build(tmp_path, "empty", iter([]))


def test_mixed_sizes(tmp_path):
    images = [PIL.new("RGB", (8, 8)), PIL.new("L", (6, 8))]
    refuse_build(tmp_path, r"mixed sizes: 1 is 8x6, the first was 8x8; pass size=\(H, W\)", images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 8, 8, dtype=torch.uint8), r"got \[4, 8, 8\]"),
        (torch.zeros(4, 1, 8, 8), r"got \[4, 1, 8, 8\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int32), "int32"),
        (torch.zeros(0, 3, 8, 8), "empty"),
        (torch.full((2, 3, 8, 8), -0.5), r"in \[0, 1\], image 0 has -0.5"),
        (torch.full((2, 3, 8, 8), torch.nan), r"in \[0, 1\], image 0 has nan"),
        (torch.zeros(4, 3, 8, 8).numpy(), "got ndarray"),
        (7, "got int"),
        ({"a": 1}, "got dict"),
        ([torch.zeros(3, 8, 8, dtype=torch.int64)], r"item 0 is \[3, 8, 8\] torch.int64"),
        ([object()], "item 0 is a object"),
        ([], "empty"),
    ],
)
def test_images_of_the_wrong_kind(tmp_path, images, message):
    refuse_build(tmp_path, message, images)


def test_captions_that_do_not_match(tmp_path, pictures, folder):
    some = pictures[:4]
    refuse_build(tmp_path, "3 captions for 4 images", some, ["a"] * 3)
    listed = [PIL.fromarray(image.permute(1, 2, 0).numpy()) for image in some]
    refuse_build(tmp_path, "5 captions for 4 images", iter(listed), ["a"] * 5)
    refuse_build(tmp_path, "none for index 3", iter(listed), ["a"] * 3)
    refuse_build(tmp_path, r"`captions`\[1\] must be a str", some, ["a", 3, "b", "c"])
    refuse_build(tmp_path, "names a Parquet column", some, "text")
    refuse_build(tmp_path, "3 ids for 4", some, ids=["a", "b", "c"])
    refuse_build(tmp_path, "distinct", some, ids=["a", "b", "b", "c"])
    lines = tmp_path / "c.jsonl"
    for text, message in [
        ('{"file": "a/0.png", "caption": "x"}\n', "1 captions for 6 images"),
        (
            "".join(f'{{"file": "z/{at}.png", "caption": "x"}}\n' for at in range(6)),
            "none for file 'a/0.png'",
        ),
        ('{"file": "a", "caption": "x"}\n{"index": 0, "caption": "y"}\n', ":2 is keyed by 'index'"),
        ('{"file": "a", "caption": "x"}\n{"file": "a", "caption": "y"}\n', "repeats file 'a'"),
        ("{oops\n", ":1 is not valid JSON"),
        ('{"text": "x"}\n', "must be"),
        ("\n", "is empty"),
    ]:
        lines.write_text(text)
        refuse_build(tmp_path, message, folder, lines)
    refuse_build(tmp_path, "does not exist", folder, tmp_path / "none.jsonl")


def test_parquet_without_images_or_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2]}), tmp_path / "n.parquet")
    refuse_build(tmp_path, "no image column", tmp_path / "n.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"img": [b"x"]}), tmp_path / "i.parquet")
    refuse_build(tmp_path, "names column 'text'", tmp_path / "i.parquet", "text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    refuse_build(tmp_path, "cannot be read as Parquet", tmp_path / "broken.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"size": (0, 4)}, "`size`"),
        ({"size": -3}, "`size`"),
        ({"near_duplicate": 1.5}, "`near_duplicate`"),
        ({"on_error": "ignore"}, "`on_error`"),
    ],
)
def test_arguments_out_of_range(tmp_path, pictures, options, message):
    refuse_build(tmp_path, message, pictures, **options)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda images: torch.ones(len(images), 7), r"must return float \[4, 24\], got \[4, 7\]"),
        (lambda images: torch.ones(len(images), 24, dtype=torch.int64), "torch.int64"),
        (lambda images: torch.ones(24), r"got \[24\]"),
        (lambda images: None, "NoneType"),
        (lambda images: torch.full((len(images), 24), torch.nan), r"non-finite vectors at \[0, 1, 2, 3\]"),
        (lambda images: torch.eye(4, 24) * torch.tensor([[1], [0], [1], [torch.inf]]), r"at \[1, 3\] of 4"),
    ],
)
def test_an_embedder_that_misbehaves(tmp_path, pictures, embedder, output, message):
    class Broken(type(embedder)):
        def __call__(self, images):
            return output(images)

    refuse_build(tmp_path, message, pictures[:4], None, Broken())


def test_an_embedder_without_identity(tmp_path, pictures):
    refuse_build(tmp_path, "function.name is None", pictures, None, lambda images: images, error=TypeError)
    hint = r"got 'photos': give amg.embed.load\('photos'\)"
    refuse_build(tmp_path, hint, pictures, None, "photos", error=TypeError)


@pytest.fixture
def index(tmp_path, pictures, embedder) -> Index:
    return build(pictures, [f"c{at}" for at in range(80)], embedder, tmp_path / "index")


@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"sha": "c" * 64}, {"dimension": 48}, {"preprocessing": "x"}]
)
def test_another_embedder_is_refused(index, embedder, change):
    (attribute,) = change
    other = type(embedder)(**change)
    for attempt in (lambda: Index.open(index.path, other), lambda: Index.open(index.path).attach(other)):
        with pytest.raises(EmbedderMismatch, match=f"built with: {attribute} "):
            attempt()


def test_a_pixel_index_takes_no_embedder(tmp_path, pictures, embedder):
    build(pictures, path=tmp_path / "p")
    with pytest.raises(EmbedderMismatch, match="pixel index has none"):
        Index.open(tmp_path / "p", embedder)


def test_images_need_the_embedder_vectors_do_not(index):
    bare = Index.open(index.path)
    with pytest.raises(ValueError, match=r"opened without an embedder.*'toy'"):
        bare.search(torch.rand(1, 3, 8, 8))
    assert bare.search(index.rows[3:5].float()).row.tolist() == [3, 4]


@pytest.mark.parametrize(
    "name",
    ["rows.f16", "meta.parquet", "codes.i8", "codes.scales.f32", "codes.errors.f32", "codes.squares.i32"],
)
@pytest.mark.parametrize("damage", ["cut", "grown", "gone"])
def test_size_faults_are_found_when_opening(index, name, damage):
    file = index.path / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    with pytest.raises(IndexCorrupt, match=name):
        Index.open(index.path)


@pytest.mark.parametrize(
    "name",
    ["rows.f16", "meta.parquet", "codes.i8", "codes.scales.f32", "codes.errors.f32", "codes.squares.i32"],
)
def test_a_flipped_bit_is_found_by_verify(index, name):
    file = index.path / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    opened = Index.open(index.path)
    for attempt in (opened.verify, lambda: Index.open(index.path, verify=True)):
        with pytest.raises(IndexCorrupt, match=name):
            attempt()


def test_metadata_that_cannot_be_read_says_so(index):
    file = index.path / "meta.parquet"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(IndexCorrupt, match=r"meta.parquet cannot be read"):
        _ = Index.open(index.path).captions


def rewrite(index: Index, **changes) -> None:
    file = index.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_newer_and_damaged_manifests(index):
    file = index.path / "manifest.json"
    good = file.read_bytes()
    rewrite(index, version=4)
    with pytest.raises(IndexVersionError, match=r"format version 4, this package reads up to 3: upgrade amg"):
        Index.open(index.path)
    for changes in ({"count": 79}, {"metric": "nl2"}, {"format": "else"}, {"version": 0}):
        file.write_bytes(good)
        rewrite(index, **changes)
        with pytest.raises(IndexCorrupt, match=r"manifest.json"):
            Index.open(index.path)
    for content in (good[: len(good) // 2], b"", b"[]", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(IndexCorrupt, match=r"manifest.json"):
            Index.open(index.path)
    file.unlink()
    with pytest.raises(IndexNotFound, match="is not an index"):
        Index.open(index.path)


def signed_anew(index: Index, **changes) -> None:
    """Change fields of the manifest and give it the sha256 it then has."""
    file = index.path / "manifest.json"
    record = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({**record, "sha256": _digest_of(record)}))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"format": "amg-index", "x": ' + "[" * 9999]
)
def test_a_deeply_nested_manifest_is_refused(index, content):
    (index.path / "manifest.json").write_text(content)
    with pytest.raises(IndexCorrupt, match=r"manifest\.json is not valid JSON"):
        Index.open(index.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("files", value) for value in ([], None, "x", {"rows.f16": []}, {"rows.f16": None})),
        ("files", {"rows.f16": {"size": 1.5, "sha256": ""}}),
        ("files", {"rows.f16": {"size": True, "sha256": ""}}),
        ("files", {"../rows.f16": {"size": 1, "sha256": ""}}),
        *(("passed_over", value) for value in ([1], None, {"a": "b"}, {"a": None}, {"a": -1}, 5)),
        *(("notes", value) for value in (None, [], {"a": 1.5}, "x")),
        *(("examples", value) for value in (None, [], {"a": "b"}, {"a": [1]}, {"a": None})),
        *(("count", value) for value in ("60", 80.0, None, True, -80, 0, [80])),
        *(("images", value) for value in ("60", 80.0, None, -1)),
        *(("dimension", value) for value in (24.0, "24", None, -24, 0, True)),
        *(("near_duplicate", value) for value in ("x", [], True, float("nan"), float("inf"))),
        *(("version", value) for value in (True, 1.0, "1", None, [])),
        *(("skipped", value) for value in (None, {}, [1], [{}], [{"position": "0", "id": "", "reason": ""}])),
        ("skipped", [{"position": 0, "id": "", "reason": "", "more": 1}]),
        *(("image_size", value) for value in (5, [8], [8, 8, 8], ["8", "8"], [8.0, 8.0], [0, 8], "88")),
        *(("embedder", value) for value in ("toy", [], {}, {"name": 1, "sha256": "", "preprocessing": ""})),
        *(("metric", value) for value in ("l2", None, ["cosine"], {})),
        *(("dtype", value) for value in ("int8", "uint8", None, [])),
        *(("preprocessing", value) for value in (None, 1, [])),
        *(("guard", value) for value in (1, [], True)),
        *(("background", value) for value in (1, "no colour", [])),
    ],
)
def test_a_field_of_another_type_is_refused_by_name_though_signed(index, field, value):
    signed_anew(index, **{field: value})
    with pytest.raises(IndexCorrupt, match=r"manifest\.json") as refused:
        Index.open(index.path)
    assert f"`{field}" in str(refused.value)


def test_a_count_that_no_file_holds_is_refused(index):
    signed_anew(index, count=10**400)
    with pytest.raises(IndexCorrupt, match=r"rows\.f16 has \d+ bytes, 10{400} rows of 24"):
        Index.open(index.path)


def test_a_missing_field_is_refused_by_name(index):
    file = index.path / "manifest.json"
    whole = json.loads(file.read_text())
    for field in ("metric", "dimension", "count", "images", "dtype", "files", "skipped", "version"):
        record = {name: value for name, value in whole.items() if name != field}
        file.write_text(json.dumps({**record, "sha256": _digest_of(record)}))
        with pytest.raises(IndexCorrupt, match=f"`{field}` (is missing|must be)"):
            Index.open(index.path)


def test_the_picture_size_of_a_pixel_index_is_that_of_its_rows(tmp_path, pictures):
    index = build(pictures, path=tmp_path / "p")
    for size in (None, [8, 9], [4, 4]):
        signed_anew(index, image_size=size)
        with pytest.raises(IndexCorrupt, match=r"`image_size` must be \[H, W\] with 3 H W = 192"):
            Index.open(index.path)


def test_every_flipped_byte_of_the_manifest_is_found(index):
    file = index.path / "manifest.json"
    good = file.read_bytes()
    for at in range(0, len(good), 7):
        content = bytearray(good)
        content[at] ^= 1
        file.write_bytes(content)
        try:
            opened = Index.open(index.path)
        except IndexFault:
            continue
        assert opened.manifest == index.manifest  # white space


def test_an_index_that_is_not_there(tmp_path):
    with pytest.raises(IndexNotFound, match="no such directory"):
        Index.open(tmp_path / "nowhere")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(IndexNotFound, match="unfinished build"):
        Index.open(tmp_path / "half")


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (torch.zeros(2, 5), r"floating \[B, 24\] on cpu .*got \[2, 5\] torch.float32 on cpu"),
        (torch.zeros(2, 24, dtype=torch.int64), "int64"),
        (torch.zeros(24), r"must be float \[B, 3, H, W\]"),
        (torch.zeros(2, 1, 8, 8), r"got \[2, 1, 8, 8\]"),
        (torch.full((1, 3, 8, 8), -1.0), r"in \[0, 1\], got values from -1"),
        (torch.full((1, 3, 8, 8), torch.nan), r"in \[0, 1\], got values from nan"),
        (torch.full((2, 24), torch.nan), "zero or non-finite"),
        (torch.zeros(2, 24), "zero or non-finite"),
        (torch.ones(2, 24, device="meta"), r"on cpu \(the index's device\), got .* on meta: move them"),
    ],
)
def test_queries_of_the_wrong_kind(index, queries, message):
    with pytest.raises(ValueError, match=message):
        index.search(queries)


def test_other_query_faults(tmp_path, index, pictures):
    for queries in ("picture.png", [], ["a"], None):
        with pytest.raises(TypeError, match="`queries`"):
            index.search(queries)
    for k in (0, 81):
        with pytest.raises(ValueError, match=r"`k` must be in \[1, 80\]"):
            index.search(pictures[:1], k)
    pixels = build(pictures, path=tmp_path / "p")
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite"):
            pixels.search(torch.full((1, 192), value))
    for spec in ("annoy", "faiss:", "faiss"):
        with pytest.raises(ValueError, match="`searcher` must be"):
            Index.open(index.path, searcher=spec)
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="faiss does not take 'Nonsense'"):
        Index.open(index.path, searcher="faiss:Nonsense")


def test_an_index_on_another_device(index):
    moved = index.to("meta")
    assert moved.device.type == "meta" and index.device.type == "cpu" and index.to("cpu") is index
    with pytest.raises(ValueError, match=r"on meta \(the index's device\), got .* on cpu"):
        moved.nearest(torch.ones(1, 24))


@pytest.mark.gpu
def test_an_index_on_a_gpu(index):
    moved = Index.open(index.path, device="cuda")
    queries = index.rows[:9].float()
    assert torch.equal(moved.nearest(queries.cuda()).row.cpu(), index.nearest(queries).row)
    with pytest.raises(ValueError, match="on cuda"):
        moved.nearest(queries)


def test_few_pixel_rows_warn(tmp_path, pictures):
    with pytest.warns(UserWarning, match="3 rows, nL2 is over the 50 nearest"):
        build(pictures[:3], path=tmp_path / "few")


def test_a_moved_index_still_opens(index, tmp_path):
    shutil.move(index.path, tmp_path / "elsewhere")
    assert Index.open(tmp_path / "elsewhere", verify=True).count == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"batch_size": value}, "`batch_size` must be an int in")
            for value in ("64", 2.5, True, None, -1, [8])
        ),
        ({"batch_size": torch.tensor([8, 8])}, "`batch_size` must be an int in"),
        *(
            ({"size": value}, "`size` must be")
            for value in (True, 8.0, 10**9, "8", "88", (8, 10**9), (8, True))
        ),
        *(({"size": value}, "`size` must be") for value in ((8.0, 8), [8], {8, 9}, {8: 8}, (8, None), b"88")),
        *(({"near_duplicate": value}, "`near_duplicate` must be") for value in ("yes", None, [], 2, 1j)),
        *(({"near_duplicate": value}, "`near_duplicate` must be") for value in (float("nan"), "0.5")),
        ({"ids": (str(at) for at in range(80))}, "`ids` must be .* got generator"),
        ({"ids": {str(at) for at in range(80)}}, "`ids` must be .* got set"),
        ({"ids": {str(at): 1 for at in range(80)}}, "`ids` must be .* got dict"),
        ({"ids": "a" * 80}, "`ids` must be .* got str"),
        ({"ids": b"a" * 80}, "`ids` must be .* got bytes"),
        ({"ids": numpy.array([["a", "b"]] * 40)}, "`ids` must be .* got ndarray"),
        ({"ids": numpy.arange(80)}, "`ids` must be distinct strings, got .*0.* at 0"),
        ({"ids": ["a", "b"] * 40}, "`ids` must be distinct strings, got 'a' 40 times"),
        ({"ids": ["a"]}, "1 ids for 80 images"),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(tmp_path, pictures, options, message):
    refuse_build(tmp_path, message, pictures, **options)


def test_numbers_and_ids_of_numpy_are_taken(tmp_path, pictures):
    index = build(
        pictures,
        path=tmp_path / "i",
        ids=numpy.array([f"p{at}" for at in range(80)]),
        size=(numpy.int64(4), numpy.int32(6)),
        batch_size=numpy.int64(16),
        near_duplicate=numpy.float32(0.0),
    )
    assert index.ids[7] == "p7" and type(index.ids[7]) is str
    assert index.image_size == (4, 6) and index.manifest.near_duplicate == 0
    assert build(pictures, path=tmp_path / "j", size=numpy.int64(4)).image_size == (4, 4)
    assert build(pictures, path=tmp_path / "k", size=[4, 5]).image_size == (4, 5)


@pytest.mark.parametrize("path", [None, b"i", "", 5, "a\0b", ["i"]])
def test_a_path_of_another_kind_is_refused(tmp_path, pictures, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IndexBuildError, match="`path` must be a str or path"):
        build(pictures, path=path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("images", ["", b"images"])
def test_images_at_no_path_are_refused(tmp_path, folder, images, monkeypatch):
    monkeypatch.chdir(folder)
    refuse_build(tmp_path, "`images` must be .* got ", images)


def test_tensors_without_values_are_refused(tmp_path, pictures):
    refuse_build(tmp_path, "`images` must be a dense tensor .* meta device", pictures.to("meta"))
    refuse_build(tmp_path, r"`images` must be a dense tensor .* torch\.sparse_coo", pictures.to_sparse())
    refuse_build(tmp_path, "`images` must be uint8 .*complex64", pictures.to(torch.complex64))
