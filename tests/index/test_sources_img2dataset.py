"""img2dataset's three kinds of output, with the tables that say which downloads failed."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from amg.index import IndexBuildError
from amg.index.sources.status import GONE

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
SUCCESS, LOST, SMALL = "success", "failed_to_download", "failed_to_resize"
STATUSES = [SUCCESS, LOST, SUCCESS, SUCCESS, SMALL, SUCCESS]  # of each shard


def output(root: Path, pictures: torch.Tensor, png, kind: str, shards: int = 2) -> Path:
    """What img2dataset leaves: `shards` of six rows each, of which four were downloaded."""
    import pyarrow.parquet

    root.mkdir()
    for shard in range(shards):
        rows, members = [], {}
        for at, status in enumerate(STATUSES):
            number = 6 * shard + at
            key = f"{shard:05d}{at:04d}"
            caption = f"caption {number}"
            row = {"url": f"http://x/{number}.jpg", "caption": caption, "key": key, "status": status}
            row |= {"error_message": None if status == SUCCESS else f"HTTP Error {404 + at}"}
            row |= {"width": 8 if status == SUCCESS else None, "sha256": "0" * 64}
            content = png(pictures[number]) if status == SUCCESS else None
            if kind == "parquet":
                row["jpg"] = content
            elif content is not None:
                members |= {f"{key}.jpg": content, f"{key}.txt": caption.encode()}
                members[f"{key}.json"] = json.dumps(row).encode()
            rows.append(row)
        name = f"{shard:05d}"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{name}.parquet")
        (root / f"{name}_stats.json").write_text(json.dumps({"count": 6, "successes": 4}))
        if kind == "files":
            (root / name).mkdir()
            for member, content in members.items():
                (root / name / member).write_bytes(content)
        elif kind == "webdataset":
            with tarfile.open(root / f"{name}.tar", "w") as archive:
                for member, content in members.items():
                    (root / "part").write_bytes(content)
                    archive.add(root / "part", member)
            (root / "part").unlink()
    return root


DOWNLOADED = [6 * shard + at for shard in range(2) for at, status in enumerate(STATUSES) if status == SUCCESS]


@pytest.mark.parametrize("kind", ["files", "webdataset", "parquet"])
def test_pictures_captions_and_failed_downloads(tmp_path, pictures, png, make, kind):
    root = output(tmp_path / "laion", pictures, png, kind)
    index = make(root)
    assert torch.equal(index.rows, pictures[DOWNLOADED].flatten(1))
    assert index.captions == [f"caption {number}" for number in DOWNLOADED]
    covered = index.manifest.coverage
    assert covered.skipped == {f"img2dataset: {LOST}": 2, f"img2dataset: {SMALL}": 2}
    assert (covered.seen, covered.indexed, covered.folded) == (12, 8, 0) and index.coverage == 8 / 12
    named = {entry.id for entry in index.manifest.skipped}
    keys = {"000000001", "000000004", "000010001", "000010004"}
    if kind == "parquet":
        assert named == {f"0000{shard}.parquet#{row}" for shard in range(2) for row in (1, 4)}
    else:
        assert {name.rpartition("/")[2] for name in named} == keys
    assert make(root, on_error="raise").count == 8, "a download that failed is no damaged file"


@pytest.mark.parametrize("kind", ["files", "webdataset", "parquet"])
def test_an_interrupted_build_resumes_to_the_same_bytes(tmp_path, pictures, png, interrupted_twice, kind):
    root = output(tmp_path / "laion", pictures, png, kind)
    assert torch.equal(interrupted_twice(lambda: root, tmp_path).rows, pictures[DOWNLOADED].flatten(1))


def test_downloaded_pictures_that_are_gone_are_counted(tmp_path, pictures, png, make):
    root = output(tmp_path / "laion", pictures, png, "files", shards=1)
    (root / "00000" / "000000002.jpg").unlink()
    index = make(root)
    assert index.count == 3 and index.manifest.coverage.skipped[GONE] == 1
    assert index.coverage == 3 / 6


def test_one_shard_alone_knows_its_table(tmp_path, pictures, png, make):
    root = output(tmp_path / "laion", pictures, png, "webdataset")
    index = make(root / "00001.tar")
    assert index.count == 4 and index.coverage == 4 / 6 and index.ids[0] == "00001.tar/000010000.jpg"
    both = make([root / "00000.tar", root / "00001.tar"])
    assert both.count == 8 and both.coverage == 8 / 12


def test_a_table_whose_pictures_are_all_gone(tmp_path, pictures, png, make):
    import shutil

    root = output(tmp_path / "laion", pictures, png, "files")
    shutil.rmtree(root / "00001")
    index = make(root)
    assert index.count == 4 and index.manifest.coverage.skipped[GONE] == 4
    shutil.rmtree(root / "00000")
    with pytest.raises(IndexBuildError, match="none of the first 12 could be read"):
        make(root)


def test_captions_of_json_alone(tmp_path, pictures, png, make):
    root = output(tmp_path / "laion", pictures, png, "files", shards=1)
    for text in (root / "00000").glob("*.txt"):
        text.unlink()
    assert make(root).captions == [f"caption {number}" for number in DOWNLOADED[:4]]
