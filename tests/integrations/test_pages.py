"""The code of README.md and of pages, run as it stands on tiny pipelines; README's twice."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import amg
from amg.cli import make_parser

from .. import pipelines_tiny
from .conftest import TinyEmbedder

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_of(page, block=0):
    """The Python of one of a page's blocks."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return blocks[block]


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


def test_verdicts(embedding_index, sd, capsys):
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    names = {"index": embedding_index, "picture": picture}
    exec(code_of("docs/verdicts.md"), names)
    assert capsys.readouterr().out.startswith(("not memorised: cosine", "memorised: "))
    verdict = names["verdict"]
    assert amg.Verdict.from_dict(verdict.as_dict(trace=False)) == verdict
    config = amg.AMGConfig.preset("main", check_at=(), on_memorized="flag")
    with amg.Sampler(sd, embedding_index, config) as sampler:
        (verdict,) = sampler("abc", num_inference_steps=3, progress=False).amg
    exec(code_of("docs/verdicts.md", 1), {"verdict": verdict})
    assert capsys.readouterr().out.count("squared_gap") >= 3


def test_every_field_of_a_verdict_is_on_its_page():
    page = (ROOT / "docs/verdicts.md").read_text(encoding="utf-8")
    for name in (*amg.Verdict.__dataclass_fields__, "reason"):
        assert re.search(rf"^\| .*`{name}`.* \|", page, re.MULTILINE), name


def commands():
    """Every command of the pages that is written out: (page, line)."""
    for page in PAGES:
        for block in re.findall(r"^\s*```\n(.*?)^\s*```", page.read_text(encoding="utf-8"), re.DOTALL | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("  #")[0].strip()
                if line.startswith("amg ") and not set("…[|") & set(line):
                    yield pytest.param(line, id=f"{page.name}: {line[:40]}")


@pytest.mark.parametrize("line", [*commands()])
def test_the_pages_commands_are_commands(line):
    make_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert all(f"docs/{page.name})" in text for page in PAGES[1:])
