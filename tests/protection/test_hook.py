"""The hook records, guidance acts in the scheduler's step: what the scheduler is given, row by row, and loops
whose calls do not pair."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import amg
from amg.pipelines.pictures import to_pil
from amg.protection import hook, protect

from ..integrations.conftest import TinyEmbedder, tiny_ddpm, tiny_sd

diffusers = pytest.importorskip("diffusers")
PROMPTS = ["abc", "cat, red", "z"]
DTYPES = [torch.float32, torch.bfloat16]
ACTING = {"c1": 20.0, "c2": 20.0, "terms_from": 0.0, "check_at": (), "rewind_at": (), "on_memorized": "flag"}
SCHEDULERS = ("DDIM", "PNDM", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions, folder = [f"{i % 3} cat {i}" for i in range(60)], tmp_path_factory.mktemp("index")
    embedder, options = TinyEmbedder().eval().requires_grad_(False), {"near_duplicate": False}
    return amg.Index.build(pictures, captions, embedder, folder / "i.amg", **options, progress=False)


def config_at(bound, **more):
    return amg.AMGConfig.preset("main", **{**ACTING, "lambda_min": bound, "lambda_max": bound, **more})


def scheduled(pipe, name):
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    return pipe


def call(pipe, prompts=PROMPTS, steps=6, **more):
    generator = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    asked = {"num_inference_steps": steps, "output_type": "pt", **more}
    return pipe(list(prompts), generator=generator, **asked)


@pytest.fixture
def given(monkeypatch):
    """At every step: the session, the loop's own model_output, and what the scheduler was given instead."""
    steps, guided = [], hook.Session.guided

    def kept(session, model_output, timestep):
        before = model_output.clone()
        found = guided(session, model_output, timestep)
        assert torch.equal(model_output, before)
        steps.append((session, before, found))
        return found

    monkeypatch.setattr(hook.Session, "guided", kept)
    return steps


def middle_of(out):
    """A bound between the similarities at the first step."""
    first = sorted(verdict.trace[0].similarity for verdict in out.amg)
    assert first[1] - first[0] > 1e-4
    return (first[0] + first[1]) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("more", [{}, {"guidance_rescale": 0.7}], ids=["plain", "rescaled"])
def test_rows_change_exactly_where_a_term_acted(dtype, more, index, given):
    pipe = tiny_sd().to(dtype)
    bound = middle_of(call(amg.protect(pipe, index, config_at(0.99)), **more))
    given.clear()
    out = call(amg.protect(pipe, index, config_at(bound)), **more)
    acted = [[bool(step.terms) for step in verdict.trace] for verdict in out.amg]
    assert {True, False} <= {row[0] for row in acted}
    for position, (_, own, found) in enumerate(given):
        assert found.dtype == own.dtype == dtype and found.stride() == own.stride()
        same = [torch.equal(one, other) for one, other in zip(own, found, strict=True)]
        assert same == [not row[position] for row in acted]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pictures_keep_their_bits_where_no_gate_opens(dtype, scheduler, index, given):
    """Beside one whose gate opens, too."""
    pipe = scheduled(tiny_sd().to(dtype), scheduler)
    plain = call(pipe).images
    closed = call(amg.protect(pipe, index, config_at(0.99)))
    assert torch.equal(closed.images, plain)
    assert len(given) == len(pipe.scheduler.timesteps) and all(torch.equal(own, at) for _, own, at in given)
    highest = [max(step.similarity for step in verdict.trace) for verdict in closed.amg]
    order = sorted(range(3), key=highest.__getitem__)
    bound = (highest[order[1]] + highest[order[2]]) / 2
    beside = call(amg.protect(pipe, index, config_at(bound))).images
    assert [torch.equal(one, other) for one, other in zip(beside, plain, strict=True)] == [
        row != order[2] for row in range(3)
    ]


def test_channels_last_networks_keep_their_bits(index):
    pipe = tiny_sd()
    pipe.unet.to(memory_format=torch.channels_last)
    plain = call(pipe, output_type="latent").images
    found = call(amg.protect(pipe, index, config_at(0.99)), output_type="latent").images
    assert torch.equal(found, plain) and found.stride() == plain.stride()


def test_the_network_s_own_output_reaches_the_loop(index):
    pipe, raw, handed = tiny_sd(), [], []
    pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: raw.append(output.clone()))
    pipe.unet.register_forward_hook(lambda module, inputs, output: handed.append(output[0].clone()))
    call(amg.protect(pipe, index, config_at(-1.0, c2=0.0)))
    assert len(raw) == len(handed) == 6
    assert all(torch.equal(one, other) for one, other in zip(raw, handed, strict=True))


