"""Whoever misses a package is told which extra brings it, wherever it is missed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import amg
from amg.extras import EXTRAS, NAMES, needed, require

ROOT = Path(__file__).parents[1]
GUARDED = "amg/index/"  # asks for pyarrow and Pillow through `import_parquet` and `import_pil` first
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def brought(extra):
    """The packages that an extra installs, lower case."""
    found = set()
    for wanted in PROJECT["optional-dependencies"][extra]:
        name = re.match(r"[\w-]+", wanted)[0].lower()
        inner = re.match(r"amg-sampler\[([\w,-]+)\]", wanted)
        found |= {name} if inner is None else set().union(*map(brought, inner[1].split(",")))
    return found


def test_every_extra_brings_the_package_it_is_named_for():
    for module, extra in EXTRAS.items():
        name = NAMES.get(module, module).lower()
        assert {name, f"{name}-cpu"} & brought(extra), (module, extra)


def unguarded(path):
    """Imports of optional packages in a file that are in no `try` with an ImportError."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(one) for one in node.handlers)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        if node not in guarded and any(name.partition(".")[0] in EXTRAS for name in names):
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_optional_package_is_imported_without_naming_its_extra():
    files = [path for path in (ROOT / "amg").rglob("*.py") if "kernels" not in path.parts]
    found = [place for path in files for place in unguarded(path) if not place.startswith(GUARDED)]
    assert not found, "use `amg.extras.needed`"


def test_what_installs_an_extra_is_written_in_one_place():
    files = [path.relative_to(ROOT) for path in (ROOT / "amg").rglob("*.py")]
    assert [str(path) for path in files if "pip install" in (ROOT / path).read_text()] == ["amg/extras.py"]


def test_what_a_message_says(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"^text needs open_clip_torch: pip install 'amg-sampler\[clip\]'$"):
        needed("open_clip", "text")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"^a page needs jinja2: pip install 'amg-sampler\[report\]'$"):
        require(["PIL", "jinja2"], "a page")


def hide(monkeypatch, package):
    """As if a package were not installed."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def test_protect_and_scheduler_without_diffusers():
    code = "import sys; sys.modules['diffusers'] = None; import amg; amg.AMGScheduler; amg.protect"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last == "ImportError: `amg.protect` needs diffusers: pip install 'amg-sampler[diffusers]'"


def picture(folder):
    pytest.importorskip("PIL.Image").new("RGB", (8, 8)).save(folder / "a.png")
    return folder


def built(folder, **options):
    return amg.Index.build(torch.rand(60, 3, 8, 8), path=folder / "i.amg", **options)


def sheet(folder):
    from amg.pipelines.pictures import to_pil

    return to_pil(torch.zeros(1, 3, 8, 8))


def distance(folder):
    from amg.evaluate.fid import fid

    return fid(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.nn.Flatten())


def page(folder):
    from amg.report.page import _environment

    return _environment()


def photograph(folder):
    from amg.zoo.photos import PHOTOS, load_photo

    return load_photo(PHOTOS[0])


MISSED = {
    "a bundled model": ("diffusers", lambda folder: amg.zoo.load("photos-ddpm"), "demo"),
    "its text encoder": ("transformers", lambda folder: amg.zoo.load("photos-sd"), "demo"),
    "a photograph": ("PIL", photograph, "demo"),
    "a folder of pictures": ("PIL", lambda f: amg.Index.build(picture(f), path=f / "i.amg"), "index"),
    "its bar": ("tqdm", built, "index"),
    "faiss": ("faiss", lambda folder: built(folder, progress=False).with_searcher("faiss:Flat"), "faiss"),
    "a report": ("jinja2", page, "report"),
    "FID": ("torchmetrics", distance, "metrics"),
    "pictures": ("PIL", sheet, "diffusers"),
}


@pytest.mark.parametrize("what", MISSED)
def test_whatever_misses_a_package_names_its_extra(what, tmp_path, monkeypatch):
    package, act, extra = MISSED[what]
    if what == "a folder of pictures":
        picture(tmp_path)
        monkeypatch.setattr(sys.modules[__name__], "picture", lambda folder: folder)
    hide(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"pip install 'amg-sampler\[{extra}\]'"):
        act(tmp_path)


def test_the_command_line_names_it_wherever_the_import_is(tmp_path, monkeypatch, capsys):
    from amg.cli import main

    source = picture(tmp_path)
    hide(monkeypatch, "pyarrow")
    assert main(["index", "build", str(source), "--out", str(tmp_path / "i.amg"), "--quiet"]) == 2
    assert "pip install 'amg-sampler[index]'" in capsys.readouterr().err


COMMANDS = {
    "sample": ("diffusers", ("photos-ddpm", "--index", "i", "--out", "o"), "diffusers"),
    "audit": ("jinja2", ("photos-sd", "--index", "i", "--out", "o"), "report"),
    "demo": ("torchmetrics", ("--out", "o"), "demo"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_it_before_it_does_anything(command, tmp_path, monkeypatch, capsys):
    from amg.cli import main

    package, words, extra = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    hide(monkeypatch, package)
    assert main([command, *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].endswith(f"pip install 'amg-sampler[{extra}]'")
    assert not list(tmp_path.iterdir())


def test_info_names_the_extra_of_what_is_missing(monkeypatch, capsys):
    from amg.commands import info

    monkeypatch.setattr(info, "installed_version", lambda name: None)
    text = info.info_text()
    for name, extra in (("open_clip_torch", "clip"), ("faiss-cpu", "faiss"), ("faiss-gpu", "faiss-gpu")):
        assert f"{name} (pip install 'amg-sampler[{extra}]')" in text
