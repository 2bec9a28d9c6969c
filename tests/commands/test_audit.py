"""`amg audit` from end to end on a tiny Stable Diffusion: files, resuming, refusals."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amg.cli import main

pytest.importorskip("diffusers")
pytest.importorskip("pyarrow")
pytest.importorskip("jinja2")

CAPTIONS = ("cat", "dog", "hat", "cup")
SILENT = {"preset_name": "main", "c1": 0, "c2": 0, "c3": 0, "rewind_at": [], "check_at": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny text-to-image pipeline of random weights."""
    path = Path(__file__).parents[1] / "integrations/conftest.py"
    spec = importlib.util.spec_from_file_location("tiny", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny.tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """The same 60 random pictures under photos-embedder and as pixels."""
    import amg
    from amg.embed.photos import load_photos

    folder = tmp_path_factory.mktemp("indexes")
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions = [f"caption {i % 20}" for i in range(60)]
    amg.Index.build(pictures, captions, load_photos(), folder / "photos.amg", progress=False)
    amg.Index.build(pictures, captions, None, folder / "pixels.amg", progress=False)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [
        {"caption": caption, "index": n, "url": "https://a.example"} for n, caption in enumerate(CAPTIONS)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def audit(model, indexes, prompts, out, *more):
    fixed = ["audit", str(model), "--index", str(indexes / "photos.amg"), "--embedder", "photos"]
    fixed += ["--prompts", str(prompts), "--steps", "4", "--batch-size", "3", "--out", str(out)]
    return main([*fixed, *map(str, more)])


def pictures(out):
    paths = sorted(out.glob("*/*.png"))
    return {path.relative_to(out): np.asarray(Image.open(path)).astype(int) for path in paths}


@pytest.fixture(scope="module")
def audited(model, indexes, prompts, tmp_path_factory):
    """A whole audit, two pictures per prompt, with a pixel judge."""
    out = tmp_path_factory.mktemp("audit") / "out"
    more = ("--images", 2, "--seed", 5, "--judge", indexes / "pixels.amg", "--judge-embedder", "pixels")
    assert audit(model, indexes, prompts, out, *more) == 0
    return out


def test_every_picture_has_a_record_that_says_how_it_was_made(audited):
    assert {path.parent.name for path in audited.glob("*/*.png")} == {"off", "main", "strong"}
    record = json.loads((audited / "main/000003.json").read_text())
    assert (record["seed"], record["prompt"]["caption"], record["prompt"]["index"]) == (8, "dog", 1)
    assert record["config"]["preset_name"] == "main" and record["environment"]["torch"] == torch.__version__
    assert record["verdict"]["evaluations"] >= 8 and len(record["verdict"]["trace"]) >= 4
    assert record["seconds"] > 0 and record["batch"] in (2, 3) and record["peak_mib"] > 10


def test_off_is_plain_diffusers(audited, model):
    import diffusers
    import numpy as np
    from PIL import Image

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(12)
    plain = pipe("cup", num_inference_steps=4, guidance_scale=7.5, generator=generator).images[0]
    kept = np.asarray(Image.open(audited / "off/000007.png")).astype(int)
    assert np.abs(kept - np.asarray(plain).astype(int)).max() <= 1  # another batch: a rounding apart


def test_the_table_is_what_the_records_say(audited):
    rows = {row["key"]: row for row in json.loads((audited / "table.json").read_text())["measures"]}
    for guidance in ("off", "main", "strong"):
        verdicts = [json.loads(path.read_text())["verdict"] for path in audited.glob(f"{guidance}/0*.json")]
        assert len(verdicts) == 8
        delivered = [verdict["similarity"] for verdict in verdicts if not verdict["blocked"]]
        cell = rows["above_0.4"]["guidances"][guidance]
        assert cell["value"] == pytest.approx(100 * sum(value > 0.4 for value in delivered) / 8)
        assert cell["low"] <= cell["value"] <= cell["high"]
        if delivered:
            top1 = rows["top1"]["guidances"][guidance]["value"]
            assert top1 == pytest.approx(max(delivered), abs=1e-5)
        evaluations = rows["evaluations"]["guidances"][guidance]["value"]
        assert evaluations == pytest.approx(sum(verdict["evaluations"] for verdict in verdicts) / 8)
    assert {rows[key]["guided"] for key in ("above_0.4", "top5")} == {"yes"}
    assert {rows[key]["guided"] for key in ("structural", "pixels_below_1.4")} == {"never"}
    assert rows["fid"]["missing"] == "give --fid-network" and "--clip" in rows["alignment"]["missing"]


def test_the_csv_has_a_row_per_guidance_with_environment(audited):
    lines = list(csv.DictReader((audited / "table.csv").open(newline="")))
    assert [line["guidance"] for line in lines] == ["off", "main", "strong"]
    assert all(line["torch"] == torch.__version__ and line["seed"] == "5" for line in lines)
    assert all(line["structural"] and line["structural_high"] and not line["fid"] for line in lines)
    assert all("fid: give --fid-network" in line["not_measured"] for line in lines)


def test_parquet_has_a_row_per_picture_and_step(audited):
    import pyarrow.parquet as parquet

    rows = parquet.read_table(audited / "images.parquet").to_pylist()
    main_rows = [row for row in rows if row["guidance"] == "main"]
    traces = [
        json.loads(path.read_text())["verdict"]["trace"] for path in sorted(audited.glob("main/0*.json"))
    ]
    assert [(row["picture"], row["step"], row["t"], row["threshold"]) for row in main_rows] == [
        (n, step["step"], step["t"], step["threshold"]) for n, trace in enumerate(traces) for step in trace
    ]
    assert [row["terms"] for row in main_rows] == [step["terms"] for trace in traces for step in trace]
    plain = [(row["seed"], row["step"]) for row in rows if row["guidance"] == "off"]
    steps = len(plain) // 8  # without guidance, too, the free signals of every step are kept
    assert plain == [(seed, step) for seed in range(5, 13) for step in range(steps)] and steps > 1


def test_the_report_holds_the_table_and_the_nearest_training_images(audited):
    page = (audited / "report/index.html").read_text()
    assert "Audit of tiny-sd" in page and "structure: luminance correlation" in page
    assert "nearest training image" in page and "amg audit" not in page.split("<h3>Command</h3>")[0]


def test_an_interrupted_audit_goes_on_and_ends_alike(
    audited, model, indexes, prompts, tmp_path, monkeypatch, capsys
):
    from amg.engine.sampler import Sampler

    calls = []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 5:  # the second batch of main
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    sample, out, more = Sampler.__call__, tmp_path / "out", ("--images", 2, "--seed", 5)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", interrupted)
        assert audit(model, indexes, prompts, out, *more) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    assert len(first) == 8 + 3 and not (out / "table.json").exists()
    (out / "off/000001.png").write_bytes(b"damaged")
    (out / "main/000002.json").write_text('{"half a rec')
    (out / "main/000005.png.tmp").write_bytes(b"half a picture")
    assert audit(model, indexes, prompts, out, *more) == 0
    redrawn = {path for path, time in first.items() if path.stat().st_mtime_ns != time}
    assert redrawn == {out / "off/000001.png", out / "main/000002.png"}
    now, whole = pictures(out), pictures(audited)
    assert list(now) == list(whole) and not list(out.glob("**/*.tmp"))
    for path, picture in now.items():  # drawn in another batch, sums may round to the next of 256 levels
        assert abs(picture - whole[path]).max() <= 1


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (("--images", 2, "--seed", 6), "`--seed` must be 5"),
        (("--images", 2, "--seed", 5, "--guidance-scale", 3), "`--guidance-scale` must be 7.5"),
        (("--images", 1, "--seed", 5), "`--images` must be 2"),
        (("--images", 2, "--seed", 5, "--steps", 5), "`--steps` must be 4"),
        (("--images", 2, "--seed", 5, "--scheduler", "euler"), "`--scheduler` must be"),
        (("--images", 2, "--seed", 5, "--also", "PIXELS"), "`--also` must be"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_name(audited, model, indexes, prompts, capsys, more, name):
    before = pictures(audited)
    more = [indexes / "pixels.amg" if word == "PIXELS" else word for word in more]
    assert audit(model, indexes, prompts, audited, *more) == 2
    assert name in capsys.readouterr().err
    after = pictures(audited)
    assert list(after) == list(before)
    assert all(np.array_equal(after[path], picture) for path, picture in before.items())


def test_another_prompt_or_another_config_of_the_same_name_is_refused(
    audited, model, indexes, prompts, tmp_path, capsys
):
    other = tmp_path / "prompts.jsonl"
    other.write_text(prompts.read_text().replace("cup", "cap"))
    more = ("--images", 2, "--seed", 5)
    assert audit(model, indexes, other, audited, *more) == 2
    assert "`--prompts` must be" in capsys.readouterr().err
    config = tmp_path / "main.json"
    config.write_text('{"c3": 0.125}')
    assert audit(model, indexes, prompts, audited, *more, "--config", config) == 2
    assert "guidance 'main': `c3` must be 1.0" in capsys.readouterr().err


@pytest.fixture
def copied(audited, tmp_path):
    """The whole audit, to go on with."""
    return shutil.copytree(audited, tmp_path / "copied")


def test_a_measured_column_draws_the_pictures_of_off(copied, model, indexes, prompts):
    config = copied.parent / "measured.json"
    config.write_text(json.dumps({**SILENT, "on_memorized": "flag"}))
    more = ("--images", 2, "--seed", 5, "--guidance", "off", "--config", config)
    assert audit(model, indexes, prompts, copied, *more) == 0
    off, measured = (sorted(copied.glob(f"{name}/*.png")) for name in ("off", "measured"))
    assert [path.read_bytes() for path in off] == [path.read_bytes() for path in measured]
    trace = json.loads((copied / "measured/000000.json").read_text())["verdict"]["trace"]
    assert len(trace) == 4 and all(step["similarity"] is not None for step in trace)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--judge", "x"), "`--judge-embedder` must be given once per `--judge`"),
        (("--steps", 1), "`--steps` must be >= 2"),
        (("--report-pictures", 0), "`--report-pictures` must be >= 1"),
        (("--clip", "a", "--open-clip", "b"), "must not both"),
        (("--clip", "a"), "`--clip` must be a folder"),
        (("--fid-network", "torchscript:gone.pt"), "`--fid-network` must name"),
        (("--fid-network", "nothing"), "must be one of"),
        (("--guidance", "mild"), "`--guidance` must be one of"),
        (("--judge", "PHOTOS", "--judge-embedder", "photos"), "guidance never saw"),
        (("--judge", "PHOTOS", "--judge-embedder", "pixels"), "must name the embedder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(
    model, indexes, prompts, tmp_path, capsys, more, message
):
    more = [indexes / "photos.amg" if word == "PHOTOS" else word for word in more]
    out = tmp_path / "out"
    assert audit(model, indexes, prompts, out, *more) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_prompts_are_asked_for_where_the_model_takes_them(model, indexes, tmp_path, capsys):
    arguments = ["audit", str(model), "--index", str(indexes / "photos.amg"), "--embedder", "photos"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "`--prompts` must be given" in capsys.readouterr().err


def test_fid_from_a_torchscript_network_against_the_training_images(
    copied, model, indexes, prompts, tmp_path
):
    class Flat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    torch.jit.script(Flat()).save(tmp_path / "flat.pt")
    more = ("--images", 2, "--seed", 5, "--judge", indexes / "pixels.amg", "--judge-embedder", "pixels")
    assert (
        audit(model, indexes, prompts, copied, *more, "--fid-network", f"torchscript:{tmp_path}/flat.pt") == 0
    )
    from amg.commands.audit.folder import read_picture
    from amg.evaluate import fid

    drawn = torch.stack([read_picture(path) for path in sorted(copied.glob("main/*.png"))]).float() / 255
    training = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    training = (training * 255).round() / 255
    rows = {row["key"]: row for row in json.loads((copied / "table.json").read_text())["measures"]}
    assert "TorchScript flat.pt" in rows["fid"]["label"]
    oracle = fid(drawn, training, Flat())
    assert rows["fid"]["guidances"]["main"]["value"] == pytest.approx(oracle, rel=1e-4)