def test_classes_of_a_pixel_pipeline_are_guided_in_the_step(tmp_path, given):
    pipe, pictures = tiny_ddpm(classes=5), torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe.set_progress_bar_config(disable=True)
    pixels = amg.Index.build(pictures, None, None, tmp_path / "p.amg", near_duplicate=False, progress=False)
    for bound in (-0.5, -9.0):
        amg.protect(pipe, pixels, config_at(bound, c2=0.0))
        asked = {"batch_size": 2, "num_inference_steps": 5, "guidance_scale": 2.0}
        pipe(**asked, class_labels=torch.tensor([1, 3]), generator=torch.Generator().manual_seed(0))
    for position, (_, own, found) in enumerate(given):
        same = [torch.equal(one, other) for one, other in zip(own, found, strict=True)]
        assert same == [position < 5] * 2


def test_captions_of_later_tries_reach_the_network_before_its_next_call(index, given):
    pipe, seen = tiny_sd(), []
    sent = {"rewind_at": (0.5,), "rewind_threshold": -1.0, "max_rewinds": 1, "max_evaluations": None}
    amg.protect(pipe, index, config_at(-1.0, c2=0.0, **sent))
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    call(pipe, steps=8)
    flights = given[0][0].flights
    captions = [flight.caption for flight in flights]
    assert all(flight.rewinds == 1 for flight in flights) and None not in captions
    own, told = (pipe.encode_prompt(texts, "cpu", 1, False)[0] for texts in (PROMPTS, captions))
    back = round(0.5 * 7)
    assert all(torch.equal(states[3:], own) for states in seen[: back + 1])
    assert len(seen) > 8 and all(torch.equal(states[3:], told) for states in seen[back + 1 :])


def test_guidance_that_a_callback_turns_off_is_off(index):
    """As diffusers documents it: from some step on the loop asks for one half."""

    def turn_off(pipe, step, t, kwargs):
        if step == 2:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    pipe = tiny_sd()
    more = {"callback_on_step_end": turn_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain = call(pipe, **more).images
    assert torch.equal(call(amg.protect(pipe, index, config_at(0.99)), **more).images, plain)
    opened = call(amg.protect(pipe, index, config_at(-1.0, c2=0.0)), **more)
    assert [verdict.evaluations for verdict in opened.amg] == [2 * 3 + 3] * 3
    assert not torch.equal(opened.images, plain)


class Own(diffusers.StableDiffusionPipeline):
    """A loop of somebody's own, in which `way` is odd."""

    way = ""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pt", guidance_scale=7.5):
        self._guidance_scale, self._guidance_rescale, self._cross_attention_kwargs = guidance_scale, 0.0, None
        self.scheduler.set_timesteps(num_inference_steps)
        states = torch.cat(self.encode_prompt(prompt, "cpu", 1, True)[::-1])
        shape = (len(prompt), 4, 8, 8)
        latents = torch.stack([torch.randn(shape[1:], generator=one) for one in generator])
        times = self.scheduler.timesteps[1 if self.way == "started later" else 0 :]
        for position, t in enumerate(times):
            latents = self.turn(position, t, latents, states)
        if self.way == "once more":
            self.unet(torch.cat([latents] * 2), t, states)
        images = self.vae.decode(latents / self.vae.config.scaling_factor)[0] / 2 + 0.5
        return diffusers.pipelines.stable_diffusion.StableDiffusionPipelineOutput(images.clamp(0, 1), None)

    def turn(self, position, t, latents, states):
        if self.way == "other rows first":
            self.unet(latents[:1], t, states[:1])
        if self.way == "halves apart":
            uncond, cond = (self.unet(latents, t, half)[0] for half in states.chunk(2))
        elif self.way != "cached" or position % 2 == 0:
            self.halves = self.unet(torch.cat([latents] * 2), t, states)[0].chunk(2)
        if self.way != "halves apart":
            uncond, cond = self.halves
        if self.way == "in place":
            output = cond.sub_(uncond).mul_(7.5).add_(uncond)
        else:
            output = (cond - uncond) * 7.5 + uncond
        if self.way == "no scheduler":
            return latents - 0.1 * output
        if self.way == "twice as many":
            output = torch.cat([output, output])
        return self.scheduler.step(output, t, latents)[0]


def own(way):
    pipe = tiny_sd()
    pipe.__class__ = type("Mine", (Own,), {"way": way})
    return pipe


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:2]], ids=["three", "two"])
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("other rows first", "one of 1 rows where an even number of were due, at step 0"),
        ("halves apart", "(one of 3 rows where an even number of were|one for 1 samples where 2 were)"),
        ("cached", "none before step 1"),
        ("once more", "one after step 3 that no step follows"),
        ("no scheduler", "a second call before step 0"),
        ("started later", "timestep 501 for step 0 of 4"),
        ("twice as many", r"one of \[(3|2), 4, 8, 8\] where the scheduler is given \[(6|4), 4, 8, 8\]"),
    ],
)
def test_loops_whose_calls_do_not_pair_are_refused(way, message, prompts, index):
    pipe = amg.protect(own(way), index, config_at(-1.0))
    with pytest.raises(RuntimeError, match=f"`pipe` must call its U-Net once, .* got {message}"):
        call(pipe, prompts, steps=4)
    assert "step" not in vars(pipe.scheduler) and not pipe.unet._diffusers_hook.hooks


