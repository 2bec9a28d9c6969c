"""A build empties and removes only directories of its own."""

import contextlib
import errno
import json
import os
import stat
from pathlib import Path

import pytest

from amg.index import Index, IndexBuildError, gc
from amg.index.claim import MARKER, claimed, empty, remove
from amg.index.store import TEMPORARY, write_atomically

pytest.importorskip("pyarrow")


@pytest.fixture
def somebodys(tmp_path) -> Path:
    """A folder of somebody's, with a folder and a link in it."""
    folder = tmp_path / "photographs"
    (folder / "2019").mkdir(parents=True)
    (folder / "2019" / "cat.raw").write_bytes(b"the only copy")
    (folder / "letter.txt").write_text("dear all")
    (folder / "link").symlink_to(folder / "2019")
    return folder


def content(folder: Path) -> dict:
    files = {str(path.relative_to(folder)): path.lstat().st_mode for path in sorted(folder.rglob("*"))}
    files |= {name: (folder / name).read_bytes() for name in files if (folder / name).is_file()}
    return files | {".": folder.stat().st_mode}


def build(pictures, path, **options):
    return Index.build(pictures, path=path, progress=False, **options)


def failing(pictures):
    """Images of which the second is none, so that the build fails."""
    from PIL.Image import fromarray

    yield fromarray(pictures[0].permute(1, 2, 0).numpy())
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_somebody_s_directory_survives(tmp_path, pictures, somebodys, resume, fails, kind):
    partial = tmp_path / "X.amg.partial"
    partial.symlink_to(somebodys) if kind == "link" else somebodys.rename(partial)
    before = content(partial)
    with pytest.raises(IndexBuildError, match=r"X\.amg\.partial must be a directory of amg's own, got"):
        build(failing(pictures) if fails else pictures, tmp_path / "X.amg", resume=resume)
    assert content(partial) == before and partial.is_symlink() == (kind == "link")
    assert not (tmp_path / "X.amg").exists()


@pytest.mark.parametrize("name", ["state.json", "rows.u8", "manifest.json", ".hidden", MARKER + "x"])
def test_a_name_of_ours_does_not_make_it_ours(tmp_path, pictures, name):
    partial = tmp_path / "X.amg.partial"
    partial.mkdir()
    (partial / name).write_text('{"position": 3}')
    with pytest.raises(IndexBuildError, match="nothing in it was touched"):
        build(pictures, tmp_path / "X.amg", resume=False)
    assert (partial / name).read_text() == '{"position": 3}'


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_no_directory_is_refused(tmp_path, pictures, kind):
    partial = tmp_path / "X.amg.partial"
    partial.write_text("mine") if kind == "file" else partial.symlink_to(tmp_path / "nowhere")
    with pytest.raises(IndexBuildError, match="must be a directory of amg's own"):
        build(pictures, tmp_path / "X.amg")
    assert not (tmp_path / "nowhere").exists() and os.path.lexists(partial)


def test_a_path_that_is_a_link_to_nothing_is_refused_at_once(tmp_path, pictures):
    (tmp_path / "X.amg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(IndexBuildError, match="`path` is a link to nothing"):
        build(pictures, tmp_path / "X.amg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["X.amg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_user_s_directory_is_refused(tmp_path, pictures):
    partial = tmp_path / "X.amg.partial"
    partial.mkdir()
    os.chown(partial, 12345, -1)
    with pytest.raises(IndexBuildError, match="got one of user 12345"):
        build(pictures, tmp_path / "X.amg")
    assert partial.is_dir() and not list(partial.iterdir())


def stopping(pictures, at):
    from PIL.Image import fromarray

    for position, image in enumerate(pictures):
        if position == at:
            raise KeyboardInterrupt
        yield fromarray(image.permute(1, 2, 0).numpy())


@pytest.fixture
def interrupted(tmp_path, monkeypatch, pictures) -> Path:
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 16)
    with pytest.raises(KeyboardInterrupt):
        build(stopping(pictures, 40), tmp_path / "X.amg", batch_size=16)
    return tmp_path / "X.amg.partial"


def test_our_own_is_marked_private_and_becomes_a_usual_directory(interrupted, pictures, tmp_path):
    assert stat.S_IMODE(interrupted.stat().st_mode) == 0o700 and (interrupted / MARKER).is_file()
    index = build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16)
    (tmp_path / "usual").mkdir()
    assert index.path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert not interrupted.exists() and not (index.path / MARKER).exists() and index.count == 80


