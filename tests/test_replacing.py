"""Files are whole or not there, and a folder has one writer."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest

from amg.index.store import TEMPORARY
from amg.replacing import clear, held, replacing


def test_a_file_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.suffix == ".csv" and partial.parent == tmp_path
    assert path.read_text() == "new" and [one.name for one in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("x")])
def test_after_an_error_nothing_is_left_and_the_old_file_is_as_it_was(tmp_path, error):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_two_writers_do_not_meet(tmp_path):
    """Each is whole at its end, whoever is the last."""
    path, both = tmp_path / "a", threading.Barrier(2)

    def write(letter):
        with replacing(path) as partial:
            both.wait()
            partial.write_text(letter * 100_000)
            both.wait()

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert set(path.read_text()) in ({"a"}, {"b"}) and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_write_left_is_cleared_and_nothing_else(tmp_path):
    for name in (f"{TEMPORARY}00.a.png", "a.png", ".hidden", "b.tmp"):
        (tmp_path / name).write_text("x")
    clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", ".hidden", "b.tmp"}


HOLD = """
import sys
from pathlib import Path
from amg.replacing import held
try:
    with held(Path(sys.argv[1])):
        print("held")
except ValueError as error:
    print(error)
"""


def other(folder):
    run = subprocess.run(
        [sys.executable, "-c", HOLD, str(folder)], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_another_process_is_refused_while_a_folder_is_held(tmp_path):
    folder = tmp_path / "new" / "out"
    with held(folder):
        assert f"`--out` must be a folder that no other run writes to, got {folder}" in other(folder)
    assert other(folder) == "held" and not list(folder.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match=r"`--work` must be a folder, got .*, which is none"):
        held(tmp_path / "out", "--work").__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_goes_on(tmp_path, monkeypatch, number):
    def without(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr("fcntl.flock", without)
    with pytest.warns(UserWarning, match="on a file system without locks"), held(tmp_path):
        pass


def test_any_other_error_is_raised(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(OSError, match="broken"):
        held(tmp_path).__enter__()
