"""photos-flow, the bundled flow-matching model: it memorises, and leaves its copies at every door."""

import warnings

import pytest
import torch

import amg
from amg import zoo
from amg.cli import main
from amg.embed.photos import load_photos
from amg.zoo.judge import load_judge
from amg.zoo.photos import training_set

diffusers = pytest.importorskip("diffusers")
CALL = {"num_inference_steps": 12, "guidance_scale": 3.0, "output_type": "pt", "max_sequence_length": 1}


@pytest.fixture(scope="module")
def data():
    return training_set(64)


@pytest.fixture(scope="module")
def index(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("flow") / "flow.amg"
    return amg.Index.build(data.images, data.captions, load_photos(), path, progress=False)


@pytest.fixture
def pipe():
    pipe = zoo.load("photos-flow")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def memorised(data, count=4):
    return [data.captions[row] for row in range(len(data.ids)) if data.counts[row] > 1][:count]


def generators(count=4):
    return [torch.Generator().manual_seed(70 + seed) for seed in range(count)]


def copies(images):
    return (load_judge().copy_probability(images.clamp(0, 1)) > 0.5).sum().item()


def test_it_memorises_and_empty_t5_tokens_may_be_left_out(pipe, data):
    assert isinstance(pipe, diffusers.StableDiffusion3Pipeline)
    prompts = memorised(data)
    short = pipe(prompts, generator=generators(), **CALL).images
    assert copies(short) == 4
    long = pipe(prompts[:1], generator=generators(1), **{**CALL, "max_sequence_length": 256}).images
    assert copies(long) == 1


@pytest.mark.parametrize("taker", ["protect", "sampler"])
def test_no_copy_is_delivered(pipe, index, data, taker):
    config = amg.AMGConfig.preset("main", guidance_scale=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if taker == "protect":
            take = amg.protect(pipe, index, config)
            assert take.amg_level == "full"
        else:
            sampler = amg.Sampler(pipe, index, config)
            take = lambda prompts, **given: sampler(prompts, progress=False, **given)  # noqa: E731
    out = take(memorised(data), generator=generators(), **CALL)
    assert all(verdict.rewinds + verdict.retries >= 1 for verdict in out.amg)
    kept = [row for row, verdict in enumerate(out.amg) if not verdict.memorized]
    assert len(kept) >= 3 and copies(out.images[kept]) == 0
    assert all(verdict.caption is not None for verdict in out.amg if not verdict.memorized)


def test_the_commands_take_it_and_its_own_scheduler_alone(index, data, tmp_path, capsys):
    given = ["--index", str(index.path), "--embedder", "photos", "--steps", "6"]
    assert main(["sample", "photos-flow", *given, "--scheduler", "ddim", "--prompt", "a", "--out", "x"]) == 2
    assert "`--scheduler` must be left out for StableDiffusion3Pipeline" in capsys.readouterr().err
    student = tmp_path / "s.safetensors"
    options = ["--images", "8", "--train-steps", "2", "--out", str(student)]
    assert main(["distill", "photos-flow", *given, *options]) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(memorised(data, 2)) + "\n")
    out = ["--prompts", str(prompts), "--guidance-scale", "3", "--student", str(student), "--out"]
    assert main(["sample", "photos-flow", *given, *out, str(tmp_path / "out")]) == 0
    assert "2 images: " in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["000000.png", "000001.png"]
