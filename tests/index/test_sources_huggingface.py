"""Hugging Face's ways to keep pictures: image folders with metadata, datasets saved to disk, Parquet."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from amg.index import IndexBuildError
from amg.index.sources.directory import CACHES, NO_IMAGES
from amg.index.sources.table import OTHER_COLUMNS

pyarrow = pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
NAMES = ["a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png"]


def to_pil(picture: torch.Tensor):
    return PIL.fromarray(picture.permute(1, 2, 0).numpy())


def write_parquet(path: Path, columns: dict) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def metadata(kind: str, rows: list[dict], field: str = "file_name") -> bytes:
    """Rows of a name and a text as a metadata file."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()
    content = io.BytesIO()
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("named", [False, True])
def test_metadata_of_an_image_folder(tmp_path, folder, make, kind, named):
    rows = [{"file_name": name, "text": f'"{name}", said\nso', "size": 3} for name in NAMES]
    (folder / f"metadata.{kind}").write_bytes(metadata(kind, rows))
    index = make(folder, "text" if named else None)
    assert index.ids == NAMES and index.captions == [f'"{name}", said\nso' for name in NAMES]
    assert index.coverage == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_metadata_with_a_bom(folder, make, kind, encoding):
    rows = [{"file_name": name, "text": f"é {name}"} for name in NAMES]
    content = metadata(kind, rows).decode().encode(encoding)
    (folder / f"metadata.{kind}").write_bytes(content)
    assert make(folder).captions == [f"é {name}" for name in NAMES]


def test_metadata_in_each_split_with_missing_and_unnamed_pictures(folder, make):
    (folder / "a" / "metadata.csv").write_text("file_name,caption\n0.png,zero\n./2.png,two\ngone.png,lost\n")
    (folder / "b" / "metadata.jsonl").write_text('{"file_name": "3.png", "text": ""}\n\n')
    index = make(folder)
    assert index.captions == ["zero", None, "two", None, "picture 4", None]
    assert [(entry.id, entry.reason) for entry in index.manifest.skipped] == [
        ("a/gone.png", "named in metadata.csv, not there")
    ]
    assert index.coverage == 6 / 7
    with pytest.raises(IndexBuildError, match=r"names 'text'; a/metadata\.csv:2 has file_name, caption"):
        make(folder, "text")


def test_metadata_never_leads_out_of_the_folder(tmp_path, folder, pictures, png, make):
    (tmp_path / "secret.png").write_bytes(png(pictures[9]))
    rows = [{"file_name": name, "text": "x"} for name in ("../secret.png", str(tmp_path / "secret.png"))]
    (folder / "metadata.jsonl").write_bytes(metadata("jsonl", rows))
    index = make(folder)
    assert index.count == 6 and index.coverage == 6 / 8


def test_a_line_of_metadata_that_is_none_is_named(folder, make):
    (folder / "metadata.jsonl").write_text('{"file_name": "a/0.png", "text": "x"}\n{oops\n')
    with pytest.raises(IndexBuildError, match=r"metadata\.jsonl:2 is not valid JSON"):
        make(folder)


def test_tables_without_pictures_are_passed_over(folder, make):
    write_parquet(folder / "latents.parquet", {"latent": [1.0, 2.0]})
    (folder / "metadata.csv").write_text("photographer,year\nx,1990\n")
    index = make(folder)
    assert index.count == 6 and index.manifest.passed_over[NO_IMAGES] == 1
    assert index.manifest.passed_over["text or tables"] == 1
    with pytest.raises(IndexBuildError, match="`captions` names a Parquet column or a field"):
        make(folder, "text")


@pytest.mark.parametrize("stored", ["saved", "dict", "shards"])
def test_datasets_saved_to_disk(tmp_path, pictures, make, stored):
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [to_pil(picture) for picture in pictures[:12]],
        "text": [f"t {at}" for at in range(12)],
    }
    whole = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if stored == "dict":
        parts = {"train": whole.select(range(8)), "test": whole.select(range(8, 12))}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
        order = [*range(8, 12), *range(8)]
    else:
        whole.save_to_disk(str(tmp_path / "d"), num_shards=3 if stored == "shards" else 1)
        order = list(range(12))
        shutil.copy(next((tmp_path / "d").glob("*.arrow")), tmp_path / "d" / "cache-1f2e.arrow")
    index = make(tmp_path / "d")
    assert torch.equal(index.rows, pictures[order].flatten(1))
    assert index.captions == [f"t {at}" for at in order] and index.coverage == 1
    assert index.manifest.passed_over.get(CACHES, 0) == (stored != "dict")
    if stored == "dict":
        train = make(tmp_path / "d" / "train")
        assert torch.equal(train.rows, pictures[:8].flatten(1))


def test_a_selection_that_was_saved_is_what_is_read(tmp_path, pictures, make):
    datasets = pytest.importorskip("datasets")
    images = [to_pil(picture) for picture in pictures[:12]]
    whole = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    whole.select([9, 1, 4]).save_to_disk(str(tmp_path / "d"))
    assert torch.equal(make(tmp_path / "d").rows, pictures[[9, 1, 4]].flatten(1))


