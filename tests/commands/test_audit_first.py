# ruff: noqa: F401, F811 - fixtures of a neighbour
"""`amg audit` finds out what it cannot do before it draws, and keeps what a safety checker said."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from amg.engine.sampler import Sampler

from .test_audit import audit, indexes, model, prompts


def network(folder):
    """A TorchScript network that takes no picture of this size."""
    path = folder / "n.pt"
    torch.jit.script(torch.nn.Conv2d(3, 1, 64)).save(str(path))
    return ("--fid-network", f"torchscript:{path}")


def unreadable(folder):
    (folder / "images").mkdir()
    (folder / "images/a.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    return ("--images-of-index", folder / "images")


def config(folder, **fields):
    (folder / "mine.json").write_text(json.dumps(fields))
    return ("--config", folder / "mine.json")


def clip(folder):
    (folder / "clip").mkdir()
    (folder / "clip/config.json").write_text("{}")
    return ("--clip", folder / "clip")


BEFORE = {
    "a network for other pictures": (network, ""),
    "no readable training image": (unreadable, "`--images-of-index` must hold readable images, got none"),
    "a calibration that is not there": (lambda f: config(f, calibration=str(f / "gone")), "found none at"),
    "a student that is not there": (lambda f: config(f, student=str(f / "gone")), "found none at"),
    "a scheduler": (lambda f: ("--scheduler", "magic"), "`--scheduler` must be one of"),
    "a text scorer that is none": (clip, ""),
    "an index of the embedder's own as a judge": (
        lambda f: ("--judge", "x", "--judge-embedder", "pixels"),
        "no index at",
    ),
}


@pytest.mark.parametrize("what", BEFORE)
def test_nothing_is_drawn_before_everything_is_in_order(
    what,
    model,
    indexes,
    prompts,
    tmp_path,
    monkeypatch,
    capsys,
):
    make, message = BEFORE[what]
    monkeypatch.setattr(Sampler, "__call__", lambda *_, **__: pytest.fail("a picture was drawn"))
    assert audit(model, indexes, prompts, tmp_path / "out", *make(tmp_path)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_said_first(
    model,
    indexes,
    prompts,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(Sampler, "__call__", lambda *_, **__: pytest.fail("a picture was drawn"))
    assert audit(model, indexes, prompts, tmp_path / "out") == 2
    assert "amg-sampler[report]" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_a_safety_checker_said_is_kept(
    model,
    indexes,
    prompts,
    tmp_path,
    monkeypatch,
):
    import pyarrow.parquet as parquet

    sample, out = Sampler.__call__, tmp_path / "out"

    def flagging(self, *arguments, **options):
        result = sample(self, *arguments, **options)
        result.nsfw_content_detected = [number == 0 for number in range(len(result.amg))]
        return result

    monkeypatch.setattr(Sampler, "__call__", flagging)
    assert audit(model, indexes, prompts, out, "--guidance", "off") == 0
    flags = [json.loads(path.read_text())["nsfw"] for path in sorted(out.glob("off/0*.json"))]
    assert flags == [True, False, False, True]  # of batches of three
    rows = parquet.read_table(out / "images.parquet").to_pylist()
    assert {row["picture"]: row["nsfw"] for row in rows} == dict(enumerate(flags))
    measures = {row["key"]: row for row in json.loads((out / "table.json").read_text())["measures"]}
    assert measures["flagged"]["guidances"]["off"]["value"] == 50


def test_without_a_safety_checker_nothing_is_claimed(model, indexes, prompts, tmp_path):
    assert audit(model, indexes, prompts, tmp_path / "out", "--guidance", "off") == 0
    assert json.loads((tmp_path / "out/off/000000.json").read_text())["nsfw"] is None
    measures = json.loads((tmp_path / "out/table.json").read_text())["measures"]
    assert "flagged" not in {row["key"] for row in measures}


def test_also_takes_an_index_of_the_same_embedder(model, indexes, prompts, tmp_path):
    out, more = tmp_path / "out", ("--guidance", "off", "--also", indexes / "photos.amg")
    assert audit(model, indexes, prompts, out, *more) == 0
    record = json.loads((out / "off/000000.json").read_text())
    assert [one["metric"] for one in record["verdict"]["also"]] == ["cosine"]
