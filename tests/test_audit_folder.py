"""An audit's folder: no picture without its JSON, nobody else's pictures, settings by content."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from amg.audit import folder as kept
from amg.audit.plan import Guidance, Job, Prompt
from amg.config import AMGConfig

pytest.importorskip("PIL")


def job(number):
    return Job(number, 0, Prompt("cat"), 5 + number)


def picture(number):
    values = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(number))
    return values.float() / 255


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(image, path, **_):
    path.write_bytes(b"half a picture")
    full()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("where", "act"),
    [
        ("PIL.Image.Image.save", half),
        ("amg.audit.folder.file_fingerprint", full),
        ("amg.audit.folder.write_atomically", full),
        ("amg.audit.folder.os.replace", full),
    ],
)
def test_a_full_disk_leaves_no_picture_without_its_verdict(tmp_path, monkeypatch, where, act, again):
    if again:  # a picture that was damaged, and is drawn again
        kept.keep(tmp_path, job(0), picture(0), {"verdict": {"memorized": False}})
        (tmp_path / "000000.json").write_text('{"half a rec')
    with monkeypatch.context() as patch:
        patch.setattr(where, act)
        with pytest.raises(OSError, match="No space left"):
            kept.keep(tmp_path, job(0), picture(1), {"verdict": {"memorized": True}})
    assert not kept.complete(tmp_path, job(0))
    if not again:
        assert not (tmp_path / "000000.png").exists()
    kept.keep(tmp_path, job(0), picture(1), {"verdict": {"memorized": True}})
    assert kept.complete(tmp_path, job(0)) and not list(tmp_path.glob("*.tmp"))
    assert json.loads((tmp_path / "000000.json").read_text())["verdict"] == {"memorized": True}


def guidance(**options):
    return Guidance("main", AMGConfig.preset("main", **options).for_metric("cosine"))


def test_a_guidance_s_folder_with_anybody_else_s_pictures_is_refused(tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main/000003.png").write_bytes(b"a training image")
    with pytest.raises(ValueError, match=r"must be empty or say in .*config.json .* got .*000003.png alone"):
        kept.hold_guidance(tmp_path, guidance())
    assert [path.name for path in (tmp_path / "main").iterdir()] == ["000003.png"]


def test_only_leftovers_of_our_own_are_removed(tmp_path):
    kept.hold_guidance(tmp_path, guidance())
    for name in ("000001.png.tmp", "000001.json.tmp", "draft.tmp", "notes.txt"):
        (tmp_path / "main" / name).write_text("x")
    kept.hold_guidance(tmp_path, guidance())
    assert sorted(path.name for path in (tmp_path / "main").iterdir()) == [
        "config.json",
        "draft.tmp",
        "notes.txt",
    ]


def test_a_folder_that_lost_its_settings_is_refused(tmp_path):
    kept.hold_settings(tmp_path, {"--seed": 1})
    kept.hold_guidance(tmp_path, guidance())
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"must be empty or say in .*settings.json"):
        kept.hold_settings(tmp_path, {"--seed": 2})
    assert not (tmp_path / "settings.json").exists()


def test_another_student_at_the_same_path_is_another_guidance(tmp_path):
    student = tmp_path / "student.safetensors"
    student.write_bytes(b"one")
    kept.hold_guidance(tmp_path, guidance(student=student))
    kept.hold_guidance(tmp_path, guidance(student=student))
    student.write_bytes(b"two")
    with pytest.raises(ValueError, match="guidance 'main': `student` must be 'sha256 "):
        kept.hold_guidance(tmp_path, guidance(student=student))
