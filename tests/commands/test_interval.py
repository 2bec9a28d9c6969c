"""`amg calibrate --choose-interval`: who may choose, what is chosen, and the whole command on photos-sd."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from amg.commands import interval
from amg.commands.interval import WHOLE, Arm, cheapest, check, compared, grid_of

PROMPTS = [f"prompt {at}" for at in range(64)]
BLANK = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)


def arm(evaluations, alignment, copies=0.0):
    return Arm(evaluations, alignment, copies, None, BLANK)


def arms(**losses):
    """The whole interval and others that lose so much alignment, picture by picture the same."""
    base = 0.5 + 0.2 * torch.rand(len(PROMPTS), dtype=torch.float64)
    found = {WHOLE: arm(60.0, base)}
    for name, loss in losses.items():
        high = float(name.removeprefix("to_")) / 10
        noise = 0.01 * torch.randn(len(PROMPTS), dtype=torch.float64)
        found[0.0, high] = arm(30 + 30 * high, base - loss + noise - noise.mean())
    return found


def test_the_cheapest_that_is_surely_within_the_tolerance_is_chosen():
    choices = compared(arms(to_7=0.001, to_6=0.002, to_5=0.1), PROMPTS, None, 0.02)
    assert [choice.kept for choice in choices] == [True, True, True, False]
    assert cheapest(choices).interval == (0.0, 0.6)
    assert choices[3].loss.value == pytest.approx(0.1) and choices[3].loss.low > 0.09


def test_what_is_not_surely_within_it_is_not_chosen():
    """The loss is within the tolerance, the end of its interval is not: the burden is the saving's."""
    found = arms(to_7=0.0)
    noisy = found[0.0, 0.7].alignment + 0.3 * torch.randn(len(PROMPTS), dtype=torch.float64)
    found[0.0, 0.7] = arm(51.0, noisy - noisy.mean() + found[WHOLE].alignment.mean())
    choices = compared(found, PROMPTS, None, 0.02)
    assert choices[1].loss.value == pytest.approx(0, abs=1e-12) and not choices[1].kept
    assert cheapest(choices).interval == WHOLE


def test_prompts_that_the_judge_does_not_know_are_left_out():
    found = arms(to_7=0.0)
    for one in found.values():
        one.alignment[:60] = math.nan
    assert compared(found, PROMPTS, None, 0.5)[1].loss.value == pytest.approx(0, abs=0.02)
    found[WHOLE].alignment[:] = math.nan
    with pytest.raises(ValueError, match="`--ordinary` must hold prompts that the judge knows"):
        compared(found, PROMPTS, None, 0.02)


def given(**changed):
    base = {
        **{"choose_interval": True, "guidance_interval": WHOLE, "tolerance": 0.02, "interval": None},
        **dict.fromkeys(("clip", "open_clip", "fid_network", "images_of_index")),
    }
    return argparse.Namespace(**{**base, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tolerance": 0.0}, r"`--tolerance` must lie in \(0, 1\), got 0.0"),
        ({"interval": ["0.5"]}, "`--interval` must be FROM:TO, got '0.5'"),
        ({"interval": ["0.5:0.2"]}, "`--interval` must be two fractions FROM < TO"),
        ({"guidance_interval": (0.0, 0.7)}, "`--guidance-interval` must not be given"),
        ({"choose_interval": False, "clip": "x"}, "`--clip` must come with --choose-interval"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        check(given(**changed))


def test_the_whole_interval_is_always_tried_first():
    assert grid_of(["0:0.6", "0:1"]) == (WHOLE, (0.0, 0.6))
    assert grid_of(None)[0] == WHOLE


@pytest.mark.slow
def test_a_calibration_with_a_chosen_interval_serves_that_interval(photos_sd_index, tmp_path, capsys):
    pytest.importorskip("diffusers")
    pytest.importorskip("torchmetrics")
    import amg
    from amg.cli import main
    from amg.commands.demo import open_pipeline
    from amg.zoo.photos import PHOTOS

    subjects = [photo.subjects[0] for photo in PHOTOS if photo.subjects][:4]
    ordinary, memorised = tmp_path / "ordinary.txt", tmp_path / "memorised.txt"
    ordinary.write_text("\n".join(f"a photo of {subject}, top left" for subject in subjects) + "\n")
    memorised.write_text("\n".join([photo.specific for photo in PHOTOS if photo.specific][:6]) + "\n")
    out = tmp_path / "made.json"
    command = [
        "calibrate",
        "photos-sd",
        "--index",
        photos_sd_index,
        "--embedder",
        "photos",
        "--scheduler",
        "ddim",
    ]
    command += ["--ordinary", str(ordinary), "--memorized", str(memorised), "--steps", "6", "--out", str(out)]
    command += ["--miss-rate", "0.5", "--choose-interval", "--interval", "0:0.5", "--tolerance", "0.99"]
    assert main(command) == 0
    made, said = json.loads(out.read_text()), capsys.readouterr().out
    record = made["interval"]
    assert [choice["interval"] for choice in record["choices"]] == [[0, 1], [0, 0.5]]
    assert [choice["evaluations"] for choice in record["choices"]] == [12.0, 9.0]
    assert record["judge"].startswith("photos-judge") and record["network"] == "photos-judge"
    assert record["chosen"] in ([0, 1], [0, 0.5]) and made["key"]["guidance_interval"] == record["chosen"]
    assert "<- chosen" in said and interval.sheet_path(out).read_bytes().startswith(b"\x89PNG")
    config = amg.AMGConfig.preset("main", calibration=out, guidance_interval=tuple(record["chosen"]))
    index = amg.Index.open(photos_sd_index, amg.embed.load("photos"))
    with amg.Sampler(open_pipeline("photos-sd"), index, config) as sampler:
        assert sampler(["a photo of a cat"], num_inference_steps=6, progress=False).amg
