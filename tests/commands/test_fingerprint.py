"""What a run depends on is known by content: models by their weights, indexes and files by their bytes."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

import amg
from amg.commands import fingerprint
from amg.commands.fingerprint import model_fingerprint, scheduler_fingerprint

pytest.importorskip("diffusers")
pytest.importorskip("skimage")


def build_small(path, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (60, 3, 32, 32), generator=generator, dtype=torch.uint8)
    amg.Index.build(pictures, path=path, progress=False)


def test_a_model_is_known_by_what_it_is(tmp_path):
    from amg import zoo

    one, other = zoo.load("photos-sd"), zoo.load("photos-sd")
    before = model_fingerprint(one)
    assert model_fingerprint(other) == before
    weight = other.unet.conv_out.weight
    with torch.no_grad():
        weight.view(-1)[-1] += 1e-3  # far behind the first values
    assert model_fingerprint(other) != before
    del other
    one.vae.register_to_config(scaling_factor=0.5)
    assert model_fingerprint(one) != before
    steps = scheduler_fingerprint(one.scheduler)
    one.scheduler.register_to_config(prediction_type="v_prediction")
    assert scheduler_fingerprint(one.scheduler) != steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int8, torch.bool])
@pytest.mark.parametrize("count", [100, 65_536, 200_000])
def test_weights_that_change_places_make_another_model(dtype, count):
    values = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = {"network": torch.nn.Module()}
    pipe = SimpleNamespace(components=parts)
    parts["network"].register_buffer("values", values)

    def of(changed):
        parts["network"].values = changed
        return model_fingerprint(pipe)

    ones, zeros = values.nonzero().flatten(), (values == 0).nonzero().flatten()
    swapped = values.clone()
    swapped[ones[-1]], swapped[zeros[-1]] = values[zeros[-1]], values[ones[-1]]
    far = values.clone()
    far[ones[0]], far[zeros[-1]] = values[zeros[-1]], values[ones[0]]
    shuffled = values.clone()
    shuffled[64:] = values[64:][torch.randperm(count - 64, generator=torch.Generator().manual_seed(1))]
    changed = values.clone()
    changed[-1] = 1 - changed[-1].int()
    every = [
        values,
        swapped,
        far,
        shuffled,
        values.flip(0),
        values.roll(1),
        values.roll(65_536 // 2),
        changed,
    ]
    every += [values.view(-1, 10).T.reshape(-1)] if count % 10 == 0 else []
    assert of(values) == of(values.clone())
    assert len({of(one) for one in every}) == len(every)


def test_every_place_has_its_own_weight():
    weights = fingerprint._weights(torch.device("cpu"))
    # of two 32-bit values that change places the sum changes by (a - b)(u - v), not 0 modulo 2^64
    assert len((weights % 2**33).unique()) == fingerprint.ROW and bool((weights % 2**33 != 0).all())


def test_an_index_that_was_rebuilt_while_open_is_refused(tmp_path):
    from amg.commands.fingerprint import index_fingerprint

    build_small(tmp_path / "i.amg", 0)
    index = amg.Index.open(tmp_path / "i.amg")
    assert index_fingerprint(index).startswith("nl2, 60 rows, ")
    shutil.rmtree(tmp_path / "i.amg")
    build_small(tmp_path / "i.amg", 1)
    with pytest.raises(ValueError, match="must not change while it is open"):
        index_fingerprint(index)


@pytest.mark.parametrize("name", ["calibration", "student"])
def test_the_files_of_a_config_count_by_content(tmp_path, name):
    from amg.commands.fingerprint import config_fingerprint

    path = tmp_path / "file"
    found = []
    for text in ("one", "two", "one"):
        path.write_text(text)
        found.append(config_fingerprint(amg.AMGConfig.preset("main", **{name: path}))[name])
    assert found[0] == found[2] != found[1] and found[0].startswith("sha256 ")
    with pytest.raises(FileNotFoundError):
        config_fingerprint(amg.AMGConfig.preset("main", **{name: tmp_path / "gone"}))
