"""Builds that are killed, run out of disk or change under way."""

import contextlib
import filecmp
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amg.index import Index, IndexBuildError, IndexStorageError

pytest.importorskip("pyarrow")

BUILD = """
import os, resource, signal, sys
import torch
import amg.index.plan
from amg.index import Index

path, stop, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
amg.index.plan.SHARD_IMAGES = 16
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
images = torch.randint(0, 256, (100, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
images[60:70] = images[5:15]

class Embedder:
    name, dimension, sha = "toy", 192, "a" * 64
    seen = 0
    def __call__(self, batch):
        self.seen += len(batch)
        print(self.seen, flush=True)
        if stop and self.seen > stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch.flatten(1) - 0.5

captions = [f"caption {at % 7}" for at in range(100)]
Index.build(images, captions, Embedder(), path, progress=False, batch_size=8)
"""


def run_apart(path: Path, stop: int = 0, limit: int = 0) -> subprocess.CompletedProcess:
    """The build in its own process, killed after `stop` images or with files of at most `limit` bytes."""
    command = [sys.executable, "-c", BUILD, str(path), str(stop), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def run_here(path: Path) -> int:
    """The same build, undisturbed, in this process → images embedded."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("amg.index.plan.SHARD_IMAGES", 16)
        patch.setattr(sys, "argv", ["build", str(path), "0", "0"])
        exec(BUILD, {})
    return int(printed.getvalue().split()[-1])


def write_to_full_disk(*_: object) -> None:
    with open("/dev/full", "wb", buffering=0) as device:
        device.write(b"x")


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The index that an undisturbed build makes."""
    path = tmp_path_factory.mktemp("undisturbed") / "whole"
    assert run_here(path) == 100
    return path


def test_a_killed_build_resumes_to_the_same_bytes(tmp_path, whole):
    killed = tmp_path / "killed"
    assert run_apart(killed, stop=60).returncode == -signal.SIGKILL
    assert not killed.exists()
    state = json.loads((tmp_path / "killed.partial" / "state.json").read_text())
    assert state["position"] == 48 and state["shards"] == 3
    with open(tmp_path / "killed.partial" / "rows.f16", "ab") as rows:
        rows.write(b"half a row")  # what a kill between two writes leaves
    assert run_here(killed) == 52, "48 images were embedded before the kill"
    assert_same_files(whole, killed)
    assert not (tmp_path / "killed.partial").exists()
    index = Index.open(killed, verify=True)
    assert index.count == 90 and index.counts[5:15].tolist() == [2] * 10


@pytest.mark.parametrize("step", ["journal.append", "journal._write_log", "journal.write_atomically"])
def test_a_full_disk_leaves_nothing_half(tmp_path, pictures, monkeypatch, step):
    monkeypatch.setattr(f"amg.index.{step}", write_to_full_disk)
    with pytest.raises(IndexStorageError, match=r"disk full while building .* nothing was left behind"):
        Index.build(pictures, path=tmp_path / "i", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_later_on_can_be_resumed(tmp_path, whole):
    path = tmp_path / "full"
    run = run_apart(path, limit=200_000)  # 48 sketches of 4096 bytes fit, 64 do not
    assert "free space and run the same build again to resume" in run.stderr and "at image 48" in run.stderr
    assert not path.exists()
    assert run_here(path) == 52
    assert_same_files(whole, path)


def test_a_full_disk_in_the_last_step(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("amg.index.finish.write_manifest", write_to_full_disk)
    with pytest.raises(IndexStorageError, match="disk full while building"):
        Index.build(pictures, path=tmp_path / "i", progress=False)
    assert not (tmp_path / "i").exists()
    monkeypatch.undo()
    assert Index.build(pictures, path=tmp_path / "i", progress=False).count == 80


@pytest.fixture
def interrupted(tmp_path, monkeypatch, pictures) -> Path:
    """A pixel build of 80 pictures stopped after 32."""
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 16)

    def stopping(images):
        from PIL.Image import fromarray

        for at, image in enumerate(images):
            if at == 40:
                raise KeyboardInterrupt
            yield fromarray(image.permute(1, 2, 0).numpy())

    with pytest.raises(KeyboardInterrupt):
        Index.build(stopping(pictures), path=tmp_path / "i", progress=False, batch_size=16)
    assert not (tmp_path / "i").exists()
    return tmp_path / "i"


def pil_images(pictures: torch.Tensor):
    from PIL.Image import fromarray

    return (fromarray(image.permute(1, 2, 0).numpy()) for image in pictures)


def test_an_interrupted_iterator_resumes(interrupted, pictures, tmp_path):
    index = Index.build(pil_images(pictures), path=interrupted, progress=False, batch_size=16)
    assert torch.equal(index.rows, pictures.flatten(1))
    Index.build(pil_images(pictures), path=tmp_path / "whole", progress=False, batch_size=16)
    assert_same_files(tmp_path / "whole", interrupted)


@pytest.mark.parametrize("name", ["rows.u8", "guard.f16"])
def test_rows_that_were_changed_meanwhile_are_not_resumed_over(interrupted, pictures, name):
    """The hashes of the whole index are made at the end, of what is there then."""
    partial = interrupted.with_name("i.partial")
    size = (partial / name).stat().st_size // 32
    with open(partial / name, "r+b") as file:
        file.seek(7 * size)
        file.write(bytes(size))
    with pytest.raises(IndexBuildError, match=rf"{name} was changed since .* at row 7: pass resume=False"):
        Index.build(pil_images(pictures), path=interrupted, progress=False, batch_size=16)
    images = pil_images(pictures)
    assert Index.build(images, path=interrupted, progress=False, batch_size=16, resume=False).count == 80


def test_a_different_build_is_not_resumed(interrupted, pictures):
    with pytest.raises(
        IndexBuildError, match=r"unfinished build with a different batch_size, near_duplicate:"
    ):
        Index.build(
            pil_images(pictures), path=interrupted, progress=False, batch_size=8, near_duplicate=False
        )
    assert interrupted.with_name("i.partial").is_dir()
    index = Index.build(pil_images(pictures), path=interrupted, progress=False, batch_size=8, resume=False)
    assert torch.equal(index.rows, pictures.flatten(1))


def test_images_that_changed_are_not_resumed(interrupted, pictures):
    with pytest.raises(IndexBuildError, match="changed since the build was interrupted"):
        Index.build(pil_images(pictures.flip(0)), path=interrupted, progress=False, batch_size=16)
    assert not interrupted.exists()


def test_a_second_builder_is_refused(tmp_path, pictures):
    fcntl = pytest.importorskip("fcntl")
    partial = tmp_path / "i.partial"
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(IndexBuildError, match="another process is building"):
            Index.build(pictures, path=tmp_path / "i", progress=False)
    finally:
        os.close(handle)
    assert Index.build(pictures, path=tmp_path / "i", progress=False).count == 80


# What is freed goes back to the system, so that a peak is what was held: glibc keeps up to 60 MB otherwise.
RETURNED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


@pytest.mark.slow
def test_memory_stays_constant(tmp_path):
    """Peak memory of building 122 MB of rows from an iterator stays near that of building 61 MB."""
    script = """
import resource, sys, numpy, PIL.Image
from amg.index import Index
count = int(sys.argv[2])
make = numpy.random.default_rng(0)
images = (
    PIL.Image.fromarray(make.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)).resize((96, 96))
    for _ in range(count)
)
Index.build(images, path=sys.argv[1], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in (2200, 4400):
        command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / str(count)), str(count)]
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, **RETURNED}
        )
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 30_000, f"peak KiB for 61 MB and 122 MB of rows: {peaks}"


def save(picture: torch.Tensor, file: Path) -> None:
    from PIL.Image import fromarray

    fromarray(picture.permute(1, 2, 0).numpy()).save(file)


def stop_after(monkeypatch, shards: int):
    """Patch a build so that it stops once so many shards are written."""
    import amg.index.journal as journal

    commit = journal.Journal.commit

    def stopping(self, *arguments):
        commit(self, *arguments)
        if self.state.shards == shards:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "commit", stopping)


def interrupt(monkeypatch, images, path: Path, captions=None) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("amg.index.plan.SHARD_IMAGES", 16)
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            Index.build(images, captions, path=path, progress=False, batch_size=16)
    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 16)
    assert path.with_name(path.name + ".partial").is_dir()


def bitmaps(tmp_path: Path, pictures: torch.Tensor) -> Path:
    """Pictures as files of one size whatever they show, each with a caption."""
    folder = tmp_path / "images"
    folder.mkdir()
    for at, picture in enumerate(pictures):
        save(picture, folder / f"{at:02}.bmp")
        (folder / f"{at:02}.txt").write_text(f"{at:02}")
    return folder


@pytest.mark.parametrize("name", ["05.bmp", "05.txt"])
def test_an_earlier_file_that_was_edited_is_not_resumed_over(tmp_path, pictures, monkeypatch, name):
    folder = bitmaps(tmp_path, pictures[:48])
    interrupt(monkeypatch, folder, tmp_path / "i")
    size = (folder / name).stat().st_size
    save(pictures[60], folder / name) if name.endswith("bmp") else (folder / name).write_text("77")
    assert (folder / name).stat().st_size == size
    with pytest.raises(IndexBuildError, match="unfinished build with a different images:"):
        Index.build(folder, path=tmp_path / "i", progress=False, batch_size=16)
    index = Index.build(folder, path=tmp_path / "i", progress=False, batch_size=16, resume=False)
    assert torch.equal(index.rows[5].view(3, 8, 8), pictures[60 if name.endswith("bmp") else 5])
    assert index.captions[5] == ("05" if name.endswith("bmp") else "77")


def test_a_folder_that_is_the_same_resumes(tmp_path, pictures, monkeypatch):
    folder = bitmaps(tmp_path, pictures[:48])
    interrupt(monkeypatch, folder, tmp_path / "i")
    index = Index.build(folder, path=tmp_path / "i", progress=False, batch_size=16)
    Index.build(folder, path=tmp_path / "whole", progress=False, batch_size=16)
    assert index.count == 48
    assert_same_files(tmp_path / "whole", tmp_path / "i")


def test_an_edited_parquet_file_is_not_resumed_over(tmp_path, pictures, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    folder = bitmaps(tmp_path, pictures[:48])

    def write(order):
        cells = [(folder / f"{at:02}.bmp").read_bytes() for at in order]
        pyarrow.parquet.write_table(
            pyarrow.table({"image": cells}), tmp_path / "t.parquet", compression="none", use_dictionary=False
        )

    write(range(48))
    interrupt(monkeypatch, tmp_path / "t.parquet", tmp_path / "i")
    write([1, 0, *range(2, 48)])
    with pytest.raises(IndexBuildError, match="unfinished build with a different images:"):
        Index.build(tmp_path / "t.parquet", path=tmp_path / "i", progress=False, batch_size=16)


@pytest.mark.parametrize("at", [0, 5, 31])
@pytest.mark.parametrize("kind", ["tensor", "iterator"])
def test_an_earlier_image_in_memory_that_was_edited_is_not_resumed_over(
    tmp_path, pictures, monkeypatch, kind, at
):
    given = pil_images if kind == "iterator" else torch.clone
    interrupt(monkeypatch, given(pictures), tmp_path / "i")
    edited = pictures.clone()
    edited[at, 0, 0, 0] ^= 1
    with pytest.raises(IndexBuildError, match=r"`images` changed .* \(one of the first 32 differs\)"):
        Index.build(given(edited), path=tmp_path / "i", progress=False, batch_size=16)
    assert not (tmp_path / "i").exists()


def test_a_tensor_that_is_the_same_resumes_twice(tmp_path, pictures, monkeypatch):
    interrupt(monkeypatch, pictures, tmp_path / "i")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            Index.build(pictures, path=tmp_path / "i", progress=False, batch_size=16)
    index = Index.build(pictures, path=tmp_path / "i", progress=False, batch_size=16)
    assert torch.equal(index.rows, pictures.flatten(1))
