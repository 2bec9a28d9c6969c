"""`amg index`: what it prints, where errors go, exit codes."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from amg.commands.index import add_parser
from amg.index import Index

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
    assert "4 files" in capsys.readouterr().out
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
        (("search", tmp_path / "bad.png", "--index", built), "bad.png cannot be searched for: not an image"),
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


def test_search_names_what_it_cannot_read_and_answers_the_rest(built, folder, tmp_path, capsys):
    capsys.readouterr()
    whole = (folder / "a" / "2.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "fake.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    bad = [tmp_path / "cut.png", tmp_path / "fake.png", tmp_path / "none.png", tmp_path]
    files = [bad[0], folder / "a" / "2.png", *bad[1:], folder / "b" / "5.png"]
    assert amg("search", *files, "--index", built) == 2
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == [str(files[1]), str(files[-1])]
    assert "row 2" in printed.out.splitlines()[0] and printed.out.splitlines()[1].endswith("b/5.png")
    errors = printed.err.splitlines()
    assert len(errors) == 4
    for line, file in zip(errors, bad, strict=True):
        assert line.startswith(f"amg index: error: {file} cannot be searched for: ")
    assert "PostScript" in errors[1] and "No such file" in errors[2]


def test_search_by_a_file_treats_it_as_the_build_did(tmp_path, capsys):
    import PIL.Image

    root = tmp_path / "root"
    root.mkdir()
    picture = PIL.Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    picture.save(root / "seen.png")
    first = PIL.Image.new("L", (8, 8), 60)
    first.save(root / "turning.gif", save_all=True, append_images=[PIL.Image.new("L", (8, 8), 9)])
    assert amg("build", root, "--out", tmp_path / "i", "--quiet", "--background", "#00FF00") == 0
    built = capsys.readouterr().out
    assert "note: transparent, composited over #00ff00: 1 (seen.png)" in built
    assert "note: frames after the first: 1 in 1 files, left out (turning.gif)" in built
    assert amg("info", tmp_path / "i") == 0 and capsys.readouterr().out == built
    assert amg("search", root / "seen.png", root / "turning.gif", "--index", tmp_path / "i") == 0
    printed = capsys.readouterr()
    assert [line.split()[3] for line in printed.out.splitlines()] == ["0.0000", "0.0000"]
    assert f"amg index: note: {root / 'turning.gif'}: frames after the first, left out: 1" in printed.err
    assert amg("build", root, "--out", tmp_path / "j", "--background", "mauve") == 2
    assert "`background` must be" in capsys.readouterr().err


def test_what_is_left_out_is_printed_by_reason(tmp_path, folder, capsys):
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / ".DS_Store").write_bytes(b"x")
    for at in range(12):
        (folder / f"odd{at:02d}.heic").write_bytes(b"?")
    (folder / "esc\x1b[31m.jpg").write_bytes(b"?")
    (folder / "a" / "0.txt").write_bytes(b"caf\xe9")
    assert amg("build", folder, "--out", tmp_path / "i", "--quiet") == 0
    built = capsys.readouterr().out
    assert "seen             20 images\nimages           6 (0 folded" in built
    assert "skipped          14 unreadable" in built and "passed over      4 that are no images" in built
    assert "skipped in all, .heic is not read: convert it to PNG, TIFF or JPEG: 12" in built
    assert "skipped esc\\x1b[31m.jpg: not an image" in built and "\x1b" not in built
    assert "passed over: hidden, or the system's own: 1 (.DS_Store)" in built
    assert "passed over: captions beside a picture: 3 (a/0.txt, a/2.txt, b/4.txt)" in built
    assert "note: caption bytes that are not UTF-8, replaced: 1 (a/0.txt)" in built
    assert amg("info", tmp_path / "i") == 0 and capsys.readouterr().out == built
    assert amg("info", tmp_path / "i", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert sum(record["passed_over"].values()) == 4 and len(record["skipped"]) == 14
