"""Vectors that were embedded elsewhere: the same index as one of the pictures, from every kind of file."""

import numpy as np
import pytest
import torch

from amg.index import Index, IndexBuildError
from amg.index.encode import unit_vectors
from amg.index.imported.names import AGAIN, NO_ID

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
NAMED = {"name": "toy", "sha256": "a" * 64, "preprocessing": "none"}
COUNT = 75


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("amg.index.imported.vectors.BLOCK", 16)


@pytest.fixture
def many(pictures):
    """[75, 3, 8, 8]: 60 pictures, 10 of them again with a grey level of noise, 5 again as they are."""
    again = (pictures[:10].int() + torch.randint(-1, 2, (10, 3, 8, 8))).clamp(0, 255).to(torch.uint8)
    return torch.cat([pictures[:60], again, pictures[20:25]])


@pytest.fixture
def vectors(many, embedder):
    return unit_vectors(many.float() / 255, embedder)


@pytest.fixture
def texts():
    return [None if at % 7 == 0 else f"caption {at % 4}" for at in range(COUNT)]


def imported(vectors, path, captions=None, embedder=NAMED, **options):
    return Index.from_embeddings(vectors, captions, embedder, path, progress=False, **options)


def assert_same(index, other):
    torch.testing.assert_close(index.rows, other.rows, rtol=0, atol=1e-7)  # a unit vector made unit again
    assert torch.equal(index.counts, other.counts)
    assert index.ids == other.ids and index.captions == other.captions
    assert index.manifest.coverage == other.manifest.coverage
    assert (
        index.manifest.embedder == other.manifest.embedder
        and index.manifest.members == other.manifest.members
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["array", "twice", "npy", "parquet", "arrow", "clip-retrieval"])
def test_equals_the_index_of_the_pictures(tmp_path, many, vectors, texts, embedder, kind, dtype):
    ids = [f"p{number}.png" for number in range(COUNT)]
    built = Index.build(many, texts, embedder, tmp_path / "built", ids=ids, progress=False, dtype=dtype)
    table = pyarrow.table({"image_path": ids, "caption": texts, "embedding": vectors.tolist()})
    array, at = vectors.numpy(), tmp_path / "vectors"
    at.mkdir()
    if kind == "array":
        made = imported(array, tmp_path / "i", texts, ids=ids, dtype=dtype)
    elif kind == "twice":
        made = imported(vectors.double() * 2, tmp_path / "i", texts, ids=ids, dtype=dtype)
    elif kind == "npy":
        np.save(at / "v.npy", array)
        parquet.write_table(table.drop_columns(["embedding"]), at / "v.parquet")
        made = imported(at / "v.npy", tmp_path / "i", dtype=dtype)
    elif kind == "parquet":
        parquet.write_table(table.slice(0, 30), at / "0.parquet", row_group_size=7)
        parquet.write_table(table.slice(30), at / "1.parquet")
        made = imported(at, tmp_path / "i", dtype=dtype)
    elif kind == "arrow":
        with (
            pyarrow.OSFile(str(at / "a.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table, max_chunksize=9)
        made = imported(at / "a.arrow", tmp_path / "i", dtype=dtype)
    else:
        for name in ("img_emb", "text_emb", "metadata"):
            (at / name).mkdir()
        for number, some in enumerate((slice(0, 2), slice(2, 40), slice(40, COUNT))):
            np.save(at / "img_emb" / f"img_emb_{number + 9}.npy", array[some])
            np.save(at / "text_emb" / f"text_emb_{number + 9}.npy", array[some] * 0)
            part = table.drop_columns(["embedding"]).slice(some.start, some.stop - some.start)
            parquet.write_table(part, at / "metadata" / f"metadata_{number + 9}.parquet")
        made = imported(at, tmp_path / "i", dtype=dtype)
    assert_same(made, built)
    assert made.count == 60 and built.guard is not None and made.guard is None
    assert not made.verified and made.manifest.imported.pictures == 0
    queries = torch.randn(5, 24)
    assert torch.equal(made.nearest(queries).row, built.nearest(queries).row)
    made.verify()
    made.seal.check()


def test_what_has_no_direction_is_skipped_by_reason(tmp_path, vectors):
    rows = vectors.tolist()
    rows[3], rows[17], rows[18] = None, rows[17][:5], [0.0] * 24
    rows[40][2], rows[41][0] = float("nan"), float("inf")
    parquet.write_table(pyarrow.table({"vector": rows}), tmp_path / "v.parquet")
    index = imported(tmp_path / "v.parquet", tmp_path / "i", near_duplicate=False)
    reasons = {
        "no vector": 1,
        "a vector of another length than 24": 1,
        "a vector of zeros": 1,
        "a vector that is not finite": 2,
    }
    assert index.manifest.coverage.skipped == reasons and index.manifest.coverage.seen == COUNT
    assert [one.id for one in index.manifest.skipped] == [f"v.parquet#{row}" for row in (3, 17, 18, 40, 41)]
    assert index.ids[:4] == ["v.parquet#0", "v.parquet#1", "v.parquet#2", "v.parquet#4"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_import_goes_on_and_sees_what_changed(tmp_path, monkeypatch, vectors, texts, shards):
    import amg.index.journal as journal

    whole, commit = imported(vectors, tmp_path / "whole", texts), journal.Journal.commit

    def stopping(self, *arguments):
        commit(self, *arguments)
        if self.state.shards == shards:
            raise KeyboardInterrupt

    def stopped():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(journal.Journal, "commit", stopping)
            imported(vectors, tmp_path / "i", texts, resume=False)

    stopped()
    other = vectors.clone()
    other[1, 0] += 0.5
    with pytest.raises(IndexBuildError, match=r"`vectors` changed since the import was interrupted"):
        imported(other, tmp_path / "i", texts)
    assert_same(imported(vectors, tmp_path / "i", texts), whole)
    assert {file.name for file in (tmp_path / "i").iterdir()} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.zeros(3), {}, r"`vectors` must be floating \[N >= 1, D >= 1\], got \[3\]"),
        (torch.zeros(3, 4, dtype=torch.int32), {}, "`vectors` must be floating"),
        (torch.zeros(3, 4), {}, "`vectors`: none of 3 has a direction"),
        (torch.ones(3, 4), {"ids": ["a", "b"]}, "`ids` must be as many as `vectors`, 3, got 2"),
        (torch.ones(3, 4), {"ids": ["a", "b", "a"]}, "`ids` must be distinct"),
        (torch.ones(3, 4), {"captions": ["a"]}, "`captions` must be as many"),
        (torch.ones(3, 4), {"captions": "text"}, "`captions` must be a list for an array"),
        (torch.ones(3, 4), {"embedder": None}, "`embedder` must be what made the vectors"),
        (torch.ones(3, 4), {"embedder": {"nam": "x"}}, "`embedder` must be what made the vectors"),
        (torch.ones(3, 4), {"near_duplicate": 1.5}, "`near_duplicate` must be"),
        (torch.ones(3, 4), {"dtype": "uint8"}, "`dtype` must be"),
        ("nowhere", {}, "`vectors` must be there, got nowhere"),
        (7, {}, "`vectors` must be an array, a tensor, or paths, got 7"),
    ],
)
def test_bad_input_is_refused(tmp_path, given, options, message):
    with pytest.raises(IndexBuildError, match=message):
        imported(given, tmp_path / "i", **options)
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit_are_refused(tmp_path, vectors):
    np.save(tmp_path / "a.npy", vectors.numpy())
    np.save(tmp_path / "b.npy", vectors[:, :5].numpy())
    with pytest.raises(IndexBuildError, match=r"of one length, 24 in .*a\.npy, 5 in .*b\.npy"):
        imported([tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "i")
    parquet.write_table(pyarrow.table({"caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(IndexBuildError, match=r"a row for each of 75 vectors of .*a\.npy, got 1"):
        imported(tmp_path / "a.npy", tmp_path / "i")
    with pytest.raises(
        IndexBuildError, match=r"`vector_column` must say which column .* none holds lists of floats"
    ):
        imported(tmp_path / "a.parquet", tmp_path / "i")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(IndexBuildError, match=r"o\.npy cannot be read as \.npy"):
        imported(tmp_path / "o.npy", tmp_path / "i")
    two = pyarrow.table({"a": vectors[:2].tolist(), "b": vectors[:2].tolist()})
    parquet.write_table(two, tmp_path / "two.parquet")
    with pytest.raises(IndexBuildError, match=r"`vector_column` must say which column .*: a, b"):
        imported(tmp_path / "two.parquet", tmp_path / "i")
    assert imported(tmp_path / "two.parquet", tmp_path / "i", vector_column="b").count == 2


def test_a_killed_import_goes_on_with_the_ids_it_has_seen(tmp_path, monkeypatch, vectors):
    import amg.index.journal as journal

    ids = [f"p{number % 20}" for number in range(40)]
    parquet.write_table(pyarrow.table({"key": ids, "v": vectors[:40].tolist()}), tmp_path / "v.parquet")
    commit = journal.Journal.commit

    def stopping(self, *arguments):
        commit(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Journal, "commit", stopping)
        imported(tmp_path / "v.parquet", tmp_path / "i")
    index = imported(tmp_path / "v.parquet", tmp_path / "i")
    assert index.ids == [*ids[:20], *(f"v.parquet#{row}" for row in range(20, 40))]


def test_files_of_one_name_have_rows_of_different_ids(tmp_path, vectors):
    for name in ("a", "b"):
        (tmp_path / "v" / name / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "v" / "a" / "img_emb" / "img_emb_0.npy", vectors[:2].numpy())
    np.save(tmp_path / "v" / "b" / "img_emb" / "img_emb_0.npy", vectors[2:4].numpy())
    expected = [f"{name}/img_emb/img_emb_0.npy#{row}" for name in "ab" for row in range(2)]
    several = imported([tmp_path / "v" / "a", tmp_path / "v" / "b"], tmp_path / "several")
    assert several.ids == several.sources == expected == imported(tmp_path / "v", tmp_path / "one").ids
    file = tmp_path / "v" / "a" / "img_emb" / "img_emb_0.npy"
    with pytest.raises(IndexBuildError, match=r"`vectors` names .*img_emb_0\.npy twice"):
        imported([tmp_path / "v" / "a", file], tmp_path / "i")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_ids_are_distinct_and_there(tmp_path, vectors, kind):
    ids: list = [f"p{number}" for number in range(40)]
    ids[1], ids[2], ids[3], ids[30] = None, "", "p0", "p5"  # p5: of an earlier block
    table = pyarrow.table({"key": ids, "embedding": vectors[:40].tolist()})
    parquet.write_table(table, tmp_path / "v.parquet")
    if kind == "npy":
        np.save(tmp_path / "v.npy", vectors[:40].numpy())
    index = imported(tmp_path / f"v.{kind}", tmp_path / "i")
    expected = [f"v.{kind}#{at}" if at in (1, 2, 3, 30) else name for at, name in enumerate(ids)]
    assert index.ids == expected
    assert index.manifest.notes == {NO_ID: 2, AGAIN: 2}
    assert index.manifest.examples[AGAIN] == [f"v.{kind}#3", f"v.{kind}#30"]
    with pytest.raises(IndexBuildError, match=r"`id_column` must hold distinct ids, 'key' has 'p0' once"):
        imported(tmp_path / f"v.{kind}", tmp_path / "j", id_column="key")


def test_a_column_that_is_asked_for_has_to_be_there(tmp_path, vectors):
    np.save(tmp_path / "v.npy", vectors.numpy())
    for options, message in (
        ({"captions": "caption"}, r"`captions` names column 'caption', and .*v\.npy has no table"),
        ({"id_column": "key"}, r"`id_column` names column 'key', and .*v\.npy has no table"),
        ({"vector_column": "v"}, r"`vector_column` names column 'v', and .*v\.npy has none"),
    ):
        with pytest.raises(IndexBuildError, match=message):
            imported(tmp_path / "v.npy", tmp_path / "i", **options)
    parquet.write_table(pyarrow.table({"embedding": vectors.tolist()}), tmp_path / "w.parquet")
    with pytest.raises(
        IndexBuildError, match=r"`id_column` must be a column of .*, \['embedding'\], got 'k'"
    ):
        imported(tmp_path / "w.parquet", tmp_path / "i", id_column="k")
    with pytest.raises(IndexBuildError, match="`captions` names column 'c'"):
        imported(tmp_path / "w.parquet", tmp_path / "i", captions="c")
    (tmp_path / "x.parquet").write_bytes(b"PAR1, and no more")
    with pytest.raises(IndexBuildError, match=r"`vectors`: .*x\.parquet cannot be read as Parquet"):
        imported(tmp_path / "x.parquet", tmp_path / "i")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_files_without_rows_are_passed_over(tmp_path, vectors, kind):
    (tmp_path / "v").mkdir()
    for name, some in (("0", vectors[:0]), ("1", vectors[:40]), ("2", vectors[:0]), ("3", vectors[40:60])):
        if kind == "npy":
            np.save(tmp_path / "v" / f"{name}.npy", some.numpy())
        else:
            column = pyarrow.array(some.tolist(), pyarrow.list_(pyarrow.float32()))
            parquet.write_table(pyarrow.table({"embedding": column}), tmp_path / "v" / f"{name}.parquet")
    index = imported(tmp_path / "v", tmp_path / "i")
    whole = imported(vectors[:60], tmp_path / "whole")
    assert torch.equal(index.rows, whole.rows) and index.ids[40] == f"3.{kind}#0"
    for name in "13":
        (tmp_path / "v" / f"{name}.{kind}").unlink()
    with pytest.raises(IndexBuildError, match=r"`vectors`: no vector in .*0\.\w+ and others"):
        imported(tmp_path / "v", tmp_path / "j")


@pytest.mark.parametrize("element", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
def test_every_type_of_column_of_vectors(tmp_path, vectors, kind, element):
    value = getattr(pyarrow, element)()
    types = {"list": pyarrow.list_(value), "large_list": pyarrow.large_list(value)}
    rows = [*vectors[:20].numpy().astype(element), None, *vectors[20:40].numpy().astype(element)]
    table = pyarrow.table({"v": pyarrow.array(rows, types.get(kind, pyarrow.list_(value, 24)))})
    parquet.write_table(table, tmp_path / "v.parquet", row_group_size=7)
    with (
        pyarrow.OSFile(str(tmp_path / "v.arrow"), "wb") as out,
        pyarrow.ipc.new_file(out, table.schema) as file,
    ):
        file.write_table(table, max_chunksize=9)
    exact = torch.from_numpy(vectors[:40].numpy().astype(element).astype(np.float64))
    exact = (exact / exact.norm(dim=1, keepdim=True)).float()
    for suffix in ("parquet", "arrow"):
        index = imported(tmp_path / f"v.{suffix}", tmp_path / suffix, dtype="float32", near_duplicate=False)
        torch.testing.assert_close(index.rows, exact, rtol=0, atol=1e-7)
        assert index.manifest.coverage.skipped == {"no vector": 1}


def test_what_is_done_to_captions_is_noted_as_by_a_build(tmp_path, many, vectors, embedder):
    texts = ["a\x01b", None, ["", "second", "third"], " ", "plain", "half \ud800"]
    built = Index.build(many[:6], texts, embedder, tmp_path / "built", progress=False)
    index = imported(vectors[:6], tmp_path / "i", texts)
    assert index.captions == built.captions == ["a b", None, "second", None, "plain", "half \ufffd"]
    assert index.manifest.notes == built.manifest.notes and sum(index.manifest.notes.values()) == 3
