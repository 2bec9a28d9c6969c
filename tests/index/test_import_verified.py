"""Imported vectors and who says that they are of the pictures: the embedder, some pictures, warnings."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import amg
from amg.cli import main
from amg.index import EmbedderMismatch, Index, IndexBuildError, add_guard, remove
from amg.index.encode import unit_vectors
from amg.index.store import EmbedderRecord

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


def imported(vectors, path, captions=None, embedder=NAMED, **options):
    return Index.from_embeddings(vectors, captions, embedder, path, progress=False, **options)


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
    with pytest.warns(UserWarning, match="no more than the name 'toy' of what made its vectors, and nobody"):
        assert by_name.attach(embedder).embedder is embedder
    named = {"name": "toy", "sha256": "A" * 64}
    assert imported(vectors, tmp_path / "no preprocessing", embedder=named).attach(embedder).embedder
    with pytest.raises(IndexBuildError, match=r"`embedder` must have a sha256 of 64 hex digits, got 'abc'"):
        imported(vectors, tmp_path / "short", embedder={"name": "toy", "sha256": "abc"})
    with pytest.raises(EmbedderMismatch, match="sha"):
        imported(vectors, tmp_path / "sha", embedder={**NAMED, "sha256": "b" * 64}).attach(embedder)
    with pytest.raises(EmbedderMismatch, match="name 'other', got 'toy'"):
        imported(vectors, tmp_path / "other", embedder="other").attach(embedder)
    assert imported(vectors, tmp_path / "itself", embedder=embedder).manifest.embedder.sha256 == "a" * 64


@pytest.mark.filterwarnings("ignore:.*no more than the name")
def test_a_verified_index_is_held_to_the_embedder_that_verified_it(tmp_path, many, vectors, embedder):
    index = imported(vectors, tmp_path / "i", embedder="toy")
    sure = index.attach(embedder).verify_embeddings({"5": many[5]})
    assert sure.manifest.embedder == EmbedderRecord("toy", "a" * 64, "none")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no more than the name")
        assert Index.open(tmp_path / "i", embedder).verified
    with pytest.raises(EmbedderMismatch, match=r"sha 'a+', got 'b+'"):
        Index.open(tmp_path / "i", dataclasses.replace(embedder, sha="b" * 64))
    with pytest.raises(EmbedderMismatch, match="preprocessing 'none', got 'other'"):
        Index.open(tmp_path / "i", dataclasses.replace(embedder, preprocessing="other"))


def test_built_indexes_are_held_to_all_an_embedder_says(tmp_path, many, embedder):
    silent = dataclasses.replace(embedder, sha="", preprocessing="")
    Index.build(many[:9], None, silent, tmp_path / "i", progress=False)
    with pytest.raises(EmbedderMismatch, match=r"sha '', got 'a+'; preprocessing '', got 'none'"):
        Index.open(tmp_path / "i", embedder)


@pytest.mark.filterwarnings("ignore:.*no guard")
def test_pictures_that_say_nothing_of_the_rows_verify_nothing(tmp_path, many, vectors, embedder, monkeypatch):
    ids = [f"{name}/{number}.png" for name in "ab" for number in range(30)]
    index = imported(vectors[:60], tmp_path / "i", ids=ids, near_duplicate=False).attach(embedder)
    with pytest.raises(IndexBuildError, match="none has the id of one"):
        index.verify_embeddings({"7.png": many[7]})  # of two rows
    with pytest.raises(IndexBuildError, match="`pictures` must be some pictures by id, got none"):
        index.verify_embeddings({})
    for least in (0, -1, 1.5, True, "most", float("nan")):
        with pytest.raises(IndexBuildError, match=r"`least` must be a cosine in \(0, 1\], got"):
            index.verify_embeddings({"a/7.png": many[7]}, least)
    (tmp_path / "sample" / "a").mkdir(parents=True)
    (tmp_path / "sample" / "a" / "3.png").write_bytes(b"no picture")
    with pytest.raises(IndexBuildError, match=r"`pictures`: a/3\.png cannot be read"):
        index.verify_embeddings(tmp_path / "sample")
    assert not Index.open(tmp_path / "i").verified
    assert index.verify_embeddings({"b/7.png": many[37]}).verified


@pytest.mark.filterwarnings("ignore:.*(no guard|taken out)")
def test_what_changed_meanwhile_is_not_written_over(tmp_path, many, vectors, embedder):
    index = imported(vectors, tmp_path / "i", embedder=embedder)

    def removing(images):
        if Index.open(tmp_path / "i").manifest.generation == 0:
            remove(tmp_path / "i", ids=["3"], progress=False)
        return type(embedder).__call__(embedder, images)

    slow = amg.embed.wrap(removing, name="toy", dimension=24, sha="a" * 64, preprocessing="none")
    with pytest.raises(IndexBuildError, match="was changed while its pictures were embedded"):
        index.attach(slow).verify_embeddings({"5": many[5]})
    changed = Index.open(tmp_path / "i", embedder)
    assert changed.manifest.generation == 1 and not changed.verified
    assert changed.verify_embeddings({"5": many[5]}).verified
    assert "3" not in Index.open(tmp_path / "i", verify=True).ids


def test_that_no_picture_was_seen_is_said_and_no_guard_can_be_added(tmp_path, many, vectors, embedder):
    with pytest.warns(UserWarning, match="no guard .it was made of vectors, no picture was seen.* built of"):
        index = imported(vectors, tmp_path / "i", embedder=embedder)
    with pytest.warns(UserWarning, match="no picture was seen"):
        index.attach(embedder).verify_embeddings({"5": many[5]})
    with pytest.raises(IndexBuildError, match=r"`path` must be an index of pictures, .* is of imported vec"):
        add_guard(tmp_path / "i", many, embedder, progress=False)


def test_verdicts_and_protection_say_that_nobody_verified(tmp_path, vectors, embedder, many):
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


def test_the_command(tmp_path, vectors, many, png, capsys, monkeypatch, embedder):
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
    words[4] = out + "3"
    assert main([*words, "--sample", str(tmp_path / "nowhere")]) == 2
    assert "`--sample` must be pictures, there is nothing at" in capsys.readouterr().err
    assert not (tmp_path / "i3").exists()


@pytest.mark.filterwarnings("ignore:.*(no guard|no more than the name)")
def test_the_command_verifies_later(tmp_path, vectors, many, png, capsys, monkeypatch, embedder):
    index = imported(vectors, tmp_path / "i", embedder="toy")
    monkeypatch.setattr(amg.embed, "load", lambda spec: embedder)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong" / "3.png").write_bytes(png(many[4]))
    (tmp_path / "right" / "3.png").write_bytes(png(many[3]))
    words = ["index", "verify", str(index.path)]
    assert main([*words, "--sample", str(tmp_path / "right")]) == 2
    assert "`--sample` and `--embedder` go together" in capsys.readouterr().err
    words += ["--embedder", "photos", "--sample"]
    assert main([*words, str(tmp_path / "wrong")]) == 2
    assert "`--sample`: 3.png is at cosine" in capsys.readouterr().err
    assert not Index.open(index.path).verified
    assert main([*words, str(tmp_path / "right")]) == 0
    assert "verified by 1 picture, cosine 0.9999 or more" in capsys.readouterr().out
    assert Index.open(index.path).verified