def test_a_partial_build_of_an_earlier_version_goes_on(interrupted, pictures, tmp_path):
    (interrupted / MARKER).unlink()
    interrupted.chmod(0o755)
    assert json.loads((interrupted / "state.json").read_text())["position"] == 32
    index = build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16)
    assert index.count == 80 and stat.S_IMODE(index.path.stat().st_mode) == 0o755


def test_a_partial_build_of_an_earlier_version_can_be_discarded(interrupted, pictures, tmp_path):
    (interrupted / MARKER).unlink()
    assert build(pictures, tmp_path / "X.amg", resume=False).count == 80


def test_an_empty_directory_may_be_used_and_a_failed_build_leaves_nothing(tmp_path, pictures):
    (tmp_path / "X.amg.partial").mkdir()
    with pytest.raises(OSError, match="disk full"):
        build(failing(pictures), tmp_path / "X.amg")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "X.amg.partial").mkdir()
    (tmp_path / "X.amg.partial" / MARKER).write_text("")  # killed while the marker was written
    assert build(pictures, tmp_path / "X.amg").count == 80
    (tmp_path / "Y.amg.partial").mkdir()
    (tmp_path / "Y.amg.partial" / f"{TEMPORARY}0123456789abcdef").write_text("{")  # before it had its name
    assert build(pictures, tmp_path / "Y.amg").count == 80


