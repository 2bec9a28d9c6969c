"""`amg info` reports what is installed and which kernels run, and never raises for what is missing."""

from importlib import metadata

import torch

from amg.commands import info
from amg.kernels import extension


def test_versions_are_those_of_the_installed_distributions():
    facts = info.info()
    assert facts["torch"] == torch.__version__
    for name, version in facts["packages"].items():
        assert version == (metadata.version(name) if version else None)


def test_a_missing_extension_is_explained(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    monkeypatch.setattr(extension, "REASON", "amg._C is not importable (why)")
    facts = info.info()
    assert facts["extension"] is False and facts["kernels"] == "plain PyTorch"
    assert facts["cpu_level"] == "none"
    assert "amg._C is not importable (why)" in info.info_text()


def test_text_names_every_package_once():
    text = info.info_text()
    for name in info.OPTIONAL:
        assert name in text.split("installed ", 1)[1]
    if extension.EXTENSION is not None:
        assert f"level {extension.EXTENSION.cpu_level()}" in text
