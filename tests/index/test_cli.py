"""`amg index`: what it prints, where errors go, exit codes."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from amg.index import Index
from amg.index.cli import add_parser

pytest.importorskip("pyarrow")
pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


def amg(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="amg")
    add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["index", *map(str, words)])
    return arguments.run(arguments)


@pytest.fixture
def built(tmp_path, folder, capsys) -> Path:
    shutil.copy(folder / "a" / "0.png", folder / "b" / "9.png")
    (folder / "b" / "7.png").write_bytes(b"?")
    assert amg("build", folder, "--out", tmp_path / "i.amg", "--quiet") == 0
    return tmp_path / "i.amg"


def test_build_and_info(built, capsys):
    printed = capsys.readouterr().out
    assert "rows             6 of 192 uint8" in printed
    assert "images           7 (1 folded as duplicates)" in printed
    assert "skipped          1 unreadable" in printed and "skipped b/7.png: not an image" in printed
    assert amg("info", built) == 0
    assert capsys.readouterr().out == printed
    assert amg("info", built, "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["count"] == 6 and manifest["metric"] == "nl2" and manifest["image_size"] == [8, 8]


def test_verify(built, capsys):
    assert amg("verify", built) == 0
    assert "3 files" in capsys.readouterr().out
    rows = bytearray((built / "rows.u8").read_bytes())
    rows[5] ^= 1
    (built / "rows.u8").write_bytes(rows)
    assert amg("verify", built) == 2
    error = capsys.readouterr().err
    assert error.startswith("amg index: error: ") and "rows.u8" in error and error.count("\n") == 1


def test_search(built, folder, capsys):
    capsys.readouterr()
    assert amg("search", folder / "a" / "2.png", folder / "b" / "9.png", "--index", built) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("1.  nL2 0.0000  row 2  a/2.png  'picture 2'")
    assert second.endswith("1.  nL2 0.0000  row 0  a/0.png (2 copies)  'picture 0'")
    assert amg("search", folder / "a" / "1.png", "--index", built, "-k", 3, "--json") == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Index.open(built).search([__import__("PIL.Image").Image.open(folder / "a" / "1.png")], 3)
    assert [hit["row"] for hit in hits] == expected.row[0].tolist() and hits[0]["row"] == 1
    assert [hit["rank"] for hit in hits] == [1, 2, 3]


def test_errors_are_one_line_and_exit_code_2(built, tmp_path, folder, capsys):
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"?")
    for words, message in [
        (("build", tmp_path / "empty", "--out", tmp_path / "o"), "folder without images"),
        (("build", folder, "--out", built), "exists already"),
        (("build", folder, "--out", tmp_path / "o", "--strict", "--quiet"), "b/7.png cannot be read"),
        (("build", folder, "--out", tmp_path / "o", "--embedder", "nonsense"), "nonsense"),
        (("build", folder, "--out", tmp_path / "o", "--captions", tmp_path / "no.jsonl"), "does not exist"),
        (("info", tmp_path / "nowhere"), "no index at"),
        (("search", tmp_path / "bad.png", "--index", built), "cannot identify"),
        (("search", tmp_path / "no.png", "--index", built), "no.png"),
        (("search", folder / "a" / "1.png", "--index", built, "-k", 99), "`k` must be in [1, 6]"),
        (("search", folder / "a" / "1.png", "--index", built, "--searcher", "x"), "`searcher` must be"),
    ]:
        assert amg(*words) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


@pytest.mark.parametrize(
    "words", [("--size", "0"), ("--size", "8x"), ("--near-duplicate", "x"), ("--dtype", "int8")]
)
def test_arguments_are_checked(words, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        amg("build", tmp_path, "--out", tmp_path / "o", *words)
    assert exit_.value.code == 2


def test_size_near_duplicate_and_captions_reach_the_build(tmp_path, folder, capsys):
    lines = tmp_path / "c.jsonl"
    lines.write_text("".join(json.dumps({"index": at, "caption": f"n{at}"}) + "\n" for at in range(6)))
    out = tmp_path / "o.amg"
    words = ("--size", "4x6", "--near-duplicate", "off", "--captions", lines, "--quiet")
    assert amg("build", folder, "--out", out, *words) == 0
    index = Index.open(out)
    assert index.image_size == (4, 6) and index.manifest.near_duplicate is None
    assert index.captions == [f"n{at}" for at in range(6)]


def test_the_index_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as exit_:
        amg("--help")
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and "examples:" in printed and "amg index search picture.png" in printed
