"""The converter and its commands: round trip in the official layouts, refusals, nothing half-written."""

import argparse
import hashlib
import os
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from amg.commands.embed import add_parser
from amg.embed import load
from amg.embed.convert import convert_sscd, is_torchscript, torchvision_name, weights_info
from amg.embed.network import tensors_sha256
from amg.embed.sscd import SSCD

CLASSY_CONVOLUTION = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6}


def classy_name(name):
    """A torchvision name in the layout of the `.classy.pt` files (Classy Vision's ResNeXt)."""
    parts = name.split(".")
    if parts[1] in ("conv1", "bn1"):
        return f"backbone.initial_block._module.{0 if parts[1] == 'conv1' else 1}.{parts[2]}"
    if parts[1] == "fc":
        return f"embeddings.1.{parts[2]}"
    stem = f"backbone.blocks.{int(parts[1][-1]) - 1}.{parts[2]}._module"
    if parts[3] == "downsample":
        return f"{stem}.downsample.{parts[4]}.{parts[5]}"
    if parts[3] == "bn3":
        return f"{stem}.bn.{parts[4]}"
    return f"{stem}.convolutional_block.{CLASSY_CONVOLUTION[parts[3]]}.{parts[4]}"


def trace(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module.eval(), torch.zeros(1, 3, 64, 64)).save(path)


@pytest.fixture(scope="module")
def torchscript_file(official_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("torchscript") / "sscd_random.torchscript.pt"
    network = SSCD()
    network.load_state_dict(official_state)
    trace(network, path)
    yield path
    path.unlink()


def test_round_trip_keeps_every_bit(official_state, official_file, converted_file):
    tensors = load_file(converted_file)
    assert tensors.keys() == official_state.keys()
    assert all(torch.equal(tensors[name], official_state[name]) for name in tensors)
    with safe_open(converted_file, "pt") as archive:
        assert archive.metadata() == {
            "architecture": "sscd-resnet50-gem3-512",
            "source_sha256": hashlib.sha256(official_file.read_bytes()).hexdigest(),
            "source_format": "state_dict",
        }


def test_info_says_what_the_file_is(converted_file, official_file):
    info = weights_info(converted_file)
    assert info.parameters == 24_557_120
    assert info.source_sha256 == hashlib.sha256(official_file.read_bytes()).hexdigest()
    assert info.file_sha256 == hashlib.sha256(converted_file.read_bytes()).hexdigest()
    assert info.sha == load(f"sscd:{converted_file}").sha


def test_sha_is_of_the_weights_not_of_the_file(official_state, converted_file, tmp_path):
    rewritten = tmp_path / "same.safetensors"
    save_file(official_state, rewritten, {"architecture": "sscd-resnet50-gem3-512", "note": "another file"})
    first, second = weights_info(converted_file), weights_info(rewritten)
    assert first.sha == second.sha and first.file_sha256 != second.file_sha256
    rewritten.unlink()


def test_tensors_sha256_sees_names_shapes_dtypes_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    others = [
        {"a": torch.arange(6.0), "c": torch.tensor(3)},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)},
        {"a": torch.arange(6.0), "b": torch.tensor(3, dtype=torch.int32)},
        {"a": torch.arange(6.0).flip(0), "b": torch.tensor(3)},
    ]
    shas = {tensors_sha256(tensors) for tensors in [base, *others]}
    assert len(shas) == 5 and tensors_sha256(dict(reversed(base.items()))) == tensors_sha256(base)


def test_classy_layout_converts_to_the_same_weights(official_state, converted_file, tmp_path):
    assert all(torchvision_name(classy_name(name)) == name for name in official_state)
    source, destination = tmp_path / "sscd.classy.pt", tmp_path / "sscd.safetensors"
    torch.save({classy_name(name): tensor for name, tensor in official_state.items()}, source)
    assert convert_sscd(source, destination).sha == weights_info(converted_file).sha
    source.unlink(), destination.unlink()


def test_torchscript_needs_the_flag(torchscript_file, official_file, converted_file, tmp_path):
    assert is_torchscript(torchscript_file) and not is_torchscript(official_file)
    destination = tmp_path / "sscd.safetensors"
    with pytest.raises(ValueError, match=r"got a TorchScript program .* --allow-torchscript"):
        convert_sscd(torchscript_file, destination)
    assert not any(tmp_path.iterdir())
    info = convert_sscd(torchscript_file, destination, allow_torchscript=True)
    assert info.sha == weights_info(converted_file).sha and info.source_format == "torchscript"
    destination.unlink()


class AveragePooled(SSCD):
    """The right weights in the wrong program."""

    def forward(self, images):
        return torch.nn.functional.normalize(self.backbone.fc(self.backbone.features(images).mean((2, 3))))


