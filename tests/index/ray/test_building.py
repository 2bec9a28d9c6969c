"""`amg.index.ray.build` makes the index that `Index.build` makes, killed workers or not."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from amg.cli import main
from amg.index import Index, IndexBuildError

ray = pytest.importorskip("ray", reason="needs ray: pip install 'amg-sampler[ray]'")
pytest.importorskip("pyarrow")
image_module = pytest.importorskip("PIL.Image")

from amg.index.ray import build  # noqa: E402

pytestmark = pytest.mark.slow
COUNT = 600


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 600 pictures of 64x64, of which 60 repeat others."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(3)
    for at in range(COUNT):
        small = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        image = image_module.fromarray(small.numpy()).resize((64, 64))
        if at % 10 == 9:
            image = image_module.open(folder / f"{at - 1:04}.png")
        image.save(folder / f"{at:04}.png")
        (folder / f"{at:04}.txt").write_text(f"picture {at}")
    return folder


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    return Index.build(pictures, path=tmp_path_factory.mktemp("whole") / "i.amg", progress=False)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def test_it_is_what_one_process_builds(pictures, whole, tmp_path, alike):
    found = build(pictures, path=tmp_path / "i.amg", workers=3, progress=False)
    alike(found, whole)
    assert found.count == COUNT - COUNT // 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["i.amg"]


def workers():
    """Processes of this machine that run a stretch now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        found += [int(entry.name)] if title.startswith(b"ray::_work") else []
    return found


def test_workers_killed_in_the_middle_change_nothing(pictures, whole, tmp_path, alike):
    killed, done = [], threading.Event()

    def kill():
        while not done.is_set() and len(killed) < 2:
            for pid in set(workers()) - set(killed):
                time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    found = build(pictures, path=tmp_path / "i.amg", workers=2, progress=False)
    done.set()
    killer.join()
    assert len(killed) >= 2
    alike(found, whole)


def test_the_command(pictures, whole, tmp_path, capsys, alike):
    words = ["index", "build", str(pictures), "--out", str(tmp_path / "i.amg"), "--quiet"]
    assert main([*words, "--ray", "auto"]) == 0, capsys.readouterr().err
    alike(Index.open(tmp_path / "i.amg"), whole)


def test_what_is_refused(pictures, tmp_path):
    with pytest.raises(IndexBuildError, match="`images` must be paths, which every machine has, got tensor"):
        build(torch.rand(4, 3, 8, 8), path=tmp_path / "i")
    for wrong in (0, True, 1.5):
        with pytest.raises(IndexBuildError, match="`workers` must be an int of at least 1 or None"):
            build(pictures, path=tmp_path / "i", workers=wrong)
    with pytest.raises(IndexBuildError, match="`workers` must be 2 or more for 600 images, got 1"):
        build(pictures, path=tmp_path / "i", workers=1)
    with pytest.raises(IndexBuildError, match="`path` exists already"):
        build(pictures, path=tmp_path, workers=2)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    with pytest.raises(IndexBuildError):
        build(tmp_path / "text", path=tmp_path / "i", workers=2)
    assert not (tmp_path / "i").exists() and not (tmp_path / "i.segments").exists()
