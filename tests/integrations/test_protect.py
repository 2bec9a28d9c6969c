import inspect

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import amg
import amg.engine.loop
from amg.pipelines.pictures import to_tensor

diffusers = pytest.importorskip("diffusers")
from diffusers.callbacks import PipelineCallback  # noqa: E402

SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
MORE_SCHEDULERS = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "TCDScheduler",
)
UNKNOWN = {"EDMEulerScheduler": "scales the network's input", "IPNDMScheduler": "neither `sigmas` nor"}
OPEN = {"lambda_min": -1.0, "lambda_max": -1.0, "c1": 20.0, "c2": 20.0}


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def call(pipe, prompts=("abc", "cat, red"), steps=6, **more):
    arguments = {
        "generator": generators(len(prompts)),
        "num_inference_steps": steps,
        "output_type": "pt",
        **more,
    }
    return pipe(list(prompts), **arguments)


def shut(**more):
    """A config whose gates never open."""
    return amg.AMGConfig.preset(
        "main", lambda_min=1.0, lambda_max=1.0, rewind_at=(), on_memorized="flag", **more
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["off", "closed"])
def test_off_and_closed_gates_equal_plain_diffusers_bit_for_bit(sd, embedding_index, scheduler, kind):
    sd.scheduler = getattr(diffusers, scheduler).from_config(sd.scheduler.config)
    plain = call(sd).images
    protected = amg.protect(sd, embedding_index, amg.AMGConfig.preset("off") if kind == "off" else shut())
    out = call(protected)
    assert torch.equal(out.images, plain)
    assert len(out.amg) == 2 and all(
        len(verdict.trace) == (0 if kind == "off" else len(sd.scheduler.timesteps)) for verdict in out.amg
    )
    assert torch.equal(call(amg.unprotect(protected)).images, plain)


@pytest.mark.parametrize(
    "more",
    [
        {"negative_prompt": ["bad", "worse"]},
        {"guidance_rescale": 0.7},
        {"num_images_per_prompt": 2, "generator": generators(4)},
        {"eta": 0.8},
        {"guidance_scale": 1.0},
        {"generator": torch.Generator().manual_seed(7)},
    ],
    ids=["negative", "rescale", "per-prompt", "eta", "unguided", "one-generator"],
)
@pytest.mark.filterwarnings("ignore:`guidance_scale`")
def test_call_arguments_keep_working(sd, embedding_index, more):
    def fresh():
        generator = more.get("generator")
        if isinstance(generator, torch.Generator):
            return {**more, "generator": torch.Generator().manual_seed(7)}
        return {**more, "generator": generators(4)} if generator else more

    plain = call(sd, **fresh()).images
    assert torch.equal(call(amg.protect(sd, embedding_index, shut()), **fresh()).images, plain)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_output_types(sd, embedding_index, output_type, return_dict):
    plain = call(sd, output_type=output_type, return_dict=False)[0]
    out = call(amg.protect(sd, embedding_index, shut()), output_type=output_type, return_dict=return_dict)
    images = out.images if return_dict else out[0]
    assert type(images) is type(plain) and len(sd.amg_verdicts) == 2
    if output_type == "latent":
        assert torch.equal(images, plain)
    else:
        assert torch.equal(to_tensor(images), to_tensor(plain))


def test_callback_progress_and_signature_survive(sd, embedding_index, capsys):
    before = inspect.signature(type(sd).__call__)
    protected = amg.protect(sd, embedding_index, shut())
    assert inspect.signature(type(protected).__call__) == before and isinstance(
        protected, diffusers.StableDiffusionPipeline
    )
    seen = []
    protected.set_progress_bar_config(disable=False)
    call(
        protected, callback_on_step_end=lambda pipe, step, t, kwargs: seen.append((step, float(t))) or kwargs
    )
    assert [step for step, _ in seen] == list(range(6)) and "6/6" in capsys.readouterr().err


