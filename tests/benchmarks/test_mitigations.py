"""Every rival's defining equation against float64 or a hand computation, on a tiny Stable Diffusion."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    from mitigations import attention, clamping, embedding, initial_noise, loop, prompt_noise, transition
    from mitigations.plain import Plain
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

PROMPTS = ["cat", "dog 1", "a red hat"]
CALL = {"steps": 4, "guidance_scale": 7.5}


def tiny():
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "tests/integrations/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tiny_sd()


@pytest.fixture(scope="module")
def pipe():
    return tiny()


@pytest.fixture(scope="module")
def double(pipe):
    """The same pipeline in float64."""
    other = tiny()
    for name in ("unet", "text_encoder", "vae"):
        getattr(other, name).load_state_dict(getattr(pipe, name).state_dict())
        getattr(other, name).double()
    return other


def generators(count=3, seed=7):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def begin(pipe, prompts=PROMPTS, dtype=torch.float32):
    start = loop.start(pipe, prompts, generators(len(prompts)), **CALL)
    return replace(
        start, sample=start.sample.to(dtype), cond=start.cond.to(dtype), uncond=start.uncond.to(dtype)
    )


def region(pipe):
    return clamping.calibrate(pipe, ["cat", "dog", "hat", "cup"], generators(4, 50), **CALL)


def neutral(pipe):
    return {
        "random tokens": prompt_noise.RandomTokens(0),
        "random numbers": prompt_noise.RandomNumbers(0),
        "repeated words": prompt_noise.RepeatedWords(0),
        "gaussian noise": prompt_noise.GaussianNoise(0.0),
        "wen": embedding.PromptOptimisation(iterations=0),
        "wen, reached": embedding.PromptOptimisation(target=1e9),
        "sail": initial_noise.SharpnessAwareNoise(iterations=0),
        "sail, reached": initial_noise.SharpnessAwareNoise(target=1e9),
        "stp": transition.StaticTransition(1000.0),
        "dtp": transition.DynamicTransition(7.5),
        "huang": clamping.UpdateClamping(region(pipe), math.inf, math.inf),
    }


ACTIVE = {
    "random tokens": prompt_noise.RandomTokens(1),
    "random numbers": prompt_noise.RandomNumbers(1),
    "repeated words": prompt_noise.RepeatedWords(1),
    "gaussian noise": prompt_noise.GaussianNoise(0.5),
    "wen": embedding.PromptOptimisation(iterations=2),
    "sail": initial_noise.SharpnessAwareNoise(iterations=2),
    "sail, paper": initial_noise.SharpnessAwareNoise(iterations=2, form="paper"),
    "ren": attention.AttentionReweighting(2.0, "padding"),
    "stp": transition.StaticTransition(500.0),
    "dtp": transition.DynamicTransition(),
    "opposite": transition.StaticTransition(650.0, -2.0),
}


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_neutral_options_give_the_plain_pipelines_pictures(pipe, scheduler):
    kept = pipe.scheduler
    pipe.scheduler = getattr(diffusers, scheduler).from_config(kept.config)
    try:
        want = Plain().draw(pipe, PROMPTS, generators(), **CALL).images
        for name, mitigation in neutral(pipe).items():
            got = mitigation.draw(pipe, PROMPTS, generators(), **CALL).images
            tolerance = 0 if "sail, reached" not in name or scheduler == "DDIMScheduler" else 1e-5
            torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        got = attention.AttentionReweighting(1.0, "none").draw(pipe, PROMPTS, generators(), **CALL).images
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # softmax by hand
    finally:
        pipe.scheduler = kept


@pytest.mark.parametrize("name", [*ACTIVE, "huang"])
def test_an_image_does_not_depend_on_its_batch_mates_nor_the_pipeline_on_the_call(pipe, name):
    mitigation = clamping.UpdateClamping(region(pipe), 0.2, 0.2) if name == "huang" else ACTIVE[name]
    plain = Plain().draw(pipe, PROMPTS, generators(), **CALL).images
    processors = dict(pipe.unet.attn_processors)
    batch = mitigation.draw(pipe, PROMPTS, generators(), **CALL).images
    alone = mitigation.draw(pipe, PROMPTS[1:2], generators()[1:2], **CALL).images
    assert (batch - plain).abs().max() > 1e-3  # it does something
    torch.testing.assert_close(batch[1:2], alone, rtol=0, atol=2e-4)
    assert pipe.unet.attn_processors == processors
    assert torch.equal(Plain().draw(pipe, PROMPTS, generators(), **CALL).images, plain)
    assert not any(parameter.grad is not None for parameter in pipe.unet.parameters())


def test_wen_takes_adamw_steps_down_the_gradient_of_m(double):
    """Two AdamW steps by hand, the gradient of ||eps_cond - eps_uncond|| by central differences."""
    start = begin(double, ["cat"], torch.float64)

    def m(cond):
        embeddings = torch.cat([start.uncond, cond])
        both = torch.cat([start.sample, start.sample])
        with torch.no_grad():
            eps = double.unet(both, start.scheduler.timesteps[0], encoder_hidden_states=embeddings).sample
        return (eps[1] - eps[0]).norm()

    cond, spent = embedding.optimised(start, None, 2, 0.05)
    first, second = torch.zeros_like(start.cond[0]), torch.zeros_like(start.cond[0])
    by_hand = start.cond.clone()
    for k in (1, 2):
        gradient = torch.zeros_like(by_hand[0])
        for place in range(1, by_hand.shape[1]):
            for at in range(by_hand.shape[2]):
                up, down = by_hand.clone(), by_hand.clone()
                up[0, place, at] += 1e-5
                down[0, place, at] -= 1e-5
                gradient[place, at] = (m(up) - m(down)) / 2e-5
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        by_hand[:, 1:] *= 1 - 0.05 * 0.01
        step = 0.05 * (first / (1 - 0.9**k)) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
        by_hand[:, 1:] -= step[None, 1:]
    assert torch.equal(cond[:, 0], start.cond[:, 0])
    torch.testing.assert_close(cond, by_hand, rtol=0, atol=2e-5)
    assert spent.tolist() == [4.0]


def test_wen_stops_each_image_at_its_own_target(pipe):
    start = begin(pipe)
    m = embedding.magnitude(start, start.sample, start.cond).detach()
    order = m.argsort()
    target = ((m[order[0]] + m[order[1]]) / 2).item()
    cond, spent = embedding.optimised(start, target, 3, 1e-6)
    assert torch.equal(cond[order[0]], start.cond[order[0]])
    assert spent[order[0]] == 2 and (spent[order[1:]] == 6).all()
    assert not torch.equal(cond[order[2]], start.cond[order[2]])


@pytest.mark.parametrize("form", ["paper", "released"])
def test_sail_loss_is_the_papers_equation(double, form):
    start = begin(double, ["cat", "dog"], torch.float64)
    t, sample = start.scheduler.timesteps[0], start.sample
    deviation = math.sqrt(1 - float(start.scheduler.alphas_cumprod[t]))

    def difference(x):
        with torch.no_grad():
            cond = double.unet(x, t, encoder_hidden_states=start.cond).sample
            return cond - double.unet(x, t, encoder_hidden_states=start.uncond).sample

    options = initial_noise.SharpnessAwareNoise(delta=0.7, alpha=0.03, form=form)
    got = initial_noise.loss(start, sample, options)
    for row in range(2):
        here = difference(sample)[row]
        if form == "paper":
            score = -difference(sample) / deviation
            moved = -difference(sample + 0.7 * score) / deviation
            want = (moved - score)[row].square().sum() + 0.03 * sample[row].square().sum()
        else:
            there = difference(sample + 0.7 * here[None] / here.square().sum().sqrt())[row]
            want = there.square().sum().sqrt() + 0.03 * sample[row].square().sum().sqrt()
        torch.testing.assert_close(got[row], want, rtol=1e-10, atol=1e-12)


def test_sail_moves_x_T_downhill(double):
    start = begin(double, ["cat", "dog"], torch.float64)
    options = initial_noise.SharpnessAwareNoise(learning_rate=1e-3, iterations=3)
    moved, spent = initial_noise.optimised(start, options)
    before = initial_noise.loss(start, start.sample, options)
    assert (initial_noise.loss(start, moved, options) < before).all()
    assert (moved - start.sample).abs().max() <= 3.01e-3  # Adam: at most its rate a step
    assert spent.tolist() == [12.0, 12.0]


def test_ren_weights_by_hand():
    """One head, one pixel, three tokens: logits (1, 2, 3), the first doubled, the last masked."""
    key = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[None, None, :, None].expand(2, 1, 3, 1)
    query = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    kept = torch.tensor([[True, True, False]])
    weights = attention.attention_weights(query, key, 2.0, kept)
    e = [math.exp(x) for x in (1, 2, 3)]
    torch.testing.assert_close(weights[0, 0, 0], torch.tensor([x / sum(e) for x in e]).double())
    torch.testing.assert_close(weights[1, 0, 0], torch.tensor([0.5, 0.5, 0.0]).double())


def test_ren_masks_what_follows_each_prompts_end(pipe):
    lengths = [len(pipe.tokenizer(prompt).input_ids) for prompt in PROMPTS]
    padding = attention.kept_tokens(pipe.tokenizer, PROMPTS, 12, "padding")
    assert padding.sum(1).tolist() == lengths and padding[:, 0].all()
    assert attention.kept_tokens(pipe.tokenizer, PROMPTS, 12, "summary").sum(1).tolist() == [
        length - 1 for length in lengths
    ]


def test_static_transition_switches_at_its_step(pipe):
    """eps_guided by hand through diffusers' own DDIM step."""
    start = begin(pipe)
    got = transition.StaticTransition(600.0, -2.0).draw(pipe, PROMPTS, generators(), **CALL).images
    scheduler, sample = start.scheduler, start.sample
    assert [float(t) > 600 for t in scheduler.timesteps] == [True, False, False, False]
    with torch.no_grad():
        for t in scheduler.timesteps:
            uncond, cond = pipe.unet(
                torch.cat([sample, sample]), t, encoder_hidden_states=torch.cat([start.uncond, start.cond])
            ).sample.chunk(2)
            scale = -2.0 if t > 600 else 7.5
            sample = scheduler.step(uncond + scale * (cond - uncond), t, sample).prev_sample
        want = loop.decode(pipe, sample)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_dynamic_transition_waits_for_the_first_local_minimum():
    history = torch.tensor([[3.0, 2.0, 1.0, 1.5, 1.0], [3.0, 4.0, 5.0, 6.0, 7.0], [2.0, 1.0, 2.0, 9.0, 9.0]])
    passed = [transition.past_minimum(history.T[: i + 1].unbind(0)).tolist() for i in range(5)]
    assert passed == [
        [False, False, False],
        [False, False, False],
        [False, False, True],
        [True, False, True],
        [True, False, True],
    ]


