"""What share of a training set an index covers: counted, written down, printed, and warned of."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from amg.index import Index, IndexCorrupt
from amg.index.coverage import NAMED, OTHER_REASONS, REASONS, SkippedFile, make_coverage, warn_of_gaps
from amg.index.store import _digest_of

pytest.importorskip("pyarrow")
pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


@pytest.fixture
def gappy(tmp_path, folder, make) -> Index:
    """Six pictures, one of them twice, and two that cannot be read."""
    (folder / "b" / "8.png").write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "b" / "9.png").write_bytes(b"?")
    (folder / "gone.png").symlink_to("nowhere")
    return make(folder, path=tmp_path / "gappy.amg")


def test_every_picture_is_counted(gappy):
    covered = gappy.manifest.coverage
    assert (covered.seen, covered.indexed, covered.folded) == (9, 6, 1)
    assert sorted(covered.skipped.values()) == [1, 1] and covered.skipped["a link to nothing"] == 1
    assert covered.share == gappy.coverage == 7 / 9
    lines = [json.loads(line) for line in (gappy.path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["position"], line["id"]) for line in lines] == [(7, "b/9.png"), (8, "gone.png")]
    assert lines[1]["reason"] == "a link to nothing"
    record = json.loads((gappy.path / "manifest.json").read_text())["coverage"]
    assert record["share"] == 7 / 9 and record["seen"] == 9


def test_nothing_skipped_means_all_and_no_file(folder, make):
    index = make(folder)
    assert index.coverage == 1.0 and not (index.path / "skipped.jsonl").exists()
    index.verify()


def test_only_the_first_thousand_names_and_hundred_reasons_are_kept(tmp_path):
    skipped = SkippedFile()
    for at in range(3000):
        skipped.add(at, f"é{at}", f"reason {at % 250}")
    skipped.write(tmp_path)
    lines = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == NAMED and json.loads(lines[-1]) == {
        "position": 999,
        "id": "é999",
        "reason": "reason 249",
    }
    assert len(skipped.counts) == REASONS + 1 and sum(skipped.counts.values()) == 3000
    assert skipped.counts["reason 0"] == 12 and skipped.counts[OTHER_REASONS] == 12 * 150


def test_a_build_with_more_skipped_pictures_than_names(tmp_path, folder, make):
    for at in range(1200):
        (folder / f"bad{at:04}.png").write_bytes(b"?")
    index = make(folder)
    assert len((index.path / "skipped.jsonl").read_text().splitlines()) == 1000
    assert len(index.manifest.skipped) == 100 and index.manifest.coverage.seen == 1206
    assert sum(index.manifest.coverage.skipped.values()) == 1200 and index.coverage == 6 / 1206


def test_an_index_of_an_earlier_version_has_a_coverage_too(gappy):
    file = gappy.path / "manifest.json"
    record = json.loads(file.read_text())
    del record["coverage"]
    file.write_text(json.dumps({**record, "sha256": _digest_of(record)}))
    index = Index.open(gappy.path)
    assert index.manifest.coverage is None and index.coverage == 7 / 9
    assert index.manifest.covered.skipped["a link to nothing"] == 1


@pytest.mark.parametrize(
    "changes",
    [{"seen": 10}, {"share": 1.0}, {"folded": 2}, {"skipped": {}}, {"indexed": "6"}, {"share": True}],
)
def test_a_coverage_that_does_not_add_up_is_refused(gappy, changes):
    file = gappy.path / "manifest.json"
    record = json.loads(file.read_text())
    record["coverage"].update(changes)
    file.write_text(json.dumps({**record, "sha256": _digest_of(record)}))
    with pytest.raises(IndexCorrupt, match="`coverage"):
        Index.open(gappy.path)


def test_the_last_line_of_build_and_info(gappy, folder, tmp_path, capsys):
    from amg.cli import main

    line = f"{'coverage':16} 77.7 % of 9 images: 6 indexed, 1 folded, 2 skipped"
    assert main(["index", "build", str(folder), "--out", str(tmp_path / "j"), "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert main(["index", "info", str(gappy.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert main(["index", "info", str(gappy.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["coverage"]["share"] == 7 / 9


def test_several_sources_on_the_command_line(folder, tmp_path, pictures, png, capsys):
    from amg.cli import main

    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "9.png").write_bytes(png(pictures[9]))
    (tmp_path / "l.csv").write_text("path,caption\nimages/a/1.png,one\n")
    words = [
        str(folder),
        str(tmp_path / "x"),
        str(tmp_path / "l.csv"),
        "--out",
        str(tmp_path / "j"),
        "--quiet",
    ]
    assert main(["index", "build", *words]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith("100 % of 8 images: 7 indexed, 1 folded, 0 skipped")
    )
    index = Index.open(tmp_path / "j")
    assert index.ids[6] == "x/9.png" and index.captions[1] == "one"


@pytest.mark.parametrize(("skipped", "warned"), [(0, False), (1, False), (2, True)])
def test_below_99_per_cent_is_warned_of(skipped, warned):
    index = SimpleNamespace(coverage=make_coverage(99, 0, {"x": skipped}).share, path="p")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_gaps([index, SimpleNamespace()])
    assert bool(caught) == warned
    if warned:
        assert "`index` covers 98.0 % of its training set (p)" in str(caught[0].message)


@pytest.mark.parametrize("opened", ["protect", "Sampler", "AMGScheduler", "also"])
def test_whoever_opens_an_index_for_a_model_is_told_once(gappy, folder, make, opened):
    diffusers = pytest.importorskip("diffusers")
    import amg

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    pipe = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler())
    whole = make(folder / "a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if opened == "AMGScheduler":
            amg.AMGScheduler(pipe.scheduler, gappy)
        elif opened == "also":
            amg.protect(pipe, whole, also=[gappy])
        else:
            getattr(amg, opened)(pipe, gappy)
    told = [entry for entry in caught if "of its training set" in str(entry.message)]
    assert len(told) == 1 and "covers 77.8 %" in str(told[0].message) and told[0].filename == __file__