class Kept(PipelineCallback):
    """diffusers' own kind of callback: keeps the latents it is shown, and puts others in."""

    def __init__(self):
        super().__init__(cutoff_step_ratio=None, cutoff_step_index=0)
        self.seen = []

    @property
    def tensor_inputs(self):
        return ["latents", "prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        latents = callback_kwargs.pop("latents")
        self.seen.append(float(latents.abs().max()))
        return {"latents": latents + 1} if step_index >= 3 else callback_kwargs


@pytest.mark.parametrize("kind", ["function", "class"])
@pytest.mark.parametrize("family", ["ours", "watched"])
def test_callbacks_are_shown_nothing_from_the_first_checkpoint_on(sd, embedding_index, kind, family):
    """Nor is what they put in taken then: the pictures are the plain ones."""
    pipe, arguments = sd, {"prompt": ["abc", "cat, red"], "num_inference_steps": 6}
    if family == "watched":
        from .. import pipelines_tiny

        pipe, arguments = pipelines_tiny.build("sd3", steps=6)
    seeded = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)]  # noqa: E731
    plain = pipe(**arguments, generator=seeded(), output_type="pt").images
    protected, callback, seen = amg.protect(pipe, embedding_index, shut(blank_callbacks=True)), Kept(), []

    def function(pipe, step, t, given):
        seen.append(float(given["latents"].abs().max()))
        return {"latents": given["latents"] + 1} if step >= 3 else {}

    given = callback if kind == "class" else function
    out = protected(**arguments, generator=seeded(), output_type="pt", callback_on_step_end=given)
    assert torch.equal(out.images, plain)
    seen = callback.seen if kind == "class" else seen
    assert [value == 0 for value in seen] == [False, False, True, True, True, True]


def test_save_pretrained_is_that_of_the_plain_pipeline(sd, embedding_index, tmp_path):
    sd.save_pretrained(tmp_path / "plain")
    amg.protect(sd, embedding_index, shut()).save_pretrained(tmp_path / "protected")
    assert (tmp_path / "plain/model_index.json").read_text() == (
        tmp_path / "protected/model_index.json"
    ).read_text()
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "protected")
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(call(again).images, call(amg.unprotect(sd)).images, atol=1e-5)


def test_nothing_is_left_behind_after_a_call_even_a_failed_one(sd, embedding_index):
    protected = amg.protect(sd, embedding_index, shut())
    call(protected)
    with pytest.raises(RuntimeError, match="stop"):
        call(protected, callback_on_step_end=_stop)
    assert "step" not in vars(sd.scheduler) and not sd.unet._diffusers_hook.hooks
    amg.unprotect(sd)
    assert type(sd) is diffusers.StableDiffusionPipeline and not hasattr(sd, "_amg_protection")


def _stop(pipe, step, t, kwargs):
    raise RuntimeError("stop")


@pytest.mark.parametrize("scheduler", SCHEDULERS + MORE_SCHEDULERS)
def test_open_gates_and_rewinds_act_per_sample(sd, embedding_index, scheduler):
    """A batch of three equals three batches of one, with every gate open and every sample rewound."""
    sd.scheduler = getattr(diffusers, scheduler).from_config(sd.scheduler.config)
    config = amg.AMGConfig.preset(
        "main",
        **OPEN,
        rewind_at=(0.6,),
        rewind_threshold=-1.0,
        max_rewinds=1,
        rewind_guidance=1.0,
        on_memorized="flag",
    )
    prompts = ("abc", "cat, red", "z")
    plain = call(sd, prompts, steps=10).images
    protected = amg.protect(sd, embedding_index, config)
    together = call(protected, prompts, steps=10)
    assert all(verdict.rewinds == 1 for verdict in together.amg)
    assert (together.images - plain).abs().amax() > 1e-3
    for i, prompt in enumerate(prompts):
        alone = call(protected, (prompt,), steps=10, generator=generators(1, i))
        assert torch.allclose(alone.images[0], together.images[i], atol=2e-4)
        assert [s.terms for s in alone.amg[0].trace] == [s.terms for s in together.amg[i].trace]