def test_loops_that_combine_the_halves_in_place_are_guided_alike(index):
    found = [call(amg.protect(own(way), index, config_at(-1.0)), steps=4).images for way in ("", "in place")]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert not torch.allclose(call(own("")).images, found[0], atol=1e-3)


class Untold(Own):
    """A loop of before diffusers kept the scale in the pipeline: it is an argument alone, like the flag."""

    guides = True

    @torch.no_grad()
    def __call__(self, prompt, steps=4, generator=None, guidance_scale=7.5, **others):
        self.scheduler.set_timesteps(steps)
        halves = self.encode_prompt(prompt, "cpu", 1, True)[::-1]
        latents = torch.stack([torch.randn(4, 8, 8, generator=one) for one in generator])
        for position, t in enumerate(self.scheduler.timesteps):
            if self.guides:
                latents = self.turn(position, t, latents, torch.cat(halves))
            else:
                latents = self.scheduler.step(self.unet(latents, t, halves[1])[0], t, latents)[0]
        images = self.vae.decode(latents / self.vae.config.scaling_factor)[0] / 2 + 0.5
        return self.handed(images.clamp(0, 1))

    def handed(self, images):
        return (images,)


class Scaleless(Untold):
    def __call__(self, prompt, steps=4, generator=None):
        return super().__call__(prompt, steps, generator)


def generators(count=2):
    return [torch.Generator().manual_seed(row) for row in range(count)]


def protected(kind, index, **attributes):
    pipe = tiny_sd()
    pipe.__class__ = type("Mine", (kind,), attributes)
    return amg.protect(pipe, index, config_at(-1.0))


def test_loops_that_do_not_keep_their_scale_are_guided_by_their_argument(index):
    told = call(amg.protect(own(""), index, config_at(-1.0)), PROMPTS[:2], steps=4)
    pipe = protected(Untold, index)
    (images,) = pipe(PROMPTS[:2], generator=generators())
    torch.testing.assert_close(images, told.images, rtol=0, atol=1e-5)
    assert [verdict.evaluations for verdict in pipe.amg_verdicts] == [v.evaluations for v in told.amg]


def test_loops_without_guidance_of_their_own_have_one_half(index):
    pipe = protected(Untold, index, guides=False)
    pipe(PROMPTS[:2], generator=generators())
    assert len(pipe.amg_verdicts) == 2


def test_a_scale_that_nobody_tells_is_asked_for(index):
    with pytest.raises(RuntimeError, match=r"`pipe` must tell the scale of its guidance, .* got Mine, whose"):
        protected(Scaleless, index)(PROMPTS[:2], generator=generators())


@pytest.mark.parametrize(
    "handed",
    [
        lambda self, images: (picture for picture in images),
        lambda self, images: {"images": images},
        lambda self, images: SimpleNamespace(images=to_pil(images)[0]),
        lambda self, images: SimpleNamespace(images=images, previews={"last": to_pil(images)}),
        lambda self, images: SimpleNamespace(images=images, film=images[:, :, None]),
        lambda self, images: SimpleNamespace(images=images, raw=np.zeros((2, 16, 16, 4), np.uint8)),
        lambda self, images: (),
    ],
    ids=["generator", "dict", "one picture", "in a dict", "video", "with alpha", "nothing"],
)
def test_results_whose_pictures_cannot_all_be_checked_are_refused(index, handed):
    with pytest.raises(TypeError, match=r"`pipe` must give .*nothing of it is handed out"):
        protected(Untold, index, handed=handed)(PROMPTS[:2], generator=generators())


def test_an_interval_is_refused_at_once(index):
    pipe = tiny_sd()
    with pytest.raises(ValueError, match=r"`guidance_interval` must be \(0, 1\) .*got \(0.2, 1.0\)"):
        amg.protect(pipe, index, config_at(0.5, guidance_interval=(0.2, 1.0)))
    assert type(pipe) is diffusers.StableDiffusionPipeline and not hasattr(pipe, "_amg_protection")


def test_moves_are_those_of_the_network_s_inputs(index, monkeypatch):
    """The fourth free signal, in float64, through a scheduler that scales them."""
    pipe, inputs = scheduled(tiny_sd(), "EulerDiscrete"), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, given: inputs.append(given[0][:3].double()))
    monkeypatch.setattr(protect, "gate_of", lambda config: amg.guidance.gate.Gate())
    out = call(amg.protect(pipe, index, config_at(0.99)))
    for position in range(5):
        moved = (inputs[position + 1] - inputs[position]).flatten(1).square().sum(1)
        found = torch.tensor([verdict.trace[position].signals[3] for verdict in out.amg])
        torch.testing.assert_close(found.double(), moved, rtol=1e-5, atol=0)
    assert all(len(verdict.trace[5].signals) == 3 for verdict in out.amg)
