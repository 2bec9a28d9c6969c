"""Prompt memory: off it changes nothing; on, a prompt whose samples were sent back starts as a later try."""

import pytest
import torch

import amg
from amg.engine.memory import PromptMemory
from amg.guidance.flight import Flight

pytest.importorskip("diffusers")
REWINDING = {
    "lambda_min": 1.0,
    "lambda_max": 1.0,
    "check_at": (),
    "rewind_at": (0.5,),
    "rewind_threshold": -0.99,
    "max_rewinds": 1,
    "guard_threshold": None,
    "on_memorized": "flag",
    "max_evaluations": None,
}
CALL = {"num_inference_steps": 8, "output_type": "pt", "progress": False}


def sampler(sd, index, **options):
    return amg.Sampler(sd, index, amg.AMGConfig.preset("main", **{**REWINDING, **options}))


def draw(one, prompt="a 7", seed=1, **more):
    return one(prompt, generator=torch.Generator().manual_seed(seed), **{**CALL, **more})


def test_a_remembered_prompt_starts_with_the_caption_and_costs_less(sd, embedding_index):
    with sampler(sd, embedding_index, prompt_memory=2) as one:
        first, second = draw(one).amg[0], draw(one, seed=2).amg[0]
        other = draw(one, prompt="b 9").amg[0]
        elsewhere = draw(one, guidance_scale=3.0).amg[0]  # another way to be run
    assert first.rewinds == 1 and not first.remembered and first.caption == "caption 7"
    assert second.remembered and second.rewinds == 0 and second.caption == "caption 7"
    assert second.evaluations == 16 < first.evaluations
    assert not other.remembered and other.rewinds == 1 and not elsewhere.remembered


def test_off_a_request_does_not_depend_on_earlier_ones(sd, embedding_index):
    with sampler(sd, embedding_index) as one, sampler(sd, embedding_index, prompt_memory=1) as other:
        draws = [draw(one).images, draw(one).images, draw(other).images]
        assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
        assert len(one.source.memory) == 0 and len(other.source.memory) == 1


def test_it_is_bounded_and_forgets_the_least_recent():
    memory = PromptMemory(2)
    flights = [Flight(torch.zeros(1), prompt=text, caption=f"not {text}") for text in "abc"]
    for flight in flights[:2]:
        memory.remember(flight, None)
    memory.recall([Flight(torch.zeros(1), prompt="a")], None, 3)  # now the most recent
    memory.remember(flights[2], None)
    asked = [Flight(torch.zeros(1), prompt=text) for text in "abc"]
    memory.recall(asked, None, 3)
    assert [flight.caption for flight in asked] == ["not a", None, "not c"] and len(memory) == 2
    assert (asked[0].remembered, asked[0].despecified_until, asked[1].despecified_until) == (True, 3, 0)


def test_others_loops_refuse_it(sd, embedding_index):
    import diffusers

    config = amg.AMGConfig.preset("main", prompt_memory=3)
    with pytest.raises(ValueError, match="`prompt_memory` must be 0 for `protect`, got 3"):
        amg.protect(sd, embedding_index, config)
    with pytest.raises(ValueError, match="`prompt_memory` must be 0"):
        amg.AMGScheduler(diffusers.DDIMScheduler(), embedding_index, config, decode=lambda x: x[:, :3])