@pytest.mark.parametrize("scheduler", SCHEDULERS + MORE_SCHEDULERS)
@pytest.mark.parametrize("checkpoint", [0.6, 0.53])  # in the middle of a step of two calls, and at its start
def test_protect_equals_sampler(sd, embedding_index, scheduler, checkpoint):
    more = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}  # a sampler takes three states
    sd.scheduler = getattr(diffusers, scheduler).from_config(sd.scheduler.config, **more)
    # a sampler's rewound samples draw noise of their own to the end, a loop's from the loop's generators
    draws = "DDPM" in scheduler or "Ancestral" in scheduler
    config = amg.AMGConfig.preset(
        "main",
        **OPEN,
        rewind_at=() if draws else (checkpoint,),
        rewind_to=0.3,
        rewind_threshold=-1.0,
        max_rewinds=1,
        on_memorized="flag",
    )
    ours = amg.Sampler(sd, embedding_index, config)(
        ["abc", "cat, red"], generator=generators(2), num_inference_steps=10, output_type="pt", progress=False
    )
    hooked = call(amg.protect(sd, embedding_index, config), steps=10)
    assert torch.allclose(ours.images, hooked.images, atol=0.5 / 255 + 1e-4)
    assert [v.rewinds for v in ours.amg] == [v.rewinds for v in hooked.amg] == [0 if draws else 1] * 2


def under_one_noise(function):
    def run(*arguments):
        with OneNoise():
            return function(*arguments)

    return run


