"""An index that is not what its manifest says is refused when it is checked against, not silently
searched."""

import copy
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import amg
import amg.index.seal as seal
from amg.index import Index, IndexCorrupt
from amg.index.store import check_hashes, file_record, read_manifest, write_manifest


@pytest.fixture
def index(tmp_path, pictures, embedder) -> Index:
    return Index.build(pictures, embedder=embedder, path=tmp_path / "i", progress=False)


def images(pictures) -> torch.Tensor:
    return pictures[:3].float() / 255


def overwrite(path, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(content)


@pytest.mark.parametrize("name", ["rows.f16", "codes.i8", "codes.scales.f32", "guard.f16", "meta.parquet"])
def test_files_of_the_right_size_with_other_content(index, pictures, embedder, name):
    size = (index.path / name).stat().st_size
    overwrite(index.path / name, bytes(size))
    opened = Index.open(index.path, embedder)  # sizes are right, so opening does not tell
    with pytest.raises(IndexCorrupt, match=f"{name} was changed or damaged"):
        opened.closest(images(pictures))


def test_codes_of_other_rows(index, pictures, embedder):
    """Permuted codes would let the exact search pass over the very row it looks for."""
    codes = np.fromfile(index.path / "codes.i8", dtype=np.int8).reshape(len(index.codes.codes), -1, 4)
    overwrite(index.path / "codes.i8", codes[:, ::-1].tobytes())
    with pytest.raises(IndexCorrupt, match=r"codes\.i8"):
        Index.open(index.path, embedder).closest(images(pictures))


@pytest.mark.parametrize("when", ["before the first check", "after it"])
def test_rows_overwritten_while_mapped(index, pictures, when):
    if when == "after it":
        assert float(index.closest(images(pictures)).similarity.min()) > 0.99
    overwrite(index.path / "rows.f16", bytes(200))
    with pytest.raises(IndexCorrupt, match=r"rows.f16 was changed or damaged"):
        index.closest(images(pictures))


def test_a_time_stamp_put_back_hides_nothing(index, pictures):
    index.closest(images(pictures))
    found = os.stat(index.path / "rows.f16")
    overwrite(index.path / "rows.f16", bytes(200))
    os.utime(index.path / "rows.f16", ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(IndexCorrupt, match=r"rows.f16"):
        index.closest(images(pictures))


def test_an_index_exchanged_while_open(index, tmp_path, pictures, embedder):
    other = Index.build(pictures.flip(0), embedder=embedder, path=tmp_path / "other", progress=False)
    index.path.rename(tmp_path / "away")
    other.path.rename(index.path)
    with pytest.raises(IndexCorrupt, match="was exchanged since the index was opened"):
        index.closest(images(pictures))


def test_a_file_that_went_away(index, pictures):
    index.closest(images(pictures))
    (index.path / "rows.f16").unlink()
    with pytest.raises(IndexCorrupt, match=r"rows.f16 cannot be read any more"):
        index.closest(images(pictures))


def test_touching_a_file_costs_another_look_and_nothing_else(index, pictures, monkeypatch):
    hashed = []

    def counting(*arguments):
        hashed.append(arguments)
        check_hashes(*arguments)

    monkeypatch.setattr("amg.index.seal.check_hashes", counting)
    for _ in range(3):
        index.closest(images(pictures))
    assert len(hashed) == 1, "once, then the file system is asked"
    os.utime(index.path / "rows.f16")
    index.closest(images(pictures))
    assert len(hashed) == 2


def test_rows_that_are_no_unit_vectors(index, pictures, embedder):
    """A manifest that agrees with its files does not make a row of length 0.3 one that can be found."""
    rows = np.fromfile(index.path / "rows.f16", dtype=np.float16).reshape(80, -1)
    rows[17] *= 0.3
    overwrite(index.path / "rows.f16", rows.tobytes())
    manifest = read_manifest(index.path)
    files = {**manifest.files, "rows.f16": file_record(index.path / "rows.f16")}
    write_manifest(index.path, replace(manifest, files=files))
    with pytest.raises(IndexCorrupt, match=r"must hold unit vectors, row 17 has norm 0\.3"):
        Index.open(index.path, embedder).closest(images(pictures))


def test_a_manifest_that_names_files_elsewhere(index):
    manifest = read_manifest(index.path)
    files = {**manifest.files, "../secret": file_record(index.path / "rows.f16")}
    write_manifest(index.path, replace(manifest, files=files))
    with pytest.raises(IndexCorrupt, match=r"outside the index.*\.\./secret"):
        Index.open(index.path)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are read against their hashes."""
    names, sha256_of = [], seal.sha256_of

    def counting(path):
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(seal, "sha256_of", counting)
    return names


def test_a_file_is_hashed_once_however_often_its_index_is_opened(index, pictures, embedder, hashed):
    Index.open(index.path, embedder).closest(images(pictures))
    assert sorted(hashed) == sorted(index.manifest.files)
    Index.open(index.path, embedder).closest(images(pictures))
    assert sorted(hashed) == sorted(index.manifest.files), "another opening reads nothing"
    os.utime(index.path / "codes.i8")
    Index.open(index.path, embedder).closest(images(pictures))
    assert hashed[len(index.manifest.files) :] == ["codes.i8"], "the file that was touched, alone"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_knows_what_was_hashed_and_sees_what_changes(index, pictures, embedder, hashed):
    Index.open(index.path, embedder).closest(images(pictures))
    hashed.clear()
    code = 1
    if (child := os.fork()) == 0:
        try:
            Index.open(index.path, embedder).seal.check()
            code = 2 if hashed else 3
            overwrite(index.path / "rows.f16", bytes(200))
            with pytest.raises(IndexCorrupt, match=r"rows\.f16 was changed"):
                Index.open(index.path, embedder).seal.check()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_write_within_the_tick_of_the_clock_is_seen(index, pictures, monkeypatch):
    """Many file systems state times to some milliseconds: written in the tick it was read in, a file would
    look as it did."""
    exact, tick = seal._stamp, 15_000_000

    def coarse(path):
        *others, modified, changed = exact(path)
        return (*others, modified // tick * tick, changed // tick * tick)

    monkeypatch.setattr(seal, "_stamp", coarse)
    rows = index.path / "rows.f16"
    good = rows.read_bytes()
    opened = Index.open(index.path)
    for _ in range(4):
        overwrite(rows, good)
        opened.seal.check()
        overwrite(rows, bytes(200))
        with pytest.raises(IndexCorrupt, match=r"rows\.f16 was changed"):
            opened.seal.check()


def test_by_size_nothing_is_hashed_and_every_verdict_says_so(index, pictures, embedder, hashed):
    opened = Index.open(index.path, embedder, trust="size")
    (verdict,) = amg.check(pictures[:1].float() / 255, opened)
    assert hashed == [] and verdict.memorized and verdict.trust == "size"
    assert "index not read against its hashes" in str(verdict)
    assert amg.Verdict.from_dict(verdict.as_dict()) == verdict
    for other in (copy.deepcopy(opened), pickle.loads(pickle.dumps(opened)), opened.attach(embedder)):
        assert other.trust == "size"
    (sure,) = amg.check(pictures[:1].float() / 255, Index.open(index.path, embedder))
    assert sure.trust == "hashes" and "hashes" not in str(sure) and sure.similarity == verdict.similarity


def test_by_size_codes_of_other_rows_hide_nothing(index, pictures, embedder):
    codes = np.fromfile(index.path / "codes.i8", dtype=np.int8).reshape(-1, 16 * 32)  # groups of one panel
    overwrite(index.path / "codes.i8", np.concatenate([codes[:5][::-1], codes[5:]]).tobytes())
    found = Index.open(index.path, embedder, trust="size").closest(images(pictures))
    assert found.row.tolist() == [0, 1, 2] and float(found.similarity.min()) > 0.999


def test_by_size_a_file_written_to_since_is_hashed(index, pictures, embedder, hashed):
    opened = Index.open(index.path, embedder, trust="size")
    opened.closest(images(pictures))
    os.utime(index.path / "guard.f16")
    opened.closest(images(pictures))
    assert hashed == ["guard.f16"]
    overwrite(index.path / "rows.f16", bytes(200))
    with pytest.raises(IndexCorrupt, match=r"rows\.f16 was changed or damaged"):
        opened.closest(images(pictures))


def test_by_size_rows_of_zeros_are_seen_all_the_same(index, pictures, embedder):
    """What a copy leaves that was preallocated and cut short."""
    overwrite(index.path / "rows.f16", bytes(1000))
    opened = Index.open(index.path, embedder, trust="size")
    with pytest.raises(IndexCorrupt, match=r"rows\.f16 must hold unit vectors, row 0 has norm 0"):
        opened.closest(images(pictures))


def test_another_trust_is_refused(index):
    with pytest.raises(ValueError, match='`trust` must be "hashes" or "size", got None'):
        Index.open(index.path, trust=None)


@pytest.mark.parametrize("ask", ["search", "nearest", "verify", "ids"])
def test_an_index_exchanged_while_open_answers_nobody(index, tmp_path, pictures, embedder, ask):
    """Rows of one index with ids of another."""
    other = Index.build(pictures.flip(0), embedder=embedder, path=tmp_path / "other", progress=False)
    index.path.rename(tmp_path / "away")
    other.path.rename(index.path)
    opened = index.attach(embedder)
    asked = {
        "search": lambda: opened.search(pictures[:1]),
        "nearest": lambda: opened.nearest(opened.encode(images(pictures))),
        "verify": opened.verify,
        "ids": lambda: opened.ids,
    }
    with pytest.raises(IndexCorrupt, match="was exchanged since the index was opened"):
        asked[ask]()


@pytest.mark.parametrize("name", ["rows.f16", "codes.i8", "codes.errors.f32"])
@pytest.mark.parametrize("ask", ["search", "nearest"])
def test_a_file_cut_short_while_mapped_ends_no_process(index, pictures, embedder, ask, name):
    vectors = index.encode(images(pictures))
    os.truncate(index.path / name, 0)
    with pytest.raises(IndexCorrupt, match=rf"{name} has 0 bytes, \d+ when the index was opened"):
        getattr(index, ask)(vectors)


@pytest.mark.parametrize("name", ["letter.txt", "manifest.json", "..", "", "ROWS.f16"])
def test_a_manifest_that_names_what_no_index_has(index, name):
    """Its sha256 would be told to whoever opens the index."""
    (index.path / "letter.txt").write_text("dear all")
    manifest = read_manifest(index.path)
    files = {**manifest.files, name: file_record(index.path / "rows.f16")}
    write_manifest(index.path, replace(manifest, files=files))
    with pytest.raises(IndexCorrupt, match=r"`files` must name files of an index, got"):
        Index.open(index.path, verify=True)


@pytest.mark.parametrize("dictionary", [True, False])
def test_metadata_that_unpacks_to_far_more_than_its_rows_hold(index, monkeypatch, dictionary):
    """Kilobytes on disk, gigabytes in memory."""
    monkeypatch.setattr("amg.index.store.MOST_TEXT", 1 << 12)
    pq = pytest.importorskip("pyarrow.parquet")
    path = index.path / "meta.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("caption")
    table = table.set_column(place, "caption", [["x" * (1 << 14)] * len(table)])
    pq.write_table(table, path, compression="zstd", use_dictionary=dictionary)
    manifest = read_manifest(index.path)
    files = {**manifest.files, "meta.parquet": file_record(path)}
    write_manifest(index.path, replace(manifest, files=files))
    assert path.stat().st_size < 1 << 14
    with pytest.raises(IndexCorrupt, match=r"meta\.parquet must hold at most 4,096 bytes a row, .*got"):
        _ = Index.open(index.path).captions
