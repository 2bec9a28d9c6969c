"""An audit's folder: no picture without its JSON, nobody else's pictures, settings by content."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from amg.commands.audit import folder as kept
from amg.commands.audit.plan import Guidance, Job, Prompt
from amg.commands.fingerprint import sealed, unsealed
from amg.config import AMGConfig
from amg.verdict import Neighbour, Verdict

pytest.importorskip("PIL")


def job(number):
    return Job(number, 0, Prompt("cat"), 5 + number)


def picture(number):
    values = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(number))
    return values.float() / 255


def drawn(similarity=0.1):
    verdict = Verdict("cosine", similarity, 0.5, Neighbour(0, "a", None), similarity > 0.5)
    return {"seconds": 1.5, "batch": 3, "peak_mib": None, "verdict": verdict.as_dict()}


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
        ("amg.commands.audit.folder.file_fingerprint", full),
        ("amg.commands.audit.folder.write_atomically", full),
        ("os.replace", full),
    ],
)
def test_a_full_disk_leaves_no_picture_without_its_verdict(tmp_path, monkeypatch, where, act, again):
    if again:  # a picture that was damaged, and is drawn again
        kept.keep(tmp_path, job(0), picture(0), drawn(0.1))
        (tmp_path / "000000.json").write_text('{"half a rec')
    with monkeypatch.context() as patch:
        patch.setattr(where, act)
        with pytest.raises(OSError, match="No space left"):
            kept.keep(tmp_path, job(0), picture(1), drawn(0.9))
    assert not kept.complete(tmp_path, job(0))
    if not again:
        assert not (tmp_path / "000000.png").exists()
    kept.keep(tmp_path, job(0), picture(1), drawn(0.9))
    assert kept.complete(tmp_path, job(0)) and not list(tmp_path.glob("*.tmp"))
    assert json.loads((tmp_path / "000000.json").read_text())["verdict"]["similarity"] == 0.9


def resealed(**changes):
    """An edit of a record whose digest holds: what the digest cannot tell is found by itself."""

    def edit(text):
        record = unsealed(text)
        for name, value in changes.items():
            part = record["verdict"] if name in record["verdict"] else record
            part[name] = value
        return sealed({name: value for name, value in record.items() if value != "left out"}).encode()

    return edit


DAMAGES = {
    "memorized": lambda text: text.replace(b'"memorized": false', b'"memorized": true'),
    "similarity": lambda text: text.replace(b'"similarity": 0.1', b'"similarity": 0.2'),
    "seconds": lambda text: text.replace(b"1.5", b"1.0"),
    "no digest": lambda text: text[: text.index(b', "digest"')] + b"}\n",
    "nested": lambda text: b"[" * 100_000,
    "cut short": lambda text: text[:-20],
    "another's picture": resealed(picture="000000.png"),
    "a picture elsewhere": resealed(picture="../main/000001.png"),
    "another's number": resealed(number=0),
    "another's prompt": resealed(prompt={"caption": "dog", "kind": "prompt", "index": None, "url": None}),
    "seed of another type": resealed(seed=6.0),
    "no verdict": resealed(verdict="left out"),
    "verdict as text": resealed(verdict="x"),
    "verdict as a list": resealed(verdict=[]),
    "rewinds": resealed(rewinds=None),
    "neighbour": resealed(neighbour=3),
    "guard": resealed(guard=[]),
    "also": resealed(also=5),
    "no seconds": resealed(seconds="left out"),
    "batch": resealed(batch=None),
    "peak": resealed(peak_mib=[]),
    "no peak": resealed(peak_mib="left out"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_was_changed_is_drawn_again(tmp_path, damage):
    for number in range(2):
        kept.keep(tmp_path, job(number), picture(number), drawn())
    assert [record.seed for record in kept.read_records(tmp_path, [job(0), job(1)])] == [5, 6]
    path = tmp_path / "000001.json"
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert path.read_bytes() != whole
    assert kept.complete(tmp_path, job(0)) and not kept.complete(tmp_path, job(1))
    with pytest.raises(ValueError, match=r"000001.json is damaged \(.*the same command draws it again"):
        kept.read_records(tmp_path, [job(0), job(1)])
    kept.keep(tmp_path, job(1), picture(1), drawn())
    assert path.read_bytes() == whole and kept.complete(tmp_path, job(1))


def test_a_record_of_another_seed_s_picture_is_drawn_again(tmp_path):
    for number in range(2):
        kept.keep(tmp_path, job(number), picture(number), drawn())
    (tmp_path / "000001.png").write_bytes((tmp_path / "000000.png").read_bytes())
    assert not kept.complete(tmp_path, job(1))
    (tmp_path / "000001.json").write_bytes((tmp_path / "000000.json").read_bytes())
    assert not kept.complete(tmp_path, job(1))


def test_half_a_surrogate_in_a_prompt_is_kept(tmp_path):
    odd = Job(0, 0, Prompt("caf\u00e9 \udc80 \u2028"), 5)
    kept.keep(tmp_path, odd, picture(0), drawn())
    assert kept.complete(tmp_path, odd) and not kept.complete(tmp_path, job(0))


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "null"])
def test_settings_that_cannot_be_read_are_named(tmp_path, text):
    (tmp_path / "main").mkdir()
    for name, hold in (
        ("settings.json", lambda: kept.hold_settings(tmp_path, {"--seed": 1})),
        ("main/config.json", lambda: kept.hold_guidance(tmp_path, guidance())),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"`--out`: .*{name} .*give another `--out`"):
            hold()
        assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize(
    "name", ["settings.json.tmp", "table.json", "table.csv.tmp", "images.parquet", "report"]
)
def test_a_folder_where_others_files_would_be_written_over_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"must be empty or say in .*settings.json .* got .*{name} alone"):
        kept.hold_settings(tmp_path, {"--seed": 1})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


@pytest.mark.parametrize("name", ["config.json.tmp", "000001.png.tmp", "000001.json.tmp"])
def test_half_files_in_somebody_s_guidance_folder_are_left_alone(tmp_path, name):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"must be empty or say in .*config.json .* got .*{name} alone"):
        kept.hold_guidance(tmp_path, guidance())
    assert (tmp_path / "main" / name).read_text() == "mine"


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
