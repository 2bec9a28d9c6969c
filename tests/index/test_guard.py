"""The guard against a version written from its definition, and what it calls alike."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from amg.cli import main
from amg.index import Index, IndexBuildError, IndexVersionError, add_guard
from amg.index.guard import sketch
from amg.index.store import read_manifest, write_manifest


def build(images, path, **options):
    return Index.build(images, path=path, progress=False, **options)


def oracle(image: torch.Tensor) -> np.ndarray:
    """Unit differences of the luminance of [3, 32, 32] in [0, 1], float64."""
    grey = np.einsum("c,chw->hw", (0.299, 0.587, 0.114), image.double().numpy())
    across, down = np.zeros((32, 32)), np.zeros((32, 32))
    across[:, :-1] = grey[:, 1:] - grey[:, :-1]
    down[:-1] = grey[1:] - grey[:-1]
    both = np.concatenate([across.ravel(), down.ravel()])
    return both / np.linalg.norm(both)


@pytest.fixture
def photographs() -> torch.Tensor:
    """float [12, 3, 32, 32]: smooth random pictures."""
    noise = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.interpolate(noise, size=(32, 32), mode="bicubic").clamp(0, 1)


def test_sketch_is_the_unit_gradient_of_luminance(photographs):
    made = sketch(photographs)
    assert made.shape == (12, 2048) and made.dtype == torch.float16
    for picture, row in zip(photographs, made, strict=True):
        np.testing.assert_allclose(row.double().numpy(), oracle(picture), atol=2e-4)


def test_every_picture_of_the_index_is_its_own_nearest(tmp_path, photographs):
    for metric, index in (("nl2", build(photographs, tmp_path / "i")),):
        found = index.closest(photographs).guard
        assert metric == index.metric and found.row.tolist() == list(range(12))
        np.testing.assert_allclose(found.similarity.numpy(), 1, atol=1e-3)
        others = np.stack([oracle(one) for one in photographs])
        queries = (photographs.flip(0) * 0.5 + 0.2).roll(1, 3)
        views = [np.stack([oracle(one) for one in view]) @ others.T for view in (queries, queries.flip(-1))]
        expected = np.maximum(*views)
        found = index.closest(queries).guard
        np.testing.assert_allclose(found.similarity.numpy(), expected.max(1), atol=1e-3)
        assert found.row.tolist() == expected.argmax(1).tolist()


def test_a_mirrored_copy_is_found(tmp_path, photographs):
    found = build(photographs, tmp_path / "i").closest(photographs.flip(-1)).guard
    assert found.row.tolist() == list(range(12))
    np.testing.assert_allclose(found.similarity.numpy(), 1, atol=1e-3)
    broken = photographs.flip(-1).clone()
    broken[3] = torch.nan
    found = Index.open(tmp_path / "i").guard.nearest(broken)
    assert found.similarity.isnan().tolist() == [row == 3 for row in range(12)] and found.row[3] == 0


def test_other_colours_brightness_and_size_hide_no_copy(tmp_path, photographs):
    guard = build(photographs, tmp_path / "i").guard
    mixed = torch.tensor([[0.2, 0.5, 0.3], [0.3, 0.4, 0.3], [0.1, 0.7, 0.2]])
    for copy in (
        photographs * 0.4 + 0.5,
        torch.einsum("dc,bchw->bdhw", mixed, photographs),
        torch.nn.functional.interpolate(photographs, size=(128, 128), mode="bilinear"),
        (photographs + 0.02 * torch.randn(photographs.shape)).clamp(0, 1),
    ):
        found = guard.nearest(copy)
        assert found.row.tolist() == list(range(12)) and float(found.similarity.min()) > 0.8
    assert float(guard.nearest(photographs.flip(2).roll(7, 3)).similarity.max()) < 0.8


def test_flat_pictures_are_like_none(tmp_path):
    """All black, all white, and the noise of rounding: nothing to recognise, though the training set has
    such."""
    flat = torch.cat([torch.full((1, 3, 32, 32), shade) for shade in (0.0, 0.3, 1.0)])
    index = build(torch.cat([flat, torch.rand(4, 3, 32, 32)]), tmp_path / "i")
    queries = torch.cat([flat, (flat[1:2] + torch.randn(1, 3, 32, 32) * 3e-4)])
    assert float(index.guard.nearest(queries).similarity.abs().max()) < 0.2
    assert not torch.isnan(index.guard.sketches).any()


def test_closest_does_not_touch_the_pictures_or_their_graph(tmp_path, photographs):
    index = build(photographs, tmp_path / "i")
    queries = photographs[:2].clone().requires_grad_()
    found = index.closest(queries)
    assert not found.guard.similarity.requires_grad and torch.equal(queries.detach(), photographs[:2])


def strip_guard(path: Path) -> None:
    """Make of an index what an earlier version would have written."""
    manifest = read_manifest(path)
    names = {name for name in manifest.files if name.startswith(("guard", "members"))}
    for name in names:
        (path / name).unlink()
    record = json.loads((path / "manifest.json").read_text())
    record["files"] = {name: entry for name, entry in record["files"].items() if name not in names}
    for field in ("guard", "passed_over", "notes", "sha256"):
        record.pop(field)
    from amg.index import store

    record["sha256"] = store._digest_of(record)
    (path / "manifest.json").write_text(json.dumps(record))


@pytest.fixture
def old(tmp_path) -> tuple[Path, Path]:
    """An index of an earlier version, and its folder of pictures: copies and near copies among them."""
    folder, generator = tmp_path / "pictures", torch.Generator().manual_seed(9)
    folder.mkdir()
    pictures = torch.randint(0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for number, picture in enumerate(pictures):
        image = PIL.Image.fromarray(picture.permute(1, 2, 0).numpy())
        image.save(folder / f"{number:02}.png")
        if number % 10 == 0:
            image.save(folder / f"{number:02}-again.png")
            changed = picture.clone()
            changed[0, 0, 0] ^= 1
            PIL.Image.fromarray(changed.permute(1, 2, 0).numpy()).save(folder / f"{number:02}-near.png")
    build(folder, tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    strip_guard(tmp_path / "old")
    return tmp_path / "old", folder


def test_an_index_without_a_guard_opens_with_a_warning_that_says_the_remedy(old):
    with pytest.warns(UserWarning, match="has no guard .* `amg index guard .* IMAGES` adds one"):
        index = Index.open(old[0])
    assert index.guard is None and index.closest(torch.rand(2, 3, 16, 16)).guard is None


@pytest.mark.filterwarnings("error")
def test_a_guard_can_be_added(old, capsys):
    path, folder = old
    assert main(["index", "guard", str(path), str(folder), "--quiet"]) == 0
    assert "guard            66 sketches" in capsys.readouterr().out
    index, whole = Index.open(path, verify=True), Index.open(path.with_name("new"))
    assert torch.equal(index.guard.sketches[:60], whole.guard.sketches[:60])
    assert {*index.guard.sketches.sum(1).tolist()} == {*whole.guard.sketches.sum(1).tolist()}
    assert index.guard.rows.tolist() == whole.guard.rows.tolist()
    with pytest.raises(IndexBuildError, match="without a guard"):
        add_guard(path, folder)


@pytest.mark.filterwarnings("ignore:.*has no guard")
def test_a_guard_from_other_pictures_is_refused_and_nothing_changes(old):
    path, folder = old
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    (folder / "07.png").unlink()
    with pytest.raises(IndexBuildError, match=r"1 of 60 are not among them, first '07.png'"):
        add_guard(path, folder, progress=False)
    (folder / "07.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(IndexBuildError, match=r"07.png"):
        add_guard(path, folder, progress=False)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert Index.open(path, verify=True).guard is None


def test_sketches_made_otherwise_are_refused(tmp_path, photographs):
    from dataclasses import replace

    build(photographs, tmp_path / "i")
    write_manifest(tmp_path / "i", replace(read_manifest(tmp_path / "i"), guard="of another kind"))
    with pytest.raises(IndexVersionError, match="'of another kind'"):
        Index.open(tmp_path / "i")


@pytest.mark.filterwarnings("ignore:.*has no guard")
@pytest.mark.parametrize("how", ["other pictures", "black ones", "another order", "one more", "one less"])
def test_pictures_that_are_not_the_index_s_are_refused(old, how):
    path, folder = old
    first, second = folder / "01.png", folder / "02.png"
    if how == "other pictures":
        PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            first
        )
    elif how == "black ones":
        PIL.Image.new("RGB", (16, 16)).save(first)
    elif how == "another order":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif how == "one more":
        PIL.Image.new("RGB", (16, 16)).save(folder / "extra.png")
    else:
        (folder / "10-near.png").unlink()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(IndexBuildError, match=r"`images`"):
        add_guard(path, folder, progress=False)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.filterwarnings("ignore:.*has no guard")
def test_folded_pictures_of_an_old_index_come_under_its_metric(old):
    path, folder = old
    add_guard(path, folder, progress=False)
    index, whole = Index.open(path), Index.open(path.with_name("new"))
    queries = torch.rand(4, 3, 16, 16)
    assert torch.equal(index.members.vectors, whole.members.vectors)
    assert torch.equal(index.closest(queries).similarity, whole.closest(queries).similarity)


@pytest.mark.filterwarnings("ignore:.*has no guard")
def test_an_index_of_embeddings_compares_where_it_is_given_the_embedder(old, embedder, tmp_path):
    _, folder = old
    whole = build(folder, tmp_path / "e", embedder=embedder)
    shutil.copytree(tmp_path / "e", tmp_path / "alone")
    for name in ("e", "alone"):
        strip_guard(tmp_path / name)
    add_guard(tmp_path / "e", folder, embedder, progress=False)
    index = Index.open(tmp_path / "e", embedder)
    assert index.guard.rows.tolist() == whole.guard.rows.tolist()
    torch.testing.assert_close(index.members.vectors, whole.members.vectors, rtol=0, atol=1e-3)
    add_guard(tmp_path / "alone", folder, progress=False)
    alone = Index.open(tmp_path / "alone", embedder)
    assert alone.members is None and len(alone.guard.rows) == len(whole.guard.rows)
    assert any("guard alone" in note for note in alone.manifest.notes)
    strip_guard(tmp_path / "e")
    PIL.Image.new("RGB", (16, 16), (200, 3, 9)).save(folder / "01.png")
    with pytest.raises(IndexBuildError, match=r"01.png is not the picture of row"):
        add_guard(tmp_path / "e", folder, embedder, progress=False)
