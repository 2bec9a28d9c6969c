"""Who judges an audit's pictures: structure seen through colours, intervals over prompts, no guided judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amg.commands.audit.bundled import subject_of
from amg.commands.audit.environment import COLUMNS
from amg.commands.audit.folder import Record
from amg.commands.audit.judges import Judges, Looked, require_unseen
from amg.commands.audit.measure import measures
from amg.commands.audit.plan import Prompt
from amg.commands.audit.references import References, cover, look_through, of_path, structure_size, within
from amg.commands.audit.tables import table_of, write_csv, write_json
from amg.verdict import Neighbour, Verdict

WHERE = dict.fromkeys(COLUMNS, "here")


def looked_at(similarity, blocked=(), per_prompt=1):
    """One guidance's pictures under a cosine index, with these similarities."""
    records = []
    for n, value in enumerate(similarity):
        neighbour = Neighbour(0, "id", None)
        verdict = Verdict("cosine", value, 0.5, neighbour, value > 0.5, blocked=n in blocked, evaluations=4)
        records.append(Record(n, n // per_prompt, n, Prompt("a"), Path("x"), verdict, 0.1, 2, 100.0))
    count = len(records)
    values = torch.tensor(similarity)
    return Looked(records, values, torch.eye(count, 9), torch.rand(count, 3, 4, 4), (4, 4), {}, {})


def judges_of(missing):
    """An index of the embedder "e" alone; everybody else is missing."""
    manifest = SimpleNamespace(embedder=SimpleNamespace(name="e", sha256="0"))
    return Judges(SimpleNamespace(metric="cosine", dimension=9, manifest=manifest), missing=missing)


@pytest.fixture
def training():
    """uint8 [5, 3, 16, 16]: smooth random pictures."""
    coarse = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 1) * 255).byte()


def references(training):
    return References("five pictures", lambda: zip("abcde", training, strict=True))


def test_structure_sees_a_recoloured_and_a_mirrored_copy_and_not_noise(training):
    grey = (training[3].float() / 255 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    recoloured = torch.stack([grey, grey * 0.4, grey * 0.7]).flip(-1)
    small = torch.stack([training[1].float() / 255, recoloured, torch.rand(3, 16, 16)])
    seen = look_through(references(training), {"off": small}, (16, 16), None, {"b", "z"}, "cpu")
    assert seen.structure["off"][0] == pytest.approx(1.0, abs=1e-5)
    assert seen.structure["off"][1] == pytest.approx(1.0, abs=1e-4)
    assert seen.structure["off"][2] < 0.6
    assert seen.count == 5 and list(seen.nearest) == ["b"] and torch.equal(seen.nearest["b"], training[1])


def test_features_of_references_are_the_networks(training):
    network = lambda images: images.flatten(1)[:, :7]  # noqa: E731
    small = {"off": torch.rand(1, 3, 16, 16)}
    seen = look_through(references(training), small, (16, 16), network, set(), "cpu")
    torch.testing.assert_close(seen.features, (training.float() / 255).flatten(1)[:, :7].double())


def test_references_in_a_folder_and_one_that_cannot_be_read(training, tmp_path):
    from PIL import Image

    for n, picture in enumerate(training):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{n}.png")
    (tmp_path / "9.png").write_bytes(b"no picture")
    small = {"off": training[:1].float() / 255}
    seen = look_through(of_path(tmp_path), small, (16, 16), None, {"3.png"}, "cpu")
    assert (seen.count, seen.unreadable) == (5, 1) and torch.equal(seen.nearest["3.png"], training[3])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="readable images"):
        look_through(of_path(tmp_path / "empty"), small, (16, 16), None, set(), "cpu")


def test_cover_keeps_the_centre_and_the_aspect():
    wide = torch.zeros(3, 8, 24, dtype=torch.uint8)
    wide[:, :, 8:16] = 255
    assert torch.equal(cover(wide, (8, 8)), torch.ones(3, 8, 8))
    assert cover(torch.zeros(3, 30, 11, dtype=torch.uint8), (7, 5)).shape == (3, 7, 5)
    assert structure_size((512, 256)) == (64, 32) and structure_size((32, 48)) == (32, 48)
    assert within((1000, 2), 100) == (100, 1)