class OneNoise(TorchFunctionMode):
    """Whatever is drawn, by whomever, is the same noise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.randn:
            kwargs["generator"] = torch.Generator().manual_seed(11)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("KDPM2AncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        ("LCMScheduler", {}),
    ],
)
def test_protect_equals_sampler_but_for_the_streams_of_noise(
    sd, embedding_index, scheduler, options, monkeypatch
):
    """A rewound sample's noise comes from a generator of its own in a sampler, and from the loop's in a
    pipeline; where both draw the same, the pictures are the same."""
    sd.scheduler = getattr(diffusers, scheduler).from_config(sd.scheduler.config, **options)
    more = {"rewind_at": (0.6,), "rewind_to": 0.3, "rewind_threshold": -1.0, "max_rewinds": 1}
    config = amg.AMGConfig.preset("main", **OPEN, **more, on_memorized="flag")
    arguments = {"num_inference_steps": 10, "output_type": "pt"}
    for name in ("step", "send_back"):  # on the engine's thread, which has no modes of the caller's
        monkeypatch.setattr(amg.engine.loop, name, under_one_noise(getattr(amg.engine.loop, name)))
    with OneNoise():
        sampler = amg.Sampler(sd, embedding_index, config)
        ours = sampler(["abc", "cat, red"], generator=generators(2), progress=False, **arguments)
        hooked = call(amg.protect(sd, embedding_index, config), steps=10)
    assert torch.allclose(ours.images, hooked.images, atol=0.5 / 255 + 1e-4)
    assert [verdict.rewinds for verdict in (*ours.amg, *hooked.amg)] == [1] * 4
    plain = call(amg.unprotect(sd), steps=10)
    assert (hooked.images - plain.images).abs().amax() > 1e-3


@pytest.mark.parametrize("scheduler", list(UNKNOWN))
@pytest.mark.parametrize("preset", ["main", "off"])
def test_schedulers_whose_noise_is_not_known_are_refused(sd, embedding_index, scheduler, preset):
    """By name, before the network was asked anything: by a call, `submit`, `protect` and `AMGScheduler`."""
    sd.scheduler, asked = getattr(diffusers, scheduler)(), []
    sd.unet.conv_in.register_forward_pre_hook(lambda *_: asked.append(1))
    config = amg.AMGConfig.preset(preset)
    refused = pytest.raises(
        ValueError, match=f"`scheduler` must be .*, got {scheduler}: it .*{UNKNOWN[scheduler]}"
    )
    with refused, amg.Sampler(sd, embedding_index, config) as sampler:
        sampler("abc", num_inference_steps=4)
    with refused, amg.Sampler(sd, embedding_index, config) as sampler:
        sampler.submit(amg.Request("abc", num_inference_steps=4))
    wrapped = amg.AMGScheduler(sd.scheduler, embedding_index, config, decode=lambda x0: x0[:, :3])
    wrapped.set_timesteps(4)
    with refused:
        wrapped.step(torch.zeros(1, 4, 8, 8), wrapped.timesteps[0], torch.zeros(1, 4, 8, 8))
    with refused:
        call(amg.protect(sd, embedding_index, config), steps=4)
    assert not asked


def test_a_wrapped_scheduler_of_two_calls_measures_at_its_own_levels(sd, embedding_index):
    """KDPM2's second calls are between its sigmas: x0_hat of an exact network is x0 there, too."""
    seen, x0 = [], torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    eps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    config = amg.AMGConfig.preset(
        "main", c2=0.0, rewind_at=(), check_at=(), on_memorized="flag", lambda_max=1.0, lambda_min=1.0
    )
    scheduler = diffusers.KDPM2DiscreteScheduler.from_config(sd.scheduler.config)
    wrapped = amg.AMGScheduler(
        scheduler,
        embedding_index,
        config,
        decode=lambda found: seen.append(found) or found[:, :3].clamp(0, 1),
    )
    wrapped.set_timesteps(6)
    sample = x0 + eps * scheduler.sigmas[0]
    for t in wrapped.timesteps:
        wrapped.scale_model_input(sample, t)
        sample = wrapped.step((eps, eps), t, sample).prev_sample
    assert len(seen) == 11
    for found in seen:
        assert torch.allclose(found, x0, atol=1e-4)


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_pixel_pipelines(ddpm, pixel_index, kind):
    pipe = getattr(diffusers, kind)(ddpm.unet, ddpm.scheduler)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 3, "num_inference_steps": 8, "output_type": "np"}
    plain = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    amg.protect(pipe, pixel_index, amg.AMGConfig.preset("off"))
    assert np.array_equal(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images, plain)
    config = amg.AMGConfig.preset("main", lambda_min=-5.0, lambda_max=-5.0, rewind_at=(), on_memorized="flag")
    amg.protect(pipe, pixel_index, config)
    guided = pipe(**arguments, generator=torch.Generator().manual_seed(0))
    assert not np.array_equal(guided.images, plain) and guided.amg[0].metric == "nl2"
    assert any("dissimilarity" in step.terms for step in guided.amg[0].trace)


def test_class_conditional_pixels_use_the_null_class(class_ddpm, pixel_index):
    pipe = amg.protect(class_ddpm, pixel_index, amg.AMGConfig.preset("off"))
    arguments = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    labels = torch.tensor([1, 3])
    out = pipe(
        **arguments, generator=torch.Generator().manual_seed(0), class_labels=labels, guidance_scale=2.0
    )
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 3, 8, 8, generator=generator)
    scheduler = diffusers.DDPMScheduler.from_config(class_ddpm.scheduler.config)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            uncond, cond = class_ddpm.unet(
                torch.cat([image] * 2), t, torch.tensor([4, 4, 1, 3])
            ).sample.chunk(2)
            image = scheduler.step(uncond + 2.0 * (cond - uncond), t, image, generator=generator).prev_sample
    expected = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.allclose(out.images, expected, atol=1e-6)
    with pytest.raises(ValueError, match="class_labels"):
        pipe(**arguments, class_labels=torch.tensor([1, 9]))