@pytest.mark.parametrize(
    ("mitigation", "allowed"),
    [
        (prompt_noise.RandomTokens(3), lambda word, prompt: word != ""),
        (prompt_noise.RandomNumbers(3), lambda word, prompt: word.isdigit() and int(word) < 100_000),
        (prompt_noise.RepeatedWords(3), lambda word, prompt: word in prompt.split(" ")),
    ],
)
def test_edited_prompts_reach_the_text_encoder(pipe, monkeypatch, mitigation, allowed):
    asked, encode = [], pipe.encode_prompt
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda texts, *rest: asked.append(texts) or encode(texts, *rest)
    )
    prompts, inserted = ["a red hat", "cat", "dog 1", "a cup"] * 3, []
    mitigation.draw(pipe, prompts, generators(12), **CALL)
    for prompt, edited in zip(prompts, asked[0], strict=True):
        words = edited.split(" ")
        assert len(words) == len(prompt.split(" ")) + 3
        for word in prompt.split(" "):
            words.remove(word)
        assert all(allowed(word, prompt) for word in words)
        inserted += words
    assert len(set(inserted)) > 3 and set(asked[0]).isdisjoint(prompts)
    mitigation.draw(pipe, prompts[:2], generators(2), **CALL)
    assert asked[1] == asked[0][:2]  # the same seed, the same prompt


