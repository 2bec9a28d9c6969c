"""What would act, said before anything is sampled."""

import warnings

import pytest
import torch

import amg
from amg.cli import main
from amg.pipelines.explain import explained

from .. import pipelines_tiny
from .conftest import TinyEmbedder

SAID = {
    "sd": ("Stable Diffusion", "full: the halves", "goes back", "DDIMScheduler: noise levels", "takes it"),
    "sd_img2img": ("Stable Diffusion", "full: the halves", "is drawn again", "DDIM", "takes it"),
    "flux": ("FLUX.1", "full: the halves", "goes back", "FlowMatchEuler", "takes it"),
    "zimage": ("none", "step: x0_hat", "is drawn again by its own call", "FlowMatch", "does not take it"),
    "ddpm": ("pixels", "full: its network", "goes back", "DDPM", "takes it"),
}


@pytest.fixture
def index(tmp_path):
    captions = [f"a {n}" for n in range(6)]
    return amg.Index.build(
        torch.rand(6, 3, 16, 16), captions, TinyEmbedder(), tmp_path / "e.amg", progress=False
    )


@pytest.mark.parametrize("name", SAID)
def test_every_kind_is_told_apart(name, index):
    pipe, _ = pipelines_tiny.build(name)
    rows = dict(explained(pipe, index, amg.AMGConfig.preset("main")))
    asked = ("family", "level", "too close at a checkpoint", "scheduler", "Sampler")
    for what, answer in zip(asked, SAID[name], strict=True):
        assert rows[what].startswith(answer), (what, rows[what])
    assert rows["index"] == f"6 pictures at {index.path}, cosine of tiny"
    assert rows["captions of later tries"].startswith("6 of 6 rows, bank of 0")
    assert ("no text_encoder" in rows["captions of later tries"]) == (name == "flux")
    assert rows["config"] == "preset main, threshold 0.5" and rows["missing packages"] == "none"


def test_protect_prints_the_same(index, capsys):
    pipe, _ = pipelines_tiny.build("sd3")
    amg.protect(pipe, index, explain=True)
    assert (
        "level: full: the halves of its guidance are known, and proved in each call"
        in capsys.readouterr().out
    )


def test_the_command(tmp_path, capsys):
    pipe, _ = pipelines_tiny.build("sd_inpaint")
    pipe.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        amg.Index.build(torch.rand(6, 3, 16, 16), None, None, tmp_path / "p.amg", progress=False)
        assert main(["doctor", str(tmp_path / "model"), "--index", str(tmp_path / "p.amg")]) == 0
    out = capsys.readouterr().out
    assert "StableDiffusionInpaintPipeline" in out and "pixels (nL2)" in out and "threshold 1.4" in out
    assert main(["doctor", str(tmp_path), "--index", str(tmp_path / "p.amg")]) == 2
    assert "`MODEL` must be one of" in capsys.readouterr().err
