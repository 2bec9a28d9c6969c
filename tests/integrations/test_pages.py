"""The code of README.md and docs/checkpoint.md, run as it stands on tiny pipelines; README's twice."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import amg

from .. import pipelines_tiny
from .conftest import TinyEmbedder

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]


def code_of(page):
    """The Python of a page's only block of it."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return block


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the pages name: pictures with captions, an embedder, checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training_images").mkdir()
    seeded = torch.Generator().manual_seed(0)
    lines = []
    for number in range(8):
        pixels = torch.randint(256, (16, 16, 3), generator=seeded, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "training_images" / f"{number}.png")
        lines.append(f'{{"file": "{number}.png", "caption": "a cat {number}"}}\n')
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    monkeypatch.setattr(amg.embed, "load", lambda spec: TinyEmbedder())
    return tmp_path


def test_readme_s_lines_run_twice(folder, monkeypatch, capsys):
    pipe, _ = pipelines_tiny.build("sd")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda folder: pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            names = {}
            exec(code_of("README.md"), names)
            assert names["verdict"].neighbour.caption.startswith("a cat ")
            assert (folder / "cat.png").exists() and not hasattr(pipe, "amg_level")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_checkpoint_of_every_family(folder, monkeypatch):
    made = {
        "StableDiffusionPipeline": pipelines_tiny.build("sd")[0],
        "StableDiffusionXLPipeline": pipelines_tiny.build("sdxl")[0],
        "StableDiffusion3Pipeline": pipelines_tiny.build("sd3")[0],
        "FluxPipeline": pipelines_tiny.build("flux")[0],
    }
    encoded = tuple(torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((1, 4, 32), (1, 32), (4, 3)))
    made["FluxPipeline"].encode_prompt = lambda **_: encoded  # no text encoder is small enough
    for kind, pipe in made.items():
        pipe.default_sample_size = 8
        loaded = lambda folder, torch_dtype, pipe=pipe: pipe.to(dtype=torch_dtype)  # noqa: E731
        monkeypatch.setattr(getattr(diffusers, kind), "from_pretrained", loaded)
    amg.Index.build(torch.rand(8, 3, 16, 16), None, TinyEmbedder(), "training.amg", progress=False)
    names = {"pipes": made, "picture": Image.new("RGB", (16, 16), "red")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code_of("docs/checkpoint.md"), names)
    assert [pipe.amg_level for pipe in made.values()] == ["full"] * 4
    assert names["edited"].amg[0].level in ("full", "final") and names["edit"].amg_level == "full"
