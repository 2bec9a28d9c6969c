"""The command line on the bundled models."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from amg.cli import main

pytest.importorskip("diffusers")
pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    from amg import zoo

    return zoo.build_index(
        "photos-ddpm", tmp_path_factory.mktemp("index") / "photos.amg", progress=False
    ).path


def sample(index, out, *more):
    return main(
        [
            "sample",
            "photos-ddpm",
            "--index",
            str(index),
            "--class",
            "1",
            "--steps",
            "4",
            "--out",
            str(out),
            *more,
        ]
    )


def verdicts(out):
    return [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]


def test_sample_writes_pictures_and_verdicts_and_resumes(index, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample(index, out, "--images", "3", "--batch-size", "2", "--scheduler", "ddim") == 0
    assert "3 images:" in capsys.readouterr().out
    first = verdicts(out)
    assert [record["seed"] for record in first] == [0, 1, 2]
    assert all(record["verdict"]["metric"] == "nl2" for record in first)
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    lines = (out / "verdicts.jsonl").read_text().splitlines()
    (out / "000002.png").unlink()
    (out / "verdicts.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    assert sample(index, out, "--images", "3", "--batch-size", "2", "--scheduler", "ddim") == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == pictures
    assert "3 images:" in capsys.readouterr().out
    assert verdicts(out) == first  # no line is joined to the one that was cut short


def test_a_folder_of_another_request_is_refused(index, tmp_path, capsys):
    assert sample(index, tmp_path, "--images", "1") == 0
    assert sample(index, tmp_path, "--images", "1", "--seed", "9") == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere", "--index", "x", "--out", "y"], "MODEL"),
        (["sample", "photos-ddpm", "--index", "missing.amg", "--out", "y"], "missing.amg"),
        (["sample", "photos-ddpm", "--index", "x", "--out", "y", "--prompts", "gone.txt"], "--prompts"),
        (["sample", "photos-ddpm", "--index", "x", "--scheduler", "magic", "--out", "y"], "scheduler"),
        (["sample", "photos-ddpm", "--index", "x", "--images", "0", "--out", "y"], "--images"),
        (["sample", "photos-ddpm", "--index", "x", "--steps", "0", "--out", "y"], "`--steps` must be >= 1"),
        (["demo", "--images", "1"], "--images"),
        (["demo", "--steps", "0"], "--steps"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"amg {arguments[0]}: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_guidance_scale_of_zero_is_not_the_default(index, tmp_path):
    assert sample(index, tmp_path / "zero", "--guidance-scale", "0", "--preset", "off") == 0
    assert sample(index, tmp_path / "two", "--preset", "off") == 0
    request, default = (
        json.loads((tmp_path / name / "request.json").read_text()) for name in ("zero", "two")
    )
    assert (request["config"]["guidance_scale"], default["config"]["guidance_scale"]) == (0, 2)


def test_a_full_disk_leaves_whole_pictures_only(index, tmp_path, capsys, monkeypatch):
    from PIL import Image

    def save_until_full(image, path, **options):
        if "000001" in path.name:
            path.write_bytes(b"half a picture")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(image, path, **options)

    save = Image.Image.save
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_until_full)
        assert sample(index, tmp_path, "--images", "3") == 2
    assert "amg sample: [Errno 28] No space left on device" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"000000.png", "request.json", "verdicts.jsonl"}
    assert [record["seed"] for record in verdicts(tmp_path)] == [0]
    assert sample(index, tmp_path, "--images", "3") == 0
    assert [record["seed"] for record in verdicts(tmp_path)] == [0, 1, 2]


def test_info_names_what_runs(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", "extension", "Triton", "faiss"))


def test_importing_amg_is_light():
    code = (
        "import sys, torch, numpy, safetensors, time; before = set(sys.modules); t = time.time(); "
        "import amg; "
        "s = time.time() - t; print(sorted({m.split('.')[0] for m in set(sys.modules) - before}), s)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded, seconds = out.rsplit(" ", 1)
    extras = (
        "diffusers",
        "transformers",
        "PIL",
        "pyarrow",
        "faiss",
        "jinja2",
        "tqdm",
        "torchmetrics",
        "skimage",
    )
    assert not any(repr(extra) in loaded for extra in extras) and float(seconds) < 2


@pytest.mark.slow
def test_demo_from_end_to_end(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--images", "4", "--steps", "4"]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "photos-ddpm" in page and "photos-sd" in page
    assert capsys.readouterr().out.count("memorised %") == 2