def test_gaussian_noise_has_its_level():
    embeddings = torch.zeros(4, 50, 64, dtype=torch.float64)
    noise = prompt_noise.noised(embeddings, 0.3, generators(4))
    assert noise.std(unbiased=False).item() == pytest.approx(0.3, rel=0.03)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[2], 0.3 * torch.randn(50, 64, generator=generators(4)[2]).double())


def test_huang_score_and_rescaling_by_hand():
    ones = torch.ones(1, dtype=torch.float64)
    made = clamping.Region(*(ones * value for value in (5.0, 2.0, 10.0, 1.0, 4.0, 1.0)))
    update = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    update[0, 0, 0, 0], update[1, 0, 0] = 11.0, torch.tensor([3.0, 4.0])
    assert clamping.score(update, made, 0).tolist() == [3.0, 0.0]
    sample = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = loop.Step(0, 500.0, 0.36, sample, sample, eps, eps)
    x0_hat = (sample - 0.8 * clamping.eps_of_norm(eps, step, 4.0)) / 0.6
    direction = (sample - 0.8 * eps) / 0.6
    torch.testing.assert_close(x0_hat.flatten(1).norm(dim=1), torch.full((2,), 4.0).double())
    torch.testing.assert_close(x0_hat / 4, direction / direction.flatten(1).norm(dim=1)[:, None, None, None])