def test_a_disk_that_is_full_before_the_marker_leaves_nothing(tmp_path, pictures, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("amg.index.claim.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        build(pictures, tmp_path / "X.amg")
    assert list(tmp_path.iterdir()) == []


def test_links_in_our_own_directory_are_not_followed(tmp_path, somebodys):
    before, own = content(somebodys), tmp_path / "own"
    with claimed(own, lambda: False):
        (own / "link").symlink_to(somebodys)
        (own / "folder").mkdir()
        empty(own)
        assert [path.name for path in own.iterdir()] == [MARKER]
        (own / "link").symlink_to(somebodys)
        remove(own)
    assert content(somebodys) == before and not own.exists()


def test_a_directory_that_is_not_held_is_never_emptied(somebodys):
    before = content(somebodys)
    for act in (empty, remove):
        with contextlib.suppress(RuntimeError):
            act(somebodys)
        assert content(somebodys) == before


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_is_written_through_no_link(tmp_path, mask):
    """Whatever lies beside it under a name that a temporary file might have."""
    precious, target = tmp_path / "precious", tmp_path / "manifest.json"
    precious.write_text("mine")
    for name in ("manifest.json.tmp", "manifest.json~", ".manifest.json.tmp"):
        (tmp_path / name).symlink_to(precious)
    target.symlink_to(precious)
    before = os.umask(mask)
    try:
        write_atomically(target, "ours")
    finally:
        os.umask(before)
    assert precious.read_text() == "mine" and target.read_text() == "ours" and not target.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    assert len(list(tmp_path.iterdir())) == 5


def test_a_link_under_the_temporary_name_itself_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr("amg.index.store.secrets.token_hex", lambda size: "known")
    (tmp_path / (TEMPORARY + "known")).symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "manifest.json", "ours")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("text", ["half a pair \ud800", None])
def test_a_failed_write_leaves_what_was_there(tmp_path, text):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises((UnicodeEncodeError, TypeError)):
        write_atomically(tmp_path / "a.json", text)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_links_beside_the_files_of_a_build_are_not_written_through(tmp_path, pictures):
    precious, partial = tmp_path / "precious", tmp_path / "X.amg.partial"
    precious.write_text("mine")
    partial.mkdir()
    for name in (MARKER, "state.json", "manifest.json"):
        (partial / f"{name}.tmp").symlink_to(precious)
    with pytest.raises(IndexBuildError, match="nothing in it was touched"):
        build(pictures, tmp_path / "X.amg")
    (partial / MARKER).write_text(json.dumps({"format": "amg unfinished directory", "mode": 0o755}))
    index = build(pictures, tmp_path / "X.amg")
    assert precious.read_text() == "mine" and index.count == 80
    assert not [file.name for file in index.path.iterdir() if file.is_symlink()]


def test_what_a_killed_write_left_is_not_in_the_index(interrupted, pictures, tmp_path):
    (interrupted / (TEMPORARY + "0123")).write_text("{")
    index = build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16)
    assert not [file.name for file in index.path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize("mode", [0o4777, 0o7777, 0o2775, 0o777, 0o755])
def test_a_marker_gives_no_more_than_the_umask_does(tmp_path, pictures, mode, mask):
    partial = tmp_path / "X.amg.partial"
    partial.mkdir()
    (partial / MARKER).write_text(json.dumps({"format": "amg unfinished directory", "mode": mode}))
    before = os.umask(mask)
    try:
        index = build(pictures, tmp_path / "X.amg")
    finally:
        os.umask(before)
    assert stat.S_IMODE(index.path.stat().st_mode) == mode & 0o777 & ~mask


def test_a_directory_keeps_the_group_of_the_one_it_lies_in(tmp_path, pictures):
    tmp_path.chmod(0o2755)
    assert stat.S_IMODE(build(pictures, tmp_path / "X.amg").path.stat().st_mode) == 0o2755


@pytest.mark.parametrize("mode", [10**30, -1, True, None, "755", 493.0, [], {"a": 1}])
def test_a_marker_with_another_mode_marks_nothing(tmp_path, pictures, mode):
    partial, marker = tmp_path / "X.amg.partial", {"format": "amg unfinished directory", "mode": mode}
    partial.mkdir()
    (partial / MARKER).write_text(json.dumps(marker))
    (partial / "x").write_text("mine")
    with pytest.raises(IndexBuildError, match="nothing in it was touched"):
        build(pictures, tmp_path / "X.amg")
    assert (partial / "x").read_text() == "mine"
    (partial / "x").unlink()  # alone it is one that was cut short
    assert stat.S_IMODE(build(pictures, tmp_path / "X.amg").path.stat().st_mode) == 0o755


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "null", "5", '"x"', '{"format": []}'])
def test_a_marker_of_another_kind_marks_nothing(tmp_path, pictures, content):
    partial = tmp_path / "X.amg.partial"
    partial.mkdir()
    (partial / MARKER).write_text(content)
    (partial / "x").write_text("mine")
    with pytest.raises(IndexBuildError, match="nothing in it was touched"):
        build(pictures, tmp_path / "X.amg")
    assert (partial / "x").read_text() == "mine"


UNUSABLE = [
    *(("identity", value) for value in ([], None, "x")),
    *(("position", value) for value in ("x", -5, 33, 32.0, None, True, 10**30, 0)),
    *(("kept", value) for value in ("x", -1, 31, 33, 0, None, 10**30)),
    *(("shards", value) for value in (3, 1, 0, -1, "2", None, 2.0, 10**9)),
    *(("image_size", value) for value in (5, [], [8], [0, 8], ["8", "8"], [8, 8, 8], "88")),
    *(("dimension", value) for value in (None, 0, "192", 192.0, -192)),
    *(("members", value) for value in ("x", -1, 33, None)),
    *(("last_digest", value) for value in (None, 5, [])),
    *(("all_digest", value) for value in (None, 5, [])),
    ("else", 1),
]


