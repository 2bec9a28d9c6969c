"""`amg calibrate` from prompts to the gate, on tiny pipelines."""

import json
import math
from dataclasses import replace

import pytest
import torch

import amg
from amg.cli import main
from amg.commands import calibrate, indexes
from amg.commands import sample as sampling
from amg.config import AMGConfig

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
STEPS = 5


def generators(count):
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


@pytest.fixture
def asked(sd, embedding_index, embedder, tmp_path, monkeypatch):
    """A function that runs the command on the tiny pipeline, whose median image counts as a copy."""
    monkeypatch.setattr(sampling, "open_model", lambda *_: sd)
    monkeypatch.setattr(indexes, "open_index", lambda *_: embedding_index)
    found = amg.Sampler(sd, embedding_index, AMGConfig.preset("off"))(
        ["abc", "cat, red"] * 6, generator=generators(12), num_inference_steps=STEPS, progress=False
    )
    middle = torch.tensor([verdict.similarity for verdict in found.amg]).median().item()
    main_preset = amg.config.PRESETS["main"]
    numbers = {"threshold": middle, "rewind_threshold": middle, "lambda_min": 0.99, "lambda_max": 0.99}
    monkeypatch.setitem(main_preset, "cosine", {**main_preset["cosine"], **numbers})
    (tmp_path / "ordinary.txt").write_text("abc\ncat, red\n")

    def run(*more):
        command = ["calibrate", "tiny", "--ordinary", str(tmp_path / "ordinary.txt"), "--index", "tiny.amg"]
        command += ["--steps", str(STEPS), "--images", "16", "--guidance-scale", "7.5", "--miss-rate", "0.3"]
        return main([*command, "--out", str(tmp_path / "c.json"), *more])

    return run


def guided(pipe, index, path, scale=7.5, steps=STEPS, way="Sampler", **more):
    config = AMGConfig.preset("main", calibration=path, on_memorized="flag", rewind_at=(), **more)
    arguments = {"generator": generators(8), "num_inference_steps": steps, "guidance_scale": scale}
    arguments["output_type"] = "pt"
    prompts = ["abc", "cat, red"] * 4
    if way == "protect":
        out = amg.protect(pipe, index, config)(prompts, **arguments)
        amg.unprotect(pipe)
        return out
    return amg.Sampler(pipe, index, config)(prompts, **arguments, progress=False)


def test_from_prompts_to_a_gate_that_skips(asked, sd, embedding_index, tmp_path, capsys):
    assert asked() == 0
    result = json.loads((tmp_path / "c.json").read_text())
    assert "check steps" in capsys.readouterr().out
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.png", "ordinary.txt"]
    assert result["images"]["all"] == 32 and 6 <= result["images"]["memorized"] <= 28
    assert (result["key"]["scheduler"], result["key"]["steps"]) == ("DDIMScheduler", STEPS)
    for way in ("Sampler", "protect"):
        every = guided(sd, embedding_index, None, check_at=(), way=way)
        out = guided(sd, embedding_index, tmp_path / "c.json", check_at=(), way=way)
        assert torch.equal(out.images, every.images)  # no gate opens at 0.99: skipping changes nothing
        assert_skipped_by_rule(out.amg, result)
        finals = [verdict.similarity for verdict in out.amg]
        assert finals == pytest.approx([verdict.similarity for verdict in every.amg])


def assert_skipped_by_rule(verdicts, result):
    """A row was measured at a step exactly where its signal, computed here, reaches the threshold."""
    mean, deviation = result["region"]["mean"], result["region"]["deviation"]
    skipped = 0
    for verdict in verdicts:
        gaps, worst, move = [], 0.0, 0.0
        for step, rule in zip(verdict.trace, result["gate"], strict=True):
            gap_squared, inner, uncond_squared = step.signals[:3]
            gaps.append(gap_squared**0.5)
            cosine = inner / (gap_squared * uncond_squared) ** 0.5
            values = {"gap": gaps[-1], "mean_gap": sum(gaps) / len(gaps), "cosine": cosine}
            values |= {"move": move, "region": worst}
            if rule["signal"] == "combined":
                bias, *weights = rule["weights"]
                logs = [v if name == "cosine" else math.log(max(v, 1e-12)) for name, v in values.items()]
                values["combined"] = bias + sum(w * v for w, v in zip(weights, logs, strict=True))
            score = rule["sign"] * values[rule["signal"]]
            assert (step.similarity is None) == (score < rule["threshold"] - 1e-9)
            skipped += step.similarity is None
            if step.step < len(mean):  # the last step's move is noted too, and nothing comes after it
                move = step.signals[3] ** 0.5
                worst = max(worst, abs(move - mean[step.step]) / deviation[step.step])
    assert 0 < skipped < len(verdicts) * STEPS


