"""The page on training sets: its code and its commands run, and its reasons are the real ones."""

import io
import re
import shlex
import tarfile
from pathlib import Path

import numpy
import pytest

from amg.index import Index
from amg.index.sources.listing import DANGLING
from amg.index.sources.lists import NO_FILE, URL
from amg.index.sources.tar import OUT

pyarrow = pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
PAGE = (Path(__file__).parents[2] / "docs" / "training-sets.md").read_text(encoding="utf-8")


@pytest.fixture
def root(tmp_path, pictures, png) -> Path:
    """A set of every kind that the table has a command for, six pictures each."""
    import pyarrow.parquet

    contents = [png(picture) for picture in pictures[:6]]
    for name in ("photos", "shards", "laion", "saved"):
        (tmp_path / name).mkdir()
    for at, content in enumerate(contents):
        (tmp_path / "photos" / f"{at}.png").write_bytes(content)
    for shard in range(100):
        with tarfile.open(tmp_path / "shards" / f"{shard:05d}.tar", "w") as archive:
            for at in range(6) if shard == 0 else ():
                info = tarfile.TarInfo(f"{at}.png")
                info.size = len(contents[at])
                archive.addfile(info, io.BytesIO(contents[at]))
    table = pyarrow.table({"image": contents, "text": [f"t{at}" for at in range(6)]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "laion" / "00000.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "saved" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"photos/{at}.png\n" for at in range(6)))
    numpy.save(tmp_path / "train.npy", pictures[:6].permute(0, 2, 3, 1).numpy())
    return tmp_path


def test_every_command_of_the_table_runs(root, pictures, monkeypatch, capsys):
    from amg.cli import main

    monkeypatch.chdir(root)
    commands = re.findall(r"\| `(amg index build [^`]*)` \|", PAGE)
    assert len(commands) == 10
    for at, command in enumerate(commands):
        words = shlex.split(command.replace("i.amg", f"{at}.amg"))[1:]
        assert main([*words, "--quiet"]) == 0, command
        assert "coverage         100 % of" in capsys.readouterr().out.splitlines()[-1]
        index = Index.open(f"{at}.amg")
        assert index.count == 6 and (index.rows == pictures[:6].flatten(1)).all(), command
    assert index.counts.tolist() == [3] * 6, "the last reads three of them"


def test_the_code_runs(root, pictures, capsys):
    (code,) = re.findall(r"<!-- code: datasets -->\n```python\n(.*?)```", PAGE, re.S)
    (root / "photos" / "9.png").write_bytes(b"?")
    drawn = [PIL.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures[:4]]
    names = {"pictures": drawn, "folder": root}
    exec(code, names)
    assert names["index"].captions == [f"a pet, number {at}" for at in range(4)]
    assert names["both"].ids[0] == "photos/0.png" and names["both"].coverage == 12 / 13
    assert capsys.readouterr().out.startswith("1.0 0.923")


def test_the_code_on_embeddings_runs(tmp_path, pictures, embedder, capsys):
    (code,) = re.findall(r"<!-- code: embeddings -->\n```python\n(.*?)```", PAGE, re.S)
    names = {"folder": tmp_path, "embedder": embedder, "captions": None}
    names["ids"] = [f"{at}.png" for at in range(len(pictures))]
    names["vectors"] = embedder(pictures / 255)
    names["some_pictures"] = {"3.png": pictures[3], "70": pictures[70]}
    exec(code, names)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "80 False" and said[1].startswith("True Imported(pictures=2, cosine=0.99")


@pytest.mark.filterwarnings("ignore:.*were taken out of")
def test_the_code_on_changes_runs(tmp_path, pictures, embedder, capsys):
    (code,) = re.findall(r"<!-- code: change -->\n```python\n(.*?)```", PAGE, re.S)
    for name, some in (("imported.amg", slice(0, 60)), ("more.amg", slice(60, 80))):
        ids = [f"{at}.png" for at in range(80)][some]
        Index.build(pictures[some], None, embedder, tmp_path / name, ids=ids, progress=False)
    Index.build(pictures[:5], path=tmp_path / "photos.amg", ids=list("abcde"), progress=False)
    names = {"folder": tmp_path, "embedder": embedder, "new_pictures": pictures[5:9]}
    exec(code, names)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("0.9666") and "removed, and the model" in said[0]
    assert said[1].startswith("9 1 ['guard.f16', ")
    assert Index.open(tmp_path / "joined.amg").count == 78


def test_the_reasons_are_the_real_ones():
    for reason in (NO_FILE, URL, DANGLING, OUT):
        assert f"`{reason}`" in PAGE, reason