def test_large_pictures_are_compared_small_and_kept_no_larger_than_shown(training):
    wide = torch.nn.functional.interpolate(training.float(), (300, 600), mode="bicubic")
    wide = wide.clamp(0, 255).byte()
    small = torch.stack([cover(wide[4], structure_size((300, 600))).sqrt(), torch.rand(3, 32, 64)])
    seen = look_through(references(wide), {"off": small}, (300, 600), None, {"e"}, "cpu")
    assert seen.nearest["e"].shape == (3, 64, 128)
    assert seen.structure["off"][0] > 0.95 and seen.structure["off"][1] < 0.5


def test_a_judge_that_guides_is_refused():
    def index(metric, sha):
        embedder = None if sha is None else SimpleNamespace(sha256=sha, name="e")
        return SimpleNamespace(
            metric=metric, manifest=SimpleNamespace(embedder=embedder), path=Path(f"{sha}")
        )

    require_unseen([("e", index("cosine", "b"))], [index("cosine", "a"), index("nl2", None)])
    for judge in (index("cosine", "a"), index("nl2", None)):
        with pytest.raises(ValueError, match="guidance never saw"):
            require_unseen([("e", judge)], [index("cosine", "a"), index("nl2", None)])


def test_shares_intervals_and_blocked_pictures():
    # Two prompts of four pictures: all of the first are copies, one of the second; that one was blocked.
    looked = looked_at([0.9, 0.8, 0.75, 0.6, 0.95, 0.1, 0.2, 0.45], blocked=[4], per_prompt=4)
    judges = judges_of(missing={"references": "no pictures", "network": "n", "alignment": "a"})
    rows = {row.key: row for row in measures({"off": looked}, None, judges)}
    assert [rows[f"above_{t}"].cells["off"].value for t in (0.4, 0.5, 0.7)] == [62.5, 50.0, 37.5]
    assert rows["top1"].cells["off"].value == pytest.approx(0.9)
    above = rows["above_0.5"].cells["off"]
    assert (above.low, above.high) == (0.0, 100.0)  # two prompts, one of copies and one of none, resampled
    blocked = rows["blocked"].cells["off"]
    assert blocked.value == 12.5 and (blocked.low, blocked.high) == (0.0, 25.0)
    assert rows["structural"].missing == "no pictures" and not rows["structural"].cells


def test_what_is_missing_is_said_everywhere(tmp_path):
    import csv
    import json

    looked = looked_at([0.9, 0.2])
    judges = judges_of(missing={"references": "give pictures", "network": "give a network", "alignment": "x"})
    rows = measures({"off": looked}, None, judges)
    text = "\n".join(table_of(rows, ["off"]).notes)
    assert "structure: luminance correlation > 0.9 %: not measured, give pictures" in text
    write_json(tmp_path / "table.json", rows, {}, [], {})
    kept = {row["key"]: row for row in json.loads((tmp_path / "table.json").read_text())["measures"]}
    assert kept["fid"]["missing"] == "give a network" and kept["fid"]["guidances"] == {}
    assert kept["above_0.5"]["guidances"]["off"]["value"] == 50.0
    write_csv(tmp_path / "table.csv", rows, {"off": looked}, {"--seed": 3}, WHERE)
    (line,) = csv.DictReader((tmp_path / "table.csv").open(newline=""))
    assert line["seed"] == "3" and line["fid"] == "" and "structural: give pictures" in line["not_measured"]


def test_alignment_leaves_out_what_cannot_be_scored():
    looked = replace(looked_at([0.1, 0.2, 0.3]), alignment=torch.tensor([0.5, torch.nan, 1.0]))
    scorer = SimpleNamespace(name="somebody")
    judges = replace(judges_of({"references": "r", "network": "n"}), alignment=scorer)
    row = next(row for row in measures({"off": looked}, None, judges) if row.key == "alignment")
    assert row.label == "text alignment (somebody, 2 of 3 pictures scored)"
    assert row.cells["off"].value == 0.75


def test_photos_judge_knows_the_subject_of_every_training_caption():
    pytest.importorskip("skimage")
    from amg.zoo.photos import training_set

    data = training_set(32)
    assert [subject_of(caption) for caption in data.captions] == data.labels.tolist()
    assert (subject_of("7"), subject_of("99"), subject_of("a photo of a zebra")) == (7, -1, -1)