@pytest.mark.parametrize(("field", "value"), UNUSABLE)
def test_a_state_that_cannot_be_is_started_afresh(interrupted, pictures, tmp_path, field, value):
    state = json.loads((interrupted / "state.json").read_text())
    (interrupted / "state.json").write_text(json.dumps({**state, field: value}))
    index = build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16)
    assert index.count == 80 and (index.rows == pictures.flatten(1)).all() and len(index.ids) == 80
    index.verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimension": 191}, r"rows of 191 from images of \(8, 8\), this build makes rows of 192"),
        ({"image_size": None}, "rows of 192 from images of None"),
        ({"image_size": [4, 4]}, r"this build makes rows of 48 from images of \(4, 4\)"),
        ({"members": 1}, "is shorter than the build's state says"),
        ({"identity": {}}, "unfinished build with a different background, batch_size"),
        ({"all_digest": ""}, "`images` changed"),
    ],
)
def test_a_state_of_another_build_is_refused(interrupted, pictures, tmp_path, changes, message):
    state = json.loads((interrupted / "state.json").read_text())
    (interrupted / "state.json").write_text(json.dumps({**state, **changes}))
    with pytest.raises(IndexBuildError, match=message):
        build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16)
    assert not (tmp_path / "X.amg").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"", b"\xff\xfe", b"[]", b"null", b'{"identity": {}}'])
def test_a_state_that_cannot_be_read_is_started_afresh(interrupted, pictures, tmp_path, content):
    (interrupted / "state.json").write_bytes(content)
    assert build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16).count == 80


@pytest.mark.parametrize("damage", ["gone", "cut", "all gone"])
def test_logs_that_are_lost_are_started_afresh(interrupted, pictures, tmp_path, damage):
    log = interrupted / "shards" / "0000000.parquet"
    for file in (interrupted / "shards").iterdir() if damage == "all gone" else [log]:
        file.write_bytes(log.read_bytes()[:-9]) if damage == "cut" else file.unlink()
    index = build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16)
    assert index.count == 80 and len(index.ids) == 80


def test_a_log_that_was_damaged_inside_is_refused(interrupted, pictures, tmp_path):
    log = interrupted / "shards" / "0000000.parquet"
    content = log.read_bytes()
    log.write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    with pytest.raises(IndexBuildError, match=r"0000000\.parquet is damaged"):
        build(stopping(pictures, None), tmp_path / "X.amg", batch_size=16)


@pytest.mark.parametrize("kind", ["folder", "name", "link", "file"])
def test_what_is_not_the_index_s_own_is_no_generation_to_replace_or_to_collect(
    tmp_path, pictures, somebodys, kind
):
    """Where the next generation goes lies something of somebody's."""
    index, place = build(pictures[:60], tmp_path / "X.amg"), tmp_path / "X.amg" / "generation-1"
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(somebodys)
    else:
        somebodys.rename(place)
        if kind == "name":  # one of ours is not enough
            (place / "rows.u8").write_bytes(b"rows")
    before = content(place) if place.is_dir() else place.read_text()
    with pytest.raises(
        IndexBuildError, match=r"generation-1 must be files of this index, got one with .*not"
    ):
        index.extend(pictures[60:], ids=[f"n{number}" for number in range(20)], progress=False)
    assert gc(index.path) == [] and Index.open(index.path).count == 60
    assert (content(place) if place.is_dir() else place.read_text()) == before


def test_a_generation_that_was_never_switched_to_is_replaced(tmp_path, pictures):
    index, ids = build(pictures[:60], tmp_path / "X.amg"), [f"n{number}" for number in range(20)]
    manifest = (index.path / "manifest.json").read_bytes()
    index.extend(pictures[60:], ids=ids, progress=False)
    (index.path / "manifest.json").write_bytes(manifest)  # killed just before
    again = Index.open(index.path).extend(pictures[60:], ids=ids, progress=False)
    assert again.count == 80 and again.manifest.generation == 1
