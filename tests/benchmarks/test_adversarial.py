"""The adversarial audit: its own check finds what is planted, and every case the issue names is there."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def adversarial():
    """benchmarks/adversarial.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("adversarial")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def attacks(adversarial):
    return importlib.import_module("evidence.attacks")


@pytest.fixture(scope="module")
def targets(adversarial):
    return importlib.import_module("evidence.targets")


@pytest.fixture(scope="module")
def tiny():
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/integrations/conftest.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def stage(adversarial, tiny, tmp_path_factory):
    """A tiny Stable Diffusion and an index of sixty pictures, the first four of them duplicated."""
    import amg
    from amg.zoo.photos import TrainingSet

    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    counts = torch.tensor([3] * 4 + [1] * 56)
    captions = tuple(f"a picture of number {i}" for i in range(60))
    data = TrainingSet(images, torch.zeros(60, dtype=torch.int64), counts, captions, captions)
    embedder = tiny.TinyEmbedder().eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("audit")
    options = {"embedder": embedder, "progress": False, "dtype": "float32"}
    index = amg.Index.build(images, list(captions), path=folder / "plain.amg", **options)
    more = torch.cat([images, images[:4].flip(-1)])
    views = amg.Index.build(more, None, path=folder / "views.amg", near_duplicate=False, **options)
    pipe = tiny.tiny_sd()
    return adversarial.Stage("photos-sd", pipe, pipe.scheduler, {"trained": index, "views": views}, (), data)


def verdict(memorized=False, **more):
    from amg.verdict import Neighbour, Verdict

    return Verdict("cosine", 0.1, 0.5, Neighbour(0, "a", None), memorized, **more)


def test_brute_force_agrees_with_the_index(adversarial, stage, tmp_path):
    import amg

    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8)
    found = stage.index.search(images).similarity.double()
    torch.testing.assert_close(adversarial.brute_cosine(images, stage.index), found, rtol=0, atol=1e-5)
    pixels = amg.Index.build(stage.data.images, None, None, tmp_path / "pixels.amg", progress=False)
    nearest = pixels.nearest(images.float().flatten(1) / 255).similarity.double()
    torch.testing.assert_close(adversarial.brute_nl2(images, pixels), nearest, rtol=1e-5, atol=1e-6)


def test_only_an_unmarked_copy_breaks_the_promise(adversarial, stage):
    from amg.config import AMGConfig

    config = AMGConfig.preset("main", threshold=0.99)
    images = torch.cat([stage.data.images[:4], 255 - stage.data.images[:1]])
    says = [verdict(), verdict(True), verdict(True, blocked=True, retries=3), verdict(retries=1), verdict()]
    line = adversarial.figures(stage, adversarial.Drawn(images, says, 1.0), config, stage.index)
    assert (line["broken"], line["marked"], line["blocked"], line["stepped_in"]) == (2, 1, 1, 3)
    assert float(line["largest"]) == pytest.approx(1.0, abs=1e-4)
    assert line["luminance_pct"] == "75.0"  # three of the four delivered are copies


def test_a_further_index_is_checked_too(adversarial, stage):
    from amg.config import AMGConfig

    config, flipped = AMGConfig.preset("main", threshold=0.99), stage.data.images[:2].flip(-1)
    alone, _ = adversarial.exceeding(flipped, (stage.index,), config)
    both, largest = adversarial.exceeding(flipped, (stage.index, stage.views), config)
    assert not alone.any() and both.all() and (largest < 0.9999).all()


def test_a_case_draws_what_it_says_and_a_crash_is_a_line(adversarial, attacks, stage):
    cases = [
        attacks.Attack("call", "four", steps=2, options={"num_images_per_prompt": 4}),
        attacks.Attack("protect", "dpm++", steps=2, scheduler="dpm++", protected=True, negative=list),
        attacks.Attack("target", "flip", steps=2, target=("noised", "flip"), index="views"),
    ]
    for case in cases:
        line = adversarial.line_of(stage, case, "main", 4)
        assert line["error"] == "" and line["broken"] == 0 and line["images"] == 4
        assert tuple(line) == adversarial.COLUMNS and float(line["evaluations"]) >= 4
        assert type(stage.pipe).__name__ == "StableDiffusionPipeline"
        assert not hasattr(stage.pipe, "_amg_protection")
    broken = attacks.Attack("steps", "none", steps=0)
    assert "`num_inference_steps`" in adversarial.line_of(stage, broken, "main", 4)["error"]


