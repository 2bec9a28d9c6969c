"""The detection table: signals against their definitions, detectors against planted answers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from amg.evaluate.detection import auc, tpr_at_fpr

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def detection():
    """benchmarks/detection.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("detection")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def scores(detection):
    return importlib.import_module("evidence.scores")


@pytest.fixture(scope="module")
def recording(detection):
    return importlib.import_module("evidence.recording")


def generations(recording, count=80, steps=4, seed=0):
    """Random signals; the first half's m_t is larger at the last step alone."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(count, steps, 4, generator=generator, dtype=torch.float64) + 0.5
    raw[: count // 2, -1, 0] += 2
    others = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((count, steps),) * 2]
    return recording.Generations(raw, *others, torch.rand(count, generator=generator, dtype=torch.float64))


def planted(count=80):
    """Prompts (five images each), kinds and labels of `generations`."""
    prompts = [f"prompt {i // 5}" for i in range(count)]
    labels = torch.arange(count) < count // 2
    return prompts, ["memorised" if hit else "ordinary" for hit in labels.tolist()], labels


def test_measured_signals_are_their_definitions(recording):
    generator = torch.Generator().manual_seed(1)
    seen = [tuple(torch.randn(2, 3, 4, 5, generator=generator) for _ in range(3)) for _ in range(2)]
    last = torch.randn(2, 3, 4, 5, generator=generator)
    raw, pixel_cosine = recording.measured(seen, last)
    sample, uncond, cond = (part[1].double() for part in seen[1])  # image 1, step 1
    gap = cond - uncond
    want = [(gap**2).sum(), (uncond * gap).sum(), (uncond**2).sum(), ((sample - last[1].double()) ** 2).sum()]
    torch.testing.assert_close(raw[1, 1], torch.stack(want))
    by_pixel = (uncond * gap).sum(0) / (uncond.norm(dim=0) * gap.norm(dim=0))
    torch.testing.assert_close(pixel_cosine[1, 1], by_pixel.mean())
    moved = (seen[0][0][0].double() - seen[1][0][0].double()).square().sum()
    torch.testing.assert_close(raw[0, 0, 3], moved)


def test_recorded_signals_agree_with_the_packages_own(recording, tmp_path):
    """The watched network gives what the traces hold."""
    sampler = tiny(tmp_path / "index.amg")
    source = sampler.source
    seen: list = []
    source.denoiser = recording.replace(
        source.denoiser, network=recording.watched(source.denoiser.network, seen)
    )
    out = sampler(["a cat", "a hat"], num_inference_steps=3, output_type="latent", progress=False)
    raw, _ = recording.measured(seen, out.images)
    signals = [[step.signals for step in verdict.trace] for verdict in out.amg]
    traced = torch.tensor(signals, dtype=torch.float64)
    torch.testing.assert_close(raw[..., :3], traced[..., :3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(raw[:, :-1, 3], traced[:, :-1, 3], rtol=1e-4, atol=1e-6)


def tiny(path):
    """An unguided sampler of a tiny Stable Diffusion."""
    import amg

    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/integrations/conftest.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    embedder = made.TinyEmbedder().eval().requires_grad_(False)
    pictures = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    index = amg.Index.build(pictures, None, embedder, path, progress=False)
    options = {"c1": 0.0, "c2": 0.0, "c3": 0.0, "rewind_at": (), "check_at": (), "on_memorized": "flag"}
    return amg.Sampler(made.tiny_sd(), index, amg.AMGConfig.preset("main", **options))


def test_kept_batches_are_not_drawn_again_and_others_are_refused(recording, tmp_path, monkeypatch):
    jobs = [recording.Job(f"p{i}", "ordinary", i) for i in range(20)]
    drawn = []

    def draw(pipe, index, batch, steps):
        drawn.append(len(batch))
        return generations(recording, len(batch), steps)

    monkeypatch.setattr(recording, "draw", draw)
    first = recording.record(None, None, jobs, 3, tmp_path)
    again = recording.record(None, None, jobs, 3, tmp_path)
    assert drawn == [16, 4] and first.raw.shape == (20, 3, 4)
    torch.testing.assert_close(first.raw, again.raw)
    with pytest.raises(ValueError, match="`--work`"):
        recording.record(None, None, [recording.Job("q", "ordinary", 0), *jobs[1:]], 3, tmp_path)


def test_jobs_keep_kinds_apart(recording):
    pytest.importorskip("skimage")
    from amg.zoo.photos import training_set

    data = training_set(32)
    jobs = recording.jobs_of(data, (32, 40, 20, 16), 5)
    by_kind = {kind: [job.prompt for job in jobs if job.kind == kind] for kind in recording.KINDS}
    assert [len(by_kind[kind]) for kind in recording.KINDS] == [32, 40, 20, 16]
    assert set(by_kind["memorised"]) == {
        data.captions[row] for row in data.whole.nonzero().flatten().tolist()
    }
    for kind in recording.KINDS[1:]:
        assert len(set(by_kind[kind])) == len(by_kind[kind]) and not set(by_kind[kind]) & set(data.captions)
    assert len({job.seed for job in jobs}) == len(jobs)


def test_first_minimum(scores):
    gap = torch.tensor([[5.0, 3.0, 4.0, 1.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    assert scores.first_minimum(gap).tolist() == [[1, 2, 1, 1, 1], [1, 2, 3, 4, 5]]
    assert scores.first_minimum(gap[:, :1]).tolist() == [[1], [1]]


def test_weighted_statistics_are_those_of_the_resample(scores):
    generator = np.random.default_rng(0)
    values, labels = generator.integers(0, 30, 60).astype(float), generator.random(60) < 0.4
    counts = generator.integers(0, 3, (5, 60))
    areas, rates = scores.weighted(values, labels, counts)
    for number, count in enumerate(counts):
        drawn = np.repeat(np.arange(60), count)
        parts = torch.from_numpy(values[drawn]), torch.from_numpy(labels[drawn])
        assert areas[number] == pytest.approx(auc(*parts))
        assert rates[number] == pytest.approx(tpr_at_fpr(*parts, 0.01))


def test_folds_never_split_a_prompt_and_resamples_draw_whole_prompts(scores):
    prompts, kinds, labels = planted()
    folds = scores.folds_of(prompts, kinds, 4)
    assert all(len({int(folds[i]) for i in range(80) if prompts[i] == p}) == 1 for p in set(prompts))
    assert all(labels[folds == fold].any() and (~labels[folds == fold]).any() for fold in range(4))
    counts = scores.resamples(prompts, kinds, 50, 0)
    by_prompt = counts.reshape(50, 16, 5)
    assert (by_prompt == by_prompt[..., :1]).all() and (counts[:, :40].sum(1) == 40).all()


def test_detectors_find_what_is_planted_and_nothing_else(scores, recording):
    prompts, kinds, labels = planted()
    recorded, folds = generations(recording), scores.folds_of(prompts, kinds, 4)
    counts = scores.resamples(prompts, kinds, 20, 0)
    late = {
        name: scores.worth(scores.held_out(one, labels, folds), labels, counts)
        for name, one in scores.detectors(recorded, ~labels, 4).items()
    }
    assert late["gap"].auc == late["gate"].auc == 1.0 and late["gap"].tpr == late["gap"].skipped == 1.0
    assert late["combined"].auc > 0.97 and late["move"].auc < 0.75
    early = scores.detectors(recorded, ~labels, 1)
    assert scores.worth(scores.held_out(early["combined"], labels, folds), labels, counts).auc < 0.75


def test_a_detector_is_fitted_without_the_prompts_it_scores(scores):
    prompts, kinds, labels = planted()
    folds, trained = scores.folds_of(prompts, kinds, 4), []

    def memorising(train, labels):
        trained.append(train)
        return torch.where(train, labels.double(), torch.rand(len(labels), dtype=torch.float64))

    found = scores.held_out(memorising, labels, folds)
    assert auc(found, labels) < 0.75  # the answers of the training folds are of no use to it
    assert all((train & (folds == fold)).sum() == 0 for fold, train in enumerate(trained))


def test_kept_at_misses_no_more_than_stated(scores):
    positives = torch.arange(20.0)
    assert (positives < scores.kept_at(positives, 0.1)).sum() == 2
    with pytest.raises(ValueError, match="at least 9"):
        scores.kept_at(positives[:5], 0.1)


def test_lines_make_the_tables_and_the_chart(detection, recording, tmp_path):
    prompts, kinds, _ = planted()
    recorded = generations(recording)
    recorded.finished[:40], recorded.finished[40:] = 0.9, 0.1
    jobs = [recording.Job(p, kind, i) for i, (p, kind) in enumerate(zip(prompts, kinds, strict=True))]
    path = tmp_path / "detection.csv"
    detection.write(path, detection.lines_of(recorded, jobs, 4, 10))
    lines = detection.read(path)
    assert all(tuple(line) == detection.COLUMNS for line in lines)
    names = len(detection.NAMES) + 1
    assert len(lines) == len(detection.KINDS) + 2 * 3 * names  # steps 1, 2 and 3 of the 4
    text = detection.tables(path)
    assert "40 positive images of 8 prompts, 40 negative; 16 prompts in all" in text
    assert text.count("all eight, logistic regression") == 6 and "| memorised | 8 | 40 | 40 | 8 |" in text
    detection.draw(lines, tmp_path / "detection.png")
    assert (tmp_path / "detection.png").stat().st_size > 10_000
