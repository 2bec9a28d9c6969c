"""The mitigations' choice, measures, CSVs and tables, against hand computations and scipy."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from amg.config import AMGConfig
from amg.evaluate import fid
from amg.zoo.photos import training_set

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import frontier
    from mitigations import guided, measure, methods, records
finally:
    sys.path.remove(str(ROOT / "benchmarks"))


def row(method, share, alignment, **point):
    shown = {records.SHARE: share, "alignment": alignment}
    return {"method": method, "options": records.point_text(point), **{k: str(v) for k, v in shown.items()}}


def test_the_lowest_share_is_chosen_and_ties_go_to_alignment():
    rows = [
        row("a", 10.0, 0.9, x=1),
        row("a", 2.0, 0.5, x=2),
        row("a", 3.0, 0.7, x=3),
        row("a", 3.1, 0.99, x=4),
        row("b", 0.0, 1.0, x=5),
    ]
    assert records.chosen(rows, "a") == {"x": 3}
    with pytest.raises(ValueError, match="'c', of which no point was measured"):
        records.chosen(rows, "c")


def test_a_row_measured_again_takes_its_own_place(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    for method, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        records.put(path, {"method": method, "value": value}, ("method",))
    records.put(path, {"method": "c", "value": 4.0, "more": "x"}, ("method",))
    rows = records.read(path)
    assert [(one["method"], one["value"], one["more"]) for one in rows] == [
        ("a", "3", ""),
        ("b", "2", ""),
        ("c", "4", "x"),
    ]
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("hits", [0, 96, 30])
def test_intervals_of_shares(hits):
    stats = pytest.importorskip("scipy.stats")
    found = measure.share("x", torch.arange(96) < hits)
    exact = stats.binomtest(hits, 96).proportion_ci(0.95, "exact")
    assert found["x %"] == pytest.approx(100 * hits / 96)
    tolerance = 1e-6 if hits in (0, 96) else 1.5  # the bootstrap is near the exact one in the middle
    assert found["x low"] == pytest.approx(100 * exact.low, abs=tolerance)
    assert found["x high"] == pytest.approx(100 * exact.high, abs=tolerance)


def test_fid_of_features_is_that_of_the_pictures():
    """Against `amg.evaluate.fid` on pictures whose feature network is a mean over pixels."""
    generator = torch.Generator().manual_seed(0)
    generated, reference = (torch.rand(40, 3, 4, 4, generator=generator) ** power for power in (1, 2))
    features = [x.double().mean(3).flatten(1) for x in (generated, reference)]
    want = fid(generated, reference, lambda x: x.double().mean(3).flatten(1))
    found = measure.distances(*features, 20)
    assert found["FID"] == pytest.approx(want, rel=1e-6)
    assert found["FID low"] < found["FID"] < found["FID high"]
    assert found["FID high"] - found["FID"] == pytest.approx(found["FID"] - found["FID low"])
    assert "FID low" not in measure.distances(*features, 0)


def test_diversity_is_the_mean_distance_within_prompts():
    angles = torch.tensor([0.0, math.pi / 2, 1.0, 0.3])
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    assert measure.diversity(embeddings, ["a", "a", "b", "c"]) == pytest.approx(1.0, abs=1e-6)
    within = (1 + (1 - math.cos(0.7))) / 2
    assert measure.diversity(embeddings, ["a", "a", "b", "b"]) == pytest.approx(within, abs=1e-6)
    assert math.isnan(measure.diversity(embeddings, list("abcd")))


def test_validation_and_test_share_no_prompt_and_no_seed():
    data = training_set(64)
    validation, test = (measure.prompts_of(split, 96, data) for split in measure.SPLITS)
    assert not set(validation.texts) & set(test.texts) and not set(validation.seeds) & set(test.seeds)
    known = dict(zip(data.captions, data.labels.tolist(), strict=True))
    for prompts in (validation, test):
        assert int(prompts.specific.sum()) == 72 and len(set(prompts.seeds)) == 96
        specific = [text for text, kind in zip(prompts.texts, prompts.specific, strict=True) if kind]
        assert len(set(specific)) == 8
        assert [known[text] for text in specific] == prompts.labels[:72].tolist()
        assert not set(prompts.texts[72:]) & set(data.captions)
    with pytest.raises(ValueError, match="`split`"):
        measure.prompts_of("train", 96, data)


def test_ablations_keep_only_their_terms():
    for method in methods.METHODS:
        for point in method.grid:
            json.dumps(dict(point))
    for terms, zero in (((), "c1 c2 c3"), (("spe",), "c2 c3"), (("dup", "sim"), "c1")):
        made = guided.paper(None, terms, c3=30.0)
        config = AMGConfig.preset(made.preset, **dict(made.overrides)).for_metric("cosine")
        constants = {name: getattr(config, name) for name in ("c1", "c2", "c3")}
        assert {name for name, value in constants.items() if value == 0} == set(zero.split())
        assert "c3" in zero.split() or constants["c3"] == 30.0
        assert (config.check_at, config.rewind_at, config.step_length) == ((), (), "constant")
    with pytest.raises(ValueError, match="`terms`"):
        guided.paper(None, ("other",))


def figures(method, share, fid, alignment):
    """A row of the test CSV with every column."""
    columns = {
        **{f"{name}{part}": share for name in ("network", "luminance") for part in (" %", " low", " high")},
        **{
            f"cosine > {threshold}{part}": share
            for threshold in measure.THRESHOLDS
            for part in (" %", " low", " high")
        },
        **{f"alignment{part}": alignment for part in ("", " low", " high", " memorised", " ordinary")},
        **{f"FID{part}": fid for part in ("", " low", " high")},
        **dict.fromkeys(("Top5%", "Top1", "KID", "subject %", "evaluations", "blocked %"), 1.0),
        **dict.fromkeys(("diversity memorised", "diversity ordinary", "before the check %"), 1.0),
    }
    head = {"method": method, "options": "{}", "images": 96, "steps": 30, "first seed": 30000, "torch": "x"}
    return head | columns


def test_tables_say_who_is_better_where(tmp_path):
    assert frontier.tables(tmp_path) == "No figures are recorded yet."
    for made in (
        figures("plain", 75.0, 900.0, 0.96),
        figures("released AMG", 0.5, 700.0, 0.5),
        figures("static transition (Jain)", 0.0, 500.0, 0.95),
        figures("ours, main", 0.0, 600.0, 0.9),
    ):
        records.put(tmp_path / records.TEST, made, ("method",))
    for method, seconds in (("ours, main", 0.3), ("ours, main", 0.5), ("static transition (Jain)", 0.2)):
        line = {"method": method, "round": seconds, "seconds": seconds}
        records.put(tmp_path / records.SECONDS, line, ("method", "round"))
    text = frontier.tables(tmp_path)
    assert frontier.seconds_of(tmp_path)["ours, main"] == pytest.approx(0.4)
    assert "| plain |  | 75.0 [75.0, 75.0] |" in text and "| **ours, main** |" in text
    verdict = next(line for line in text.splitlines() if line.startswith("- **ours, main**"))
    assert "released AMG (nowhere)" in verdict and "plain" not in verdict
    better = "FID 500 against 600, alignment 0.950 against 0.900, 0.20 s against 0.40 s"
    assert f"static transition (Jain) ({better})" in verdict


def test_labels_of_the_plot_overlap_neither_points_nor_each_other(tmp_path):
    for number, method in enumerate(methods.METHODS[:12]):
        made = figures(method.name, 5.0 + number % 3, 700.0 + 5 * number, 0.9)
        records.put(tmp_path / records.TEST, made, ("method",))
    drawn = []
    close = frontier.plt.close
    frontier.plt.close = drawn.append
    try:
        frontier.plot(tmp_path, tmp_path / "frontier.png")
    finally:
        frontier.plt.close = close
    axis = drawn[0].axes[0]
    renderer = drawn[0].canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axis.texts if text.get_text()]
    assert len(boxes) == 12
    assert all(not box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))
    close(drawn[0])