def test_huang_clamps_update_then_sample_by_hand():
    ones = torch.ones(1, dtype=torch.float64)
    made = clamping.Region(*(ones * value for value in (5.0, 1.0, 4.0, 0.5, 0.0, 1.0)))
    sample, previous = torch.zeros(1, 1, 1, 2).double(), torch.tensor([[[[6.0, 8.0]]]]).double()
    # ||delta|| 10 -> 5 + 2·1 = 7: (4.2, 5.6); ||x|| 7 -> 4 + 2·0.5 = 5: (3, 4)
    torch.testing.assert_close(
        clamping.clamped(sample, previous, made, 0, 2.0), torch.tensor([[[[3.0, 4.0]]]]).double()
    )


def test_huangs_region_is_that_of_the_plain_trajectories(pipe):
    made = region(pipe)
    start = loop.start(pipe, ["cat", "dog", "hat", "cup"], generators(4, 50), **CALL)
    scheduler, sample = start.scheduler, start.sample
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            uncond, cond = loop.predict(start, index, sample)
            out = scheduler.step(uncond + 7.5 * (cond - uncond), t, sample)
            rows = (out.prev_sample - sample, out.prev_sample, out.pred_original_sample)
            for row, (mean, spread) in zip(rows, zip(made[::2], made[1::2], strict=True), strict=True):
                size = row.flatten(1).norm(dim=1)
                torch.testing.assert_close(mean[index], size.mean(), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(spread[index], size.std(), rtol=1e-3, atol=1e-4)
            sample = out.prev_sample


def test_errors_name_what_does_not_fit(pipe):
    with pytest.raises(ValueError, match="`generators` must be one per prompt, got 1 for 3"):
        loop.start(pipe, PROMPTS, generators(1), **CALL)
    with pytest.raises(ValueError, match="`region` must be calibrated for 3 steps, got 4"):
        clamping.UpdateClamping(region(pipe)).draw(pipe, PROMPTS, generators(), steps=3, guidance_scale=7.5)
    with pytest.raises(ValueError, match="`form`"):
        initial_noise.SharpnessAwareNoise(form="other")
    with pytest.raises(ValueError, match="`mask`"):
        attention.AttentionReweighting(mask="other")
    with pytest.raises(ValueError, match="`insertions` must be >= 0, got -1"):
        prompt_noise.RandomTokens(-1).draw(pipe, PROMPTS, generators(), **CALL)
