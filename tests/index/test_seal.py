"""An index that is not what its manifest says is refused when it is checked against, not silently
searched."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

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
