"""Hook and wrapped step are there during one call, for its thread, and never afterwards."""

import pytest
import torch

import amg
from amg.protection.install import HOOKS, NAME, CallHook

from ..integrations.conftest import TinyEmbedder, tiny_sd

REGISTRY = HOOKS.HookRegistry
STEPS = 2


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    pictures = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    embedder = TinyEmbedder().eval().requires_grad_(False)
    return amg.Index.build(
        pictures, None, embedder, tmp_path_factory.mktemp("index") / "i.amg", progress=False
    )


@pytest.fixture(params=["StableDiffusionPipeline", "somebody's"])
def pipe(request, index, monkeypatch):
    """Guided by halves as ours are, and watched as others' are."""
    if request.param != "StableDiffusionPipeline":
        monkeypatch.setattr("amg.protection.protect.is_ours", lambda pipe: False)
        monkeypatch.setattr("amg.pipelines.supported.is_ours", lambda pipe: False)
    return amg.protect(tiny_sd(), index, amg.AMGConfig.preset("main", on_memorized="flag"))


def call(pipe, **more):
    generator = torch.Generator().manual_seed(1)
    asked = {"num_inference_steps": STEPS, "output_type": "pt", "generator": generator, **more}
    return pipe(["abc"], **asked).images


def left(pipe):
    hooks = getattr(getattr(pipe.unet, "_diffusers_hook", None), "hooks", {})
    return [*hooks, *(["step"] if "step" in vars(pipe.scheduler) else [])]


@pytest.mark.parametrize("where", ["register_hook", "remove_hook"])
def test_an_interrupt_at_the_hook_leaves_nothing(pipe, monkeypatch, where):
    """Attack 18."""
    whole, act = call(pipe), getattr(REGISTRY, where)

    def interrupted(*args, **kwargs):
        act(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(REGISTRY, where, interrupted)
        call(pipe)
    assert left(pipe) == []
    assert torch.equal(call(pipe), whole)


def test_what_was_left_all_the_same_is_taken_away(pipe):
    whole, stale = call(pipe), CallHook()
    stale.live = False
    for act in (call, amg.unprotect):
        REGISTRY.check_if_exists_or_initialize(pipe.unet).register_hook(stale, NAME)
        found = act(pipe)
        assert left(pipe) == []
        assert act is amg.unprotect or torch.equal(found, whole)


def test_a_call_within_a_call_is_refused_and_the_outer_one_goes_on(pipe):
    whole = call(pipe)

    def again(pipe, step, t, kwargs):
        with pytest.raises(RuntimeError, match="`pipe` must not be called from within a call of itself"):
            call(pipe)
        return kwargs

    assert torch.equal(call(pipe, callback_on_step_end=again), whole)
    assert left(pipe) == []


def test_a_sampler_of_the_same_network_goes_on_beside_it(pipe, index):
    """It samples on a thread of its own, in the middle of the pipeline's call."""
    whole, beside = call(pipe), []
    asked = {"num_inference_steps": STEPS, "output_type": "pt", "progress": False}
    plain = amg.Sampler(tiny_sd(), index)

    def sampled(sampler):
        return sampler(["cat"], generator=torch.Generator().manual_seed(2), **asked).images

    with amg.Sampler(pipe, index) as sampler:

        def sample(pipe, step, t, kwargs):
            beside.append(sampled(sampler))
            return kwargs

        assert torch.equal(call(pipe, callback_on_step_end=sample), whole)
    assert len(beside) == STEPS and all(torch.equal(images, sampled(plain)) for images in beside)


def test_a_step_of_somebody_s_own_is_called_and_put_back(pipe):
    whole, made, original = call(pipe), [], pipe.scheduler.step

    def counting(*args, **kwargs):
        made.append(1)
        return original(*args, **kwargs)

    pipe.scheduler.step = counting
    assert torch.equal(call(pipe), whole)
    assert pipe.scheduler.step is counting and len(made) >= STEPS
