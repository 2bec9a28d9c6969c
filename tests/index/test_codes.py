"""The codes of an index on disk: in panels, turned where it helps, and those of earlier versions."""

import dataclasses

import pytest
import torch

import amg.kernels
from amg.index import Index, codes
from amg.index.store import (
    CODE_ERRORS,
    CODE_SCALES,
    CODE_SQUARES,
    CODES,
    file_record,
    read_manifest,
    write_manifest,
)
from amg.kernels import Codes, Panels

pytest.importorskip("pyarrow")


def require_exact(index: Index) -> None:
    """Each of some rows is its own closest, as a float64 search says."""
    queries = index.rows[::7].float()
    rows = index.rows.double()
    wanted = (queries.double() @ rows.T / queries.double().norm(dim=1, keepdim=True)).argmax(1)
    assert torch.equal(index.nearest(queries).row, wanted)


def test_an_index_of_an_earlier_version_opens_and_finds_the_same(tmp_path, pictures, embedder):
    index = Index.build(pictures, None, embedder, tmp_path / "i", progress=False, near_duplicate=False)
    assert isinstance(index.codes, Panels) and index.manifest.version == 3
    found = index.nearest(index.rows.float())
    for name, part in zip(
        (CODES, CODE_SCALES, CODE_ERRORS), amg.kernels.encode_rows(index.rows), strict=True
    ):
        (index.path / name).write_bytes(part.numpy().tobytes())
    (index.path / CODE_SQUARES).unlink()
    files = {name: file_record(index.path / name) for name in index.manifest.files if name != CODE_SQUARES}
    write_manifest(index.path, dataclasses.replace(read_manifest(index.path), version=1, files=files))
    earlier = Index.open(index.path, embedder, verify=True)
    assert isinstance(earlier.codes, Codes)
    again = earlier.nearest(earlier.rows.float())
    assert torch.equal(again.row, found.row) and torch.equal(again.similarity, found.similarity)
    require_exact(earlier)


@pytest.mark.parametrize("decaying", [True, False])
def test_codes_are_turned_where_the_spectrum_decays(tmp_path, monkeypatch, decaying):
    monkeypatch.setattr(codes, "ROWS_A_COLUMN", 1)
    vectors = torch.randn(900, 96)
    if decaying:
        vectors *= (1 - torch.linspace(0, 1, 96)).pow(3).clamp(min=0.01)
    path = tmp_path / "turned"
    with pytest.warns(UserWarning):  # imported vectors have no guard
        index = Index.from_embeddings(vectors, None, "toy", path, near_duplicate=False, progress=False)
    assert (index.codes.rotation is not None) == decaying
    require_exact(index)