def test_datasets_in_memory(pictures, make):
    datasets = pytest.importorskip("datasets")
    columns = {"label": [*range(6)], "image": [to_pil(picture) for picture in pictures[:6]]}
    columns["caption"] = [f"t {at}" for at in range(6)]
    whole = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for images in (
        whole,
        whole.to_iterable_dataset(),
        whole.with_format("torch"),
        whole.with_format("numpy"),
    ):
        index = make(images)
        assert torch.equal(index.rows, pictures[:6].flatten(1))
        assert index.captions == [f"t {at}" for at in range(6)]
    index = make(datasets.DatasetDict(train=whole.select([0, 1, 2]), test=whole.select([3, 4, 5])))
    assert torch.equal(index.rows, pictures[:6].flatten(1)) and index.ids[3] == "test/0"
    assert make(whole, "label").captions == [*"012345"]


def test_an_interrupted_build_of_arrow_files_resumes(tmp_path, pictures, interrupted_twice):
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [to_pil(picture) for picture in pictures[:14]],
        "text": [f"t {at}" for at in range(14)],
    }
    whole = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    whole.save_to_disk(str(tmp_path / "d"), num_shards=3)
    index = interrupted_twice(lambda: tmp_path / "d", tmp_path)
    assert torch.equal(index.rows, pictures[:14].flatten(1)) and index.captions[13] == "t 13"


def test_captions_of_parquet_by_their_usual_names(tmp_path, pictures, png, make):
    cells = [png(picture) for picture in pictures[:2]]
    for name in ("text", "caption", "TEXT", "prompt"):
        index = make(
            write_parquet(tmp_path / f"{name}.parquet", {"jpg": cells, name: ["x", "y"], "n": [1, 2]})
        )
        assert index.captions == ["x", "y"], name
    both = {"jpg": cells, "prompt": ["p", "q"], "caption": ["x", "y"]}
    assert make(write_parquet(tmp_path / "both.parquet", both)).captions == ["x", "y"]
    assert make(tmp_path / "both.parquet", "prompt").captions == ["p", "q"]
    odd = {"jpg": cells, "text": [{"en": "a"}, {"en": "b"}]}
    assert make(write_parquet(tmp_path / "odd.parquet", odd)).captions == [None, None]


def test_several_image_columns(tmp_path, pictures, png, make):
    first, second = ([png(picture) for picture in pictures[at : at + 3]] for at in (0, 3))
    table = write_parquet(tmp_path / "a.parquet", {"image": first, "conditioning_image": second})
    index = make(table)
    assert torch.equal(index.rows, pictures[:3].flatten(1))
    assert index.manifest.passed_over == {OTHER_COLUMNS: 3}
    assert index.manifest.examples[OTHER_COLUMNS] == ["a.parquet: conditioning_image"]
    other = make(table, image_column="conditioning_image")
    assert torch.equal(other.rows, pictures[3:6].flatten(1))
    unclear = write_parquet(tmp_path / "b.parquet", {"jpg_0": first, "jpg_1": second})
    with pytest.raises(IndexBuildError, match=r"several image columns among .*`image_column` to say which"):
        make(unclear)
    assert torch.equal(make(unclear, image_column="jpg_1").rows, pictures[3:6].flatten(1))
    with pytest.raises(IndexBuildError, match="no image column 'jpg_2' among"):
        make(unclear, image_column="jpg_2")


def test_rows_with_a_path_alone(tmp_path, pictures, png, make):
    root = tmp_path / "root"
    root.mkdir()
    (root / "0.png").write_bytes(png(pictures[0]))
    (tmp_path / "outside.png").write_bytes(png(pictures[1]))
    cells = [{"bytes": None, "path": path} for path in ("0.png", "../outside.png", "gone.png", None)]
    cells.append({"bytes": png(pictures[2]), "path": "../outside.png"})
    index = make(write_parquet(root / "t.parquet", {"image": cells}), near_duplicate=False)
    assert torch.equal(index.rows, pictures[[0, 2]].flatten(1)) and index.coverage == 2 / 5


def test_empty_tables_among_others(tmp_path, pictures, png, make):
    root = tmp_path / "root"
    root.mkdir()
    write_parquet(root / "0.parquet", {"image": pyarrow.array([], pyarrow.binary())})
    write_parquet(root / "1.parquet", {"image": [png(pictures[0])]})
    assert make(root).count == 1


def test_pictures_and_parquet_in_one_folder_are_both_read(folder, pictures, png, make):
    write_parquet(folder / "more.parquet", {"image": [png(pictures[9])], "text": ["nine"]})
    index = make(folder)
    assert index.count == 7 and index.ids[-1] == "more.parquet#0" and index.captions[-1] == "nine"
    assert make(folder, "text").captions[-1] == "nine"
