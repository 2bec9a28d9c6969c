"""What is not supported is refused at once, by the same list, whoever is asked."""

import json

import pytest
import torch

import amg
from amg.cli import main
from amg.commands.sample import open_pipeline
from amg.pipelines.supported import SAMPLED

diffusers = pytest.importorskip("diffusers")
OTHERS = (
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "DiTPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "FluxImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "FluxKontextPipeline",
    "ConsistencyModelPipeline",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines(name, embedding_index):
    """The Sampler does not know their loops; `protect` holds their pictures to the promise, and says so."""
    pipe = object.__new__(getattr(diffusers, name))
    with pytest.raises(TypeError, match=f"`pipe` must be one of .*, got {name}") as caught:
        amg.Sampler(pipe, embedding_index)
    assert all(supported in str(caught.value) for supported in SAMPLED)
    with pytest.warns(UserWarning, match=f'{name} is protected at level "final"'):
        assert amg.protect(pipe, embedding_index).amg_level == "final"


def test_no_pipeline_at_all(embedding_index):
    with pytest.raises(TypeError, match=r"`pipe` must be one of .*, got object"):
        amg.Sampler(object(), embedding_index)
    with pytest.raises(TypeError, match=r"`pipe` must be a diffusers pipeline, got object"):
        amg.protect(object(), embedding_index)


@pytest.mark.parametrize("name", ["LDMPipeline", "DiTPipeline", "StableDiffusionImg2ImgPipeline"])
@pytest.mark.parametrize("command", ["sample", "audit", "calibrate", "distill", "bench"])
def test_commands_refuse_a_folder_before_they_read_weights(command, name, tmp_path, capsys, embedding_index):
    """The folder holds nothing but the pipeline's name: nothing else was looked for."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": name}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n")
    common = [str(tmp_path / "model"), "--index", str(embedding_index.path)]
    own = {
        "sample": ["--prompts", str(prompts), "--out", str(tmp_path / "out")],
        "audit": ["--prompts", str(prompts), "--out", str(tmp_path / "out")],
        "calibrate": ["--ordinary", str(prompts), "--out", str(tmp_path / "out.json")],
        "distill": ["--embedder", "photos", "--out", str(tmp_path / "out.safetensors")],
        "bench": ["--csv", str(tmp_path / "out.csv")],
    }
    assert main([command, *common, *own[command]]) != 0
    message = capsys.readouterr().err
    assert f"got {name}" in message and all(supported in message for supported in SAMPLED)
    assert "Traceback" not in message and sorted(tmp_path.iterdir()) == [tmp_path / "model", prompts]


def with_unet(pipe, **options):
    """The pipeline with a U-Net of other options."""
    config = {name: value for name, value in pipe.unet.config.items() if name[0] != "_"} | options
    pipe.unet = type(pipe.unet).from_config(config).eval()
    return pipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 9}, "no inpainting.*in_channels=9 and pipe.unet's out_channels=4"),
        ({"in_channels": 8}, "in_channels=8"),
        ({"in_channels": 16, "out_channels": 16}, "in_channels=16 and pipe.vae's latent_channels=4"),
        ({"num_class_embeds": 10}, "num_class_embeds=None, got num_class_embeds=10; supported are"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
    ],
)
@pytest.mark.parametrize("taker", [amg.protect, amg.Sampler])
def test_a_unet_of_another_kind(taker, options, message, sd, embedding_index):
    with pytest.raises(ValueError, match=message):
        taker(with_unet(sd, **options), embedding_index)


@pytest.mark.parametrize("taker", [amg.protect, amg.Sampler])
def test_learned_variances(taker, ddpm, pixel_index):
    with pytest.raises(ValueError, match=r"in_channels=3 and pipe.unet's out_channels=6"):
        taker(with_unet(ddpm, out_channels=6), pixel_index)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("taker", [amg.protect, amg.Sampler])
def test_pixels_of_another_number_of_channels(taker, channels, ddpm, pixel_index):
    """MNIST, X-rays: they failed at the first measurement, halfway through."""
    unet = with_unet(ddpm, in_channels=channels, out_channels=channels)
    with pytest.raises(ValueError, match=f"`pipe.unet` must make pictures of 3 .*in_channels={channels}"):
        taker(unet, pixel_index)


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler"])
@pytest.mark.parametrize("taker", [amg.protect, amg.Sampler])
def test_a_part_that_is_missing(taker, part, sd, embedding_index):
    setattr(sd, part, None)
    with pytest.raises(ValueError, match=rf"`pipe.{part}` must not be None"):
        taker(sd, embedding_index)


def test_a_sampler_refuses_what_its_own_loop_would_leave_out(sd, embedding_index):
    with pytest.raises(
        ValueError, match=r"embedded guidance scale.*time_cond_proj_dim=32: use `amg.protect`"
    ):
        amg.Sampler(with_unet(sd, time_cond_proj_dim=32), embedding_index)
    amg.protect(sd, embedding_index, amg.AMGConfig.preset("main", on_memorized="flag"))
    images = sd("abc", num_inference_steps=4, output_type="pt").images  # the pipeline makes it itself
    assert bool(images.isfinite().all())


def subclass(name):
    base = diffusers.StableDiffusionPipeline
    value = base.__call__ if name == "harmless" else (property(lambda self: True))
    if name == "__call__":
        value = lambda self, *args, **kwargs: base.__call__(self, *args, **kwargs)  # noqa: E731
    return type("Mine", (base,), {name: value})


@pytest.mark.parametrize("name", ["__call__", "do_classifier_free_guidance", "prepare_latents"])
def test_subclasses_with_a_loop_of_their_own_are_not_sampled(name, sd, embedding_index):
    sd.__class__ = subclass(name)
    with pytest.raises(TypeError, match=rf"got Mine, whose `{name}` is its own .*: use `amg.protect`, or"):
        amg.Sampler(sd, embedding_index)


def test_subclasses_that_leave_the_loop_alone_are(sd, embedding_index):
    asked = {"num_inference_steps": 3, "output_type": "pt", "progress": False}
    config = amg.AMGConfig.preset("main", on_memorized="flag")
    expected = amg.Sampler(sd, embedding_index, config)(
        "abc", generator=torch.Generator().manual_seed(0), **asked
    )
    sd.__class__ = subclass("harmless")
    amg.protect(sd, embedding_index, config)  # a protected one is what it was before
    found = amg.Sampler(sd, embedding_index, config)(
        "abc", generator=torch.Generator().manual_seed(0), **asked
    )
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize(
    "name", ["fbc_leader_block_hook", "mag_cache_leader_block_hook", "faster_cache_block"]
)
def test_a_sampler_refuses_a_network_that_keeps_earlier_steps(name, sd, embedding_index):
    from diffusers.hooks import HookRegistry, ModelHook

    block = sd.unet.down_blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), name)
    with pytest.raises(ValueError, match=f"must not reuse what it computed at an earlier step.*{name}"):
        amg.Sampler(sd, embedding_index)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]"])
def test_a_folder_that_does_not_say_what_it_holds(text, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(text)
    assert main(["sample", str(tmp_path), "--index", "x", "--out", str(tmp_path / "o")]) == 2
    assert "amg sample: `MODEL`: " in capsys.readouterr().err and not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match=r"`MODEL`: .*model_index\.json "):
        open_pipeline(str(tmp_path), "cpu")