def test_the_attacks_the_issue_names_are_there(attacks):
    from amg.commands.sample import SCHEDULERS

    tried = {one.scheduler for one in attacks.ATTACKS if not one.protected and one.model == "photos-sd"}
    assert tried == {one.scheduler for one in attacks.ATTACKS if one.protected} == set(SCHEDULERS)
    assert {1.5, 3.0, 15.0} <= {one.scale for one in attacks.ATTACKS}
    assert {5, 10, 30, 50, 100} <= {one.steps for one in attacks.ATTACKS}
    assert {view for _, view in (one.target for one in attacks.ATTACKS if one.target)} >= {"flip", "crop"}
    keys = [(one.group, one.name) for one in attacks.ATTACKS]
    assert len(set(keys)) == len(keys)


def test_rewritten_captions(attacks):
    caption = "Red motorcycle parked in a cluttered garage, Middlebury"
    assert sorted(attacks.shuffled(caption).split()) == sorted(caption.split()) != caption.split()
    assert attacks.synonyms(caption) == "scarlet motorbike parked in a cluttered shed, middlebury"
    assert attacks.dropped("a b c d e f g") == "a b d e g"
    assert attacks.others(["a", "b", "c"]) == ["b", "c", "a"]


def test_noised_target_keeps_the_photograph_under_the_noise(targets, stage):
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = targets.noised(stage.pipe, x0, 5, seed=3)
    scheduler = type(stage.pipe.scheduler).from_config(stage.pipe.scheduler.config)
    scheduler.set_timesteps(5)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[0]]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise)


def test_inverted_target_leads_back_to_the_photograph(targets, stage):
    """A denoiser that always says 0.3 inverts exactly."""
    import types

    unet = types.SimpleNamespace(config=stage.pipe.unet.config)

    class Constant:
        scheduler, vae, _execution_device = stage.pipe.scheduler, stage.pipe.vae, "cpu"
        encode_prompt = staticmethod(lambda *rest: (torch.zeros(2, 12, 16), None))

        @staticmethod
        def unet(sample, t, **rest):
            return (torch.full_like(sample, 0.3),)

    assert unet.config.in_channels == 4
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = targets.inverted(Constant, x0, ["a", "b"], 10)
    scheduler = type(stage.pipe.scheduler).from_config(stage.pipe.scheduler.config)
    scheduler.set_timesteps(10)
    start = sample.clone()
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.full_like(sample, 0.3), t, sample).prev_sample
    torch.testing.assert_close(sample, x0, rtol=1e-3, atol=0.05)
    assert (start - x0).abs().mean() > 0.1


def test_views(targets):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(targets.cropped(image, 1.0), image)
    block = torch.zeros(1, 3, 64, 64)
    block[..., 16:48, 16:48] = 1.0
    assert (targets.cropped(block, 0.5) == 1).all()
    assert set(targets.ADDED) <= set(targets.VIEWS)


def test_lines_make_the_tables(adversarial, attacks, stage, tmp_path, monkeypatch):
    path = tmp_path / "adversarial.csv"
    case = attacks.Attack("steps", "2", steps=2)
    lines = [adversarial.line_of(stage, case, preset, 4) for preset in ("main", "off")]
    crash = adversarial.line_of(stage, attacks.Attack("steps", "0", steps=0), "main", 4)
    adversarial.append(path, [*lines, crash], adversarial.COLUMNS)
    monkeypatch.setattr(adversarial, "VIEWS", {"flip": lambda images: images.flip(-1)})
    views = adversarial.view_lines(stage)
    adversarial.append(adversarial.views_beside(path), views, adversarial.VIEW_COLUMNS)
    text = adversarial.tables(path)
    assert "2 guided cases, 4 images: **0 delivered" in text and "1 cases raised" in text
    late, blocked = 25 * lines[0]["stepped_in"], lines[0]["blocked"]
    assert f"| steps: 2 | {25 * lines[1]['marked']} | 0 | {blocked}, 0 | {late} |" in text
    assert "ValueError: `num_inference_steps`" in text
    assert views[0]["over_main_with_views"] == 4 and "| flip | " in text
    assert {adversarial.key_of(line) for line in adversarial.read(path)} >= {("steps", "2", "main")}


def test_a_case_drawn_again_replaces_its_line_alone(adversarial, tmp_path):
    path, line = tmp_path / "a.csv", dict.fromkeys(adversarial.COLUMNS, "")
    for number, attack in enumerate(("one", "two", "one")):
        adversarial.put(path, {**line, "attack": attack, "images": number})
    assert [(row["attack"], row["images"]) for row in adversarial.read(path)] == [("two", "1"), ("one", "2")]
    assert list(tmp_path.iterdir()) == [path]