def test_bad_input(sd, embedding_index, pixel_index, embedder):
    with pytest.raises(TypeError, match="`pipe` must be a diffusers pipeline, got object"):
        amg.protect(object(), embedding_index)
    with pytest.raises(ValueError, match=r"amg\.protect"):
        amg.unprotect(sd)
    protected = amg.protect(sd, embedding_index, shut())
    with pytest.raises(ValueError, match="num_inference_steps"):
        call(protected, steps=0)
    with pytest.warns(UserWarning, match="guidance_scale"):
        call(protected, guidance_scale=1.0)
    sd.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        call(protected)


@pytest.mark.parametrize("policy", ["flag", "block", "raise", "resample"])
def test_the_promise_on_a_pipeline(sd, embedding_index, policy):
    config = amg.AMGConfig.preset("main", threshold=-1.0, on_memorized=policy, max_retries=1, rewind_at=())
    protected = amg.protect(sd, embedding_index, config)
    if policy == "raise":
        with pytest.raises(amg.MemorizedError, match="memorised"):
            call(protected, steps=3)
        return
    out = call(protected, steps=3, output_type="pil")
    assert all(verdict.memorized for verdict in out.amg)
    assert [verdict.blocked for verdict in out.amg] == [policy != "flag"] * 2
    assert [verdict.retries for verdict in out.amg] == [1 if policy == "resample" else 0] * 2
    assert all((np.asarray(image).max() == 0) == (policy != "flag") for image in out.images)


def test_the_scheduler_wrapper_guides_like_the_sampler(sd, embedding_index):
    config = amg.AMGConfig.preset(
        "main", **{**OPEN, "c2": 0.0}, rewind_at=(), on_memorized="flag", guidance_scale=5.0
    )
    expected = amg.Sampler(sd, embedding_index, config)(
        "abc", generator=generators(1), num_inference_steps=6, output_type="pt", progress=False
    )
    decode = lambda x0: sd.vae.decode(x0 / sd.vae.config.scaling_factor).sample / 2 + 0.5  # noqa: E731
    scheduler = amg.AMGScheduler(
        diffusers.DDIMScheduler.from_config(sd.scheduler.config), embedding_index, config, decode=decode
    )
    scheduler.set_timesteps(6)
    with torch.no_grad():
        cond, uncond = sd.encode_prompt("abc", "cpu", 1, True)
        sample = torch.randn(1, 4, 8, 8, generator=generators(1)[0])
        for t in scheduler.timesteps:
            eps_uncond, eps_cond = sd.unet(
                torch.cat([sample] * 2), t, torch.cat([uncond, cond])
            ).sample.chunk(2)
            sample = scheduler.step((eps_uncond, eps_cond), t, sample).prev_sample
        images = decode(sample).clamp(0, 1)
    assert torch.allclose(images, expected.images, atol=0.5 / 255 + 1e-4)
    assert scheduler.verdicts(images)[0].similarity == pytest.approx(expected.amg[0].similarity, abs=2e-3)


def test_the_scheduler_wrapper_refuses_no_steps_and_warns_of_a_scale_of_one(pixel_index):
    config = amg.AMGConfig.preset("main", guidance_scale=1.0, c1=1.0)
    scheduler = amg.AMGScheduler(diffusers.DDIMScheduler(), pixel_index, config)
    with pytest.raises(ValueError, match="`num_inference_steps` must be >= 1, got 0"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 3, *pixel_index.image_size)
    with pytest.warns(UserWarning, match=r"`guidance_scale` is 1.0: despecification"):
        scheduler.step((sample, sample), scheduler.timesteps[0], sample)


def test_two_threads_with_one_index(embedding_index):
    import importlib.util
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    pipes = [
        amg.protect(
            tiny.tiny_sd(), embedding_index, amg.AMGConfig.preset("main", **OPEN, on_memorized="flag")
        )
        for _ in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(call, pipes)
    assert torch.equal(first.images, second.images)