def test_a_torchscript_program_that_is_not_sscd_is_refused(official_state, tmp_path):
    network, source = AveragePooled(), tmp_path / "other.pt"
    network.load_state_dict(official_state)
    trace(network, source)
    with pytest.raises(ValueError, match="must compute SSCD; on a random image its output differs from ours"):
        convert_sscd(source, tmp_path / "out.safetensors", allow_torchscript=True)
    assert os.listdir(tmp_path) == ["other.pt"]
    source.unlink()


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", [{"backbone.conv1.weight": Payload()}, Payload(), torch.nn.Linear(2, 2)])
def test_pickled_objects_are_refused_and_never_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "evil.pt")
    with pytest.raises(
        ValueError, match=r"must be a file of plain tensors .* torch.load\(weights_only=True\)"
    ):
        convert_sscd("evil.pt", "out.safetensors")
    assert os.listdir() == ["evil.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.fc.bias"), r"missing 1: backbone\.fc\.bias; unknown 0"),
        (lambda s: s.update(extra=torch.zeros(1)), "missing 0: ; unknown 1: extra"),
        (
            lambda s: s.update({"backbone.fc.weight": torch.zeros(1024, 2048)}),
            r"backbone\.fc\.weight must be \[512, 2048\] torch\.float32, got \[1024, 2048\]",
        ),
        (
            lambda s: s.update({"backbone.fc.bias": torch.zeros(512, dtype=torch.float16)}),
            r"backbone\.fc\.bias must be \[512\] torch\.float32, got \[512\] torch\.float16",
        ),
        (
            lambda s: s.update({"backbone.fc.bias": torch.full((512,), float("nan"))}),
            r"backbone\.fc\.bias must be finite",
        ),
    ],
)
def test_other_weights_are_refused(official_state, change, message, tmp_path):
    state = dict(official_state)
    change(state)
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(ValueError, match=message):
        convert_sscd(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["in.pt"]
    (tmp_path / "in.pt").unlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"w": torch.zeros(1)}}, "got a dict with keys state_dict"),
        ([torch.zeros(1)], "must be a dict of names to tensors, got list"),
        ({}, "missing 320"),
    ],
)
def test_other_contents_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(ValueError, match=message):
        convert_sscd(tmp_path / "in.pt", tmp_path / "out.safetensors")


@pytest.mark.parametrize("garbage", [b"", b"no pickle at all", b"PK\x03\x04 torn zip"])
def test_garbage_is_refused(garbage, tmp_path):
    (tmp_path / "in.pt").write_bytes(garbage)
    with pytest.raises(ValueError, match="must be a file of plain tensors"):
        convert_sscd(tmp_path / "in.pt", tmp_path / "out.safetensors")


def test_paths_are_checked_first(official_file, tmp_path):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"precious")
    with pytest.raises(FileNotFoundError, match=r"`source` must be an existing file, got .*absent\.pt"):
        convert_sscd(tmp_path / "absent.pt", taken)
    with pytest.raises(FileNotFoundError, match="`destination` must lie in an existing folder"):
        convert_sscd(official_file, tmp_path / "no" / "out.safetensors")
    with pytest.raises(FileExistsError, match="`destination` must not exist"):
        convert_sscd(official_file, taken)
    assert taken.read_bytes() == b"precious"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(failing, official_file, tmp_path, monkeypatch):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"precious")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        convert_sscd(official_file, taken, overwrite=True)
    assert os.listdir(tmp_path) == ["taken.safetensors"] and taken.read_bytes() == b"precious"


def test_damaged_safetensors_are_refused(converted_file, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(converted_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"must be a safetensors file, got .*amg embedder convert"):
        load(f"sscd:{torn}")


def test_another_architecture_is_refused(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors", {"architecture": "student"})
    with pytest.raises(ValueError, match="must have architecture sscd-resnet50-gem3-512, got student"):
        load(f"sscd:{tmp_path / 'other.safetensors'}")


def run(*arguments):
    parser = argparse.ArgumentParser(prog="amg")
    add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["embedder", *map(str, arguments)])
    return parsed.run(parsed)


def test_the_commands(official_file, torchscript_file, tmp_path, capsys):
    destination = tmp_path / "sscd.safetensors"
    assert run("convert", torchscript_file, destination) == 1
    assert "TorchScript" in capsys.readouterr().err
    assert run("convert", official_file, destination) == 0
    converted = capsys.readouterr().out
    assert "24,557,120" in converted and "short side 288" in converted
    assert run("info", destination) == 0
    assert capsys.readouterr().out == converted
    assert run("convert", official_file, destination) == 1
    error = capsys.readouterr().err
    assert error.startswith("amg embedder: `destination` must not exist") and error.count("\n") == 1
    assert run("convert", torchscript_file, destination, "--allow-torchscript", "--force") == 0
    assert run("info", tmp_path / "absent") == 1
    destination.unlink()
