"""`amg.check` and `amg check`: the final check alone, of pictures that anything made."""

import json

import numpy as np
import pytest
import torch

import amg
from amg.cli import main
from amg.pipelines.pictures import to_pil


@pytest.fixture(scope="module")
def trained():
    """The training set of `embedding_index`."""
    return torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))


FORMS = {
    "tensor": lambda images: images,
    "bytes": lambda images: (images * 255).round().to(torch.uint8),
    "array": lambda images: images.permute(0, 2, 3, 1).numpy(),
    "bytes array": lambda images: (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(),
    "pil": to_pil,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gets_the_same_verdict(form, trained, embedding_index):
    verdicts = amg.check(FORMS[form](trained[:3]), embedding_index)
    assert [verdict.neighbour.row for verdict in verdicts] == [0, 1, 2]
    assert all(verdict.similarity > 0.999 and verdict.memorized for verdict in verdicts)
    assert {verdict.level for verdict in verdicts} == {"final"}
    (one,) = amg.check(FORMS[form](trained[:1])[0], embedding_index)
    assert one.neighbour.row == 0 and one.similarity == pytest.approx(verdicts[0].similarity, abs=1e-5)


def test_pictures_of_several_sizes_stay_in_order(trained, embedding_index):
    pictures = [to_pil(trained[at : at + 1])[0] for at in range(4)]
    pictures[1] = pictures[1].resize((24, 20))
    assert [verdict.neighbour.row for verdict in amg.check(pictures, embedding_index)][::2] == [0, 2]
    assert len(amg.check(pictures, embedding_index)) == 4


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (["a.png"], TypeError, "`images` must hold PIL images"),
        (None, TypeError, "`images` must hold PIL images"),
        (torch.full((1, 3, 16, 16), 2.0), ValueError, r"in \[0, 1\]"),
        (torch.zeros(1, 4, 16, 16), ValueError, r"\[1, 3, H, W\]"),
        (np.zeros((1, 16, 16, 4)), ValueError, r"\[B, H, W, 3\]"),
        (np.zeros((1, 16, 16, 4), dtype=np.uint8), ValueError, r"\[1, 3, H, W\]"),
    ],
)
def test_what_is_no_picture_is_refused(images, error, message, embedding_index):
    with pytest.raises(error, match=message):
        amg.check(images, embedding_index)


def test_what_is_no_index_is_refused(trained):
    with pytest.raises(TypeError, match=r"`index` must be an amg\.Index"):
        amg.check(trained[:1], object())


def test_the_command(tmp_path, capsys, pixel_index):
    trained = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    folder = tmp_path / "pictures"
    folder.mkdir()
    other = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    for name, picture in (("copy", trained[:1]), ("other", other)):
        to_pil(picture)[0].save(folder / f"{name}.png")
    lines = tmp_path / "verdicts.jsonl"
    common = ["--index", str(pixel_index.path), "--threshold", "0.5"]
    assert main(["check", str(folder), *common, "--json", str(lines)]) == 1
    shown = capsys.readouterr().out
    assert "2 pictures checked, 1 called memorised, 0 unreadable" in shown
    found = {line["picture"]: line for line in map(json.loads, lines.read_text().splitlines())}
    assert found[str(folder / "copy.png")]["memorized"] and not found[str(folder / "other.png")]["memorized"]
    assert main(["check", str(folder / "other.png"), *common]) == 0
    (folder / "broken.png").write_bytes(b"no picture")
    assert main(["check", str(folder), *common]) == 2
    assert "broken.png cannot be checked" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "missing.png"), *common]) == 2
