"""Vectors that were embedded elsewhere: the same index as one of the pictures, from every kind of file."""

import warnings

import numpy as np
import pytest
import torch

from amg.cli import main
from amg.index import EmbedderMismatch, Index, IndexBuildError
from amg.index.encode import unit_vectors

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
@pytest.mark.parametrize(
    "kind", ["array", "half tensor times two", "npy", "parquet", "arrow", "clip-retrieval"]
)
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


def test_is_verified_by_pictures_of_its_rows(tmp_path, many, vectors, embedder, monkeypatch):
    ids = [f"folder/p{number}.png" for number in range(COUNT)]
    index = imported(vectors, tmp_path / "i", ids=ids, near_duplicate=False).attach(embedder)
    with pytest.raises(IndexBuildError, match="none has the id of one"):
        index.verify_embeddings({"another": many[0]})
    with pytest.raises(IndexBuildError, match=r"p6\.png is at cosine -?0\.\d+ from its row, at least 0\.98"):
        index.verify_embeddings({"folder/p5.png": many[5], "p6.png": many[7]})
    assert not Index.open(tmp_path / "i").verified
    sure = index.verify_embeddings({"p5.png": many[5], "elsewhere/p65.png": many[65]})
    assert sure.verified and sure.embedder is embedder and sure.manifest.imported.pictures == 2
    assert 0.999 < sure.manifest.imported.cosine <= 1.0
    sure.seal.check()
    with pytest.raises(ValueError, match="needs the embedder"):
        Index.open(tmp_path / "i").verify_embeddings({})


def test_an_embedder_is_held_to_what_is_known_of_it(tmp_path, vectors, embedder):
    by_name = imported(vectors, tmp_path / "name", embedder="toy")
    assert by_name.attach(embedder).embedder is embedder
    with pytest.raises(EmbedderMismatch, match="sha"):
        imported(vectors, tmp_path / "sha", embedder={**NAMED, "sha256": "b" * 64}).attach(embedder)
    with pytest.raises(EmbedderMismatch, match="name 'other', got 'toy'"):
        imported(vectors, tmp_path / "other", embedder="other").attach(embedder)
    assert imported(vectors, tmp_path / "itself", embedder=embedder).manifest.embedder.sha256 == "a" * 64


def test_verdicts_and_protection_say_that_nobody_verified(tmp_path, vectors, embedder, many):
    import amg

    index = imported(vectors, tmp_path / "i").attach(embedder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (verdict,) = amg.check(many[:1].float() / 255, index)
    assert not verdict.verified and "vectors not verified" in str(verdict) and verdict.memorized
    from amg.index.coverage import warn_of_gaps

    with pytest.warns(UserWarning, match="imported vectors that nobody has compared with pictures"):
        warn_of_gaps([index])
    sure = index.verify_embeddings({"0": many[0]})
    assert amg.check(many[:1].float() / 255, sure)[0].verified


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


def test_the_command(tmp_path, vectors, many, png, capsys, monkeypatch, embedder):
    import amg

    np.save(tmp_path / "v.npy", vectors.numpy())
    out, sample = str(tmp_path / "i"), tmp_path / "sample"
    assert (
        main(["index", "import", str(tmp_path / "v.npy"), "--out", out, "--quiet", "--embedder-name", "toy"])
        == 0
    )
    said = capsys.readouterr().out
    assert "imported         not verified" in said and "none: imported vectors" in said
    sample.mkdir()
    table = pyarrow.table({"id": [f"p{number}" for number in range(COUNT)]})
    parquet.write_table(table, tmp_path / "v.parquet")
    for number in (3, 8):
        (sample / f"p{number}.png").write_bytes(png(many[number]))
    monkeypatch.setattr(amg.embed, "load", lambda spec: embedder)
    words = [
        "index",
        "import",
        str(tmp_path / "v.npy"),
        "--out",
        out + "2",
        "--quiet",
        "--embedder",
        "photos",
    ]
    assert main([*words, "--sample", str(sample)]) == 0
    assert "verified by 2 pictures, cosine 0.99" in capsys.readouterr().out
    assert main([*words[:-2], "--embedder-name", "toy", "--sample", str(sample)]) == 2
    assert "`--sample` needs `--embedder`" in capsys.readouterr().err
