"""`guidance_interval`: outside it the unconditional half is neither computed nor counted."""

import pytest
import torch

import amg

from ..integrations.conftest import embedder, embedding_index, sd  # noqa: F401

STEPS = 11
LEVEL = 1 / 255 + 1e-6


class Rows:
    """The rows of every call of the U-Net."""

    def __init__(self, pipe):
        self.calls = []
        pipe.unet.register_forward_hook(lambda module, inputs, output: self.calls.append(len(output[0])))


def sample(pipe, index, config, images=2, **more):
    options = {"num_inference_steps": STEPS, "output_type": "pt", "progress": False, **more}
    with amg.Sampler(pipe, index, config) as sampler:
        generator = torch.Generator().manual_seed(4)
        return sampler(["abc"] * images, generator=generator, **options)


def by_hand(pipe, inside, images=2):
    """The pipeline's own loop, with both halves only in the steps `inside`."""
    cond, uncond = pipe.encode_prompt(["abc"] * images, "cpu", 1, True)
    pipe.scheduler.set_timesteps(STEPS)
    noise = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    x = noise * pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        for position, t in enumerate(pipe.scheduler.timesteps):
            scaled = pipe.scheduler.scale_model_input(x, t)
            output = pipe.unet(scaled, t, encoder_hidden_states=cond).sample
            if position in inside:
                plain = pipe.unet(scaled, t, encoder_hidden_states=uncond).sample
                output = plain + 7.5 * (output - plain)
            x = pipe.scheduler.step(output, t, x).prev_sample
        images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.7), (0.2, 0.6), (0.35, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("scheduler", ["DDIM", "DPMSolverMultistep"])
def test_pictures_and_cost_are_those_of_a_loop_by_hand(sd, embedding_index, interval, scheduler):  # noqa: F811
    import diffusers

    sd.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(sd.scheduler.config)
    inside = [at for at in range(STEPS) if interval[0] * 10 <= at <= interval[1] * 10]
    rows = Rows(sd)
    out = sample(sd, embedding_index, amg.AMGConfig.preset("off", guidance_interval=interval))
    assert rows.calls == [4 if at in inside else 2 for at in range(STEPS)]
    assert [verdict.evaluations for verdict in out.amg] == [STEPS + len(inside)] * 2
    assert (out.images - by_hand(sd, inside)).abs().max() <= LEVEL


def test_a_sample_that_goes_back_has_both_halves_from_then_on(sd, embedding_index):  # noqa: F811
    """Guidance in steps 0 to 3; all go back after step 5 to step 2, and keep their halves to the end."""
    config = amg.AMGConfig.preset(
        "main", guidance_interval=(0.0, 0.3), check_at=(0.5,), rewind_at=(0.5,), rewind_threshold=-1.0,
        rewind_to=0.2, max_rewinds=1, lambda_min=0.99, lambda_max=0.99, on_memorized="flag",
    )  # fmt: skip
    rows = Rows(sd)
    out = sample(sd, embedding_index, config)
    assert rows.calls == [4] * 4 + [2] * 2 + [4] * 9
    assert [verdict.evaluations for verdict in out.amg] == [sum(rows.calls) // 2] * 2
    assert [verdict.rewinds for verdict in out.amg] == [1, 1]


def test_a_suspected_sample_has_both_halves_as_long_as_its_gate_is_open(sd, embedding_index):  # noqa: F811
    """The check at step 5 finds all gates open: from step 6 on both halves are there, and despecification
    acts."""
    config = amg.AMGConfig.preset(
        "main", guidance_interval=(0.0, 0.3), check_at=(0.5,), rewind_at=(), terms_from=0.0,
        lambda_min=-1.0, lambda_max=-1.0, c2=0.0, on_memorized="flag",
    )  # fmt: skip
    rows = Rows(sd)
    out = sample(sd, embedding_index, config)
    assert rows.calls == [4] * 4 + [2] * 2 + [4] * 5
    assert [verdict.evaluations for verdict in out.amg] == [sum(rows.calls) // 2] * 2
    for verdict in out.amg:
        assert [at.step for at in verdict.trace if "despecification" in at.terms] == [*range(6, STEPS)]
        assert verdict.trace[5].terms == ("dissimilarity",), "no unconditional half to despecify by"


def test_evaluations_of_a_mixed_batch_are_the_network_s_rows(sd, embedding_index):  # noqa: F811
    """Requests that go back, are run again and are left alone, in one set: every row of the U-Net is
    counted on the image it was computed for."""
    config = amg.AMGConfig.preset(
        "main", guidance_interval=(0.1, 0.6), rewind_threshold=0.7, threshold=0.75, on_memorized="resample",
        max_evaluations=None, max_retries=1, rewind_to=0.1,
    )  # fmt: skip
    rows, total = Rows(sd), 0
    with amg.Sampler(sd, embedding_index, config) as sampler:
        futures = [
            sampler.submit(amg.Request(prompt, num_inference_steps=steps, seed=steps, output_type="latent"))
            for prompt, steps in ((["abc", "red"], 11), ("two", 7), (["x", "y", "z"], 9))
        ]
        total = sum(verdict.evaluations for future in futures for verdict in future.result(300).amg)
    assert total == sum(rows.calls)