@pytest.mark.parametrize("way", ["Sampler", "protect"])
def test_another_run_is_refused(asked, sd, embedding_index, tmp_path, way):
    assert asked() == 0
    with pytest.raises(ValueError, match=r"steps=6, got one for steps=5"):
        guided(sd, embedding_index, tmp_path / "c.json", steps=6, way=way)
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0, got one for guidance_scale=7\.5"):
        guided(sd, embedding_index, tmp_path / "c.json", scale=3.0, way=way)
    with pytest.raises(ValueError, match=r"threshold=0\.9, got one for threshold="):
        guided(sd, embedding_index, tmp_path / "c.json", threshold=0.9, way=way)
    sd.scheduler = diffusers.DDPMScheduler.from_config(sd.scheduler.config)
    with pytest.raises(ValueError, match="scheduler='DDPMScheduler', got one for scheduler='DDIMScheduler'"):
        guided(sd, embedding_index, tmp_path / "c.json", way=way)
    with pytest.raises(ValueError, match="`calibration` must be None: a scheduler does not know"):
        amg.AMGScheduler(sd.scheduler, embedding_index, AMGConfig.preset("main", calibration="c.json"))


def test_recording_samples_what_plain_diffusers_would(sd, ddpm, embedding_index, pixel_index):
    import argparse

    jobs = [{"seed": 100 + i, "prompt": "abc", "ordinary": True} for i in range(3)]
    arguments = argparse.Namespace(preset="main", batch_size=2, steps=STEPS, guidance_interval=(0.0, 1.0))
    for pipe, index in ((sd, embedding_index), (ddpm, pixel_index)):
        recorded, *_ = calibrate.record(pipe, index, jobs, 7.5, arguments)
        condition = {"prompt": ["abc"] * 3} if pipe is sd else {"batch_size": 3}
        plain = amg.Sampler(pipe, index, AMGConfig.preset("off"))(
            **condition,
            generator=generators(3),
            num_inference_steps=STEPS,
            output_type="latent",
            progress=False,
        )
        settings = amg.AMGConfig.preset("main", **calibrate.UNGUIDED, **calibrate.EVERY_STEP, gated=False)
        measured = amg.Sampler(pipe, index, settings)(
            **condition,
            generator=generators(3),
            num_inference_steps=STEPS,
            output_type="latent",
            progress=False,
        )
        assert torch.equal(measured.images, plain.images)
        wanted = [[step.similarity for step in verdict.trace] for verdict in measured.amg]
        torch.testing.assert_close(recorded.similarity, torch.tensor(wanted), atol=1e-5, rtol=1e-5)
        assert bool((recorded.raw[:, :-1, 2:] > 0).all())
        assert bool((recorded.raw[..., 0] > 0).all()) == (pipe is sd)


def test_too_few_copies_and_bad_input_are_one_line_and_write_nothing(asked, tmp_path, capsys):
    assert asked("--miss-rate", "0.01") == 2
    assert "needs 198 memorised images" in capsys.readouterr().err
    for option, value in (("--miss-rate", "1"), ("--images", "0"), ("--steps", "1"), ("--out", "no/c.json")):
        assert asked(option, value) == 2
        assert option in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ordinary.txt"]


def test_a_failed_write_keeps_the_old_file(asked, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.json").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("amg.index.store.os.fsync", full)
    assert asked() == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "c.json").read_text() == "old"


def test_classes_and_unconditional_models_are_recorded(class_ddpm, ddpm):
    jobs = [{"prompt": "3"}, {"prompt": "0"}]
    assert calibrate.condition(class_ddpm, jobs) == {"class_labels": [3, 0]}
    assert calibrate.condition(ddpm, jobs) == {"batch_size": 2}
    with pytest.raises(ValueError, match="class numbers"):
        calibrate.condition(class_ddpm, [{"prompt": "a cat"}])


def test_the_guard_s_threshold_goes_from_ordinary_images_to_the_verdict(
    asked, sd, embedding_index, other_index, tmp_path, capsys
):
    assert asked("--guard-false-alarm-rate", "0.2") == 0
    said, result = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())["guard"]
    assert f"guard at {result['threshold']:.3f}: false alarms at most 20 %" in said
    count = len(result["ordinary"])
    rank = math.ceil((count + 1) * 0.8 - 1e-9)
    assert result["threshold"] == max(sorted(result["ordinary"])[rank - 1], result["floor"])
    options = {"guard_false_alarm_rate": 0.2}
    for way in ("Sampler", "protect"):
        out = guided(sd, embedding_index, tmp_path / "c.json", way=way, **options)
        for verdict in out.amg:
            assert verdict.guard.threshold == result["threshold"] and verdict.guard.false_alarm_rate == 0.2
    config = AMGConfig.preset("main", calibration=tmp_path / "c.json", **options)
    (verdict,) = amg.check(out.images[:1], embedding_index, config, also=[other_index])
    assert verdict.guard.limit == f"{result['threshold']:.3f} (false alarms <= 20 %)"
    assert verdict.also[0].guard.false_alarm_rate is None  # of that index nothing is known
    with pytest.raises(ValueError, match="`calibration` must be for this index"):
        amg.check(out.images[:1], other_index, config)
    with pytest.raises(ValueError, match=r"must be None without a `calibration`.*got 0\.2 and None"):
        amg.Sampler(sd, embedding_index, AMGConfig.preset("main", **options))
    with pytest.raises(ValueError, match="which needs 999"):
        amg.protect(sd, embedding_index, replace(config, guard_false_alarm_rate=0.001))


@pytest.fixture
def other_index(embedder, tmp_path):
    """An index of other pictures, with a guard."""
    images = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(44))
    return amg.Index.build(images, None, embedder, tmp_path / "other.amg", progress=False)
