"""Loops whose samples start again: the page's own code, held to the Sampler."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import amg

from .conftest import tiny_ddpm, tiny_sd

diffusers = pytest.importorskip("diffusers")
PAGE = Path(__file__).parents[2] / "docs" / "own-loop.md"
STEPS = 8
CLOSE = {
    "lambda_min": -1.0,
    "lambda_max": -1.0,
    "check_at": (),
    "rewind_at": (0.5,),
    "rewind_threshold": -0.99,
    "guard_threshold": None,
    "max_rewinds": 2,
    "c2": 0.0,
    "on_memorized": "flag",
    "max_evaluations": None,
}


def config(**options):
    return amg.AMGConfig.preset("main", guidance_scale=5.0, **{**CLOSE, **options})


def run(name, **given):
    """The page's loop, in a namespace of what is the reader's."""
    (code,) = re.findall(rf"<!-- code: {name} -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    space = {"steps": STEPS, **given}
    exec(compile(code, str(PAGE), "exec"), space)
    return space


def parts(pipe):
    encode = lambda texts: pipe.encode_prompt(list(texts), "cpu", 1, False)[0]  # noqa: E731
    return {"unet": pipe.unet, "vae": pipe.vae, "encode": encode}


def noise(channels, seeds, size=8):
    drawn = [
        torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return torch.cat(drawn)


@pytest.mark.parametrize("options", [{}, {"on_memorized": "resample", "threshold": -1.0, "max_retries": 1}])
def test_the_pages_loop_is_the_sampler(options, embedding_index):
    """Every sample goes back twice, and with a threshold that nothing keeps runs again; same pictures."""
    pipe, prompts, seeds = tiny_sd(), ["abc", "a 7", "caption 3"], (1, 2, 3)
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    space = run(
        "sd",
        index=embedding_index,
        config=config(**options),
        prompts=prompts,
        noise=noise(4, seeds),
        **parts(pipe),
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with amg.Sampler(pipe, embedding_index, config(**options)) as sampler:
        out = sampler(
            prompts, generator=generators, num_inference_steps=STEPS, output_type="pt", progress=False
        )
    for mine, theirs in zip(space["verdicts"], out.amg, strict=True):
        assert (mine.rewinds, mine.retries, mine.caption) == (theirs.rewinds, theirs.retries, theirs.caption)
        assert mine.rewinds >= 2 and mine.evaluations == theirs.evaluations
        assert mine.retries == (1 if options else 0)
    if options:  # the Sampler withholds them, as the page's last line does
        assert all(verdict.memorized for verdict in space["verdicts"])
        assert float(space["images"].abs().max()) == float(out.images.abs().max()) == 0
    else:
        shown = (space["scheduler"]._guide.denoiser.decode(space["sample"]).clamp(0, 1) - out.images).abs()
        assert float(shown.max()) <= 1 / 255


def test_the_pages_pixel_loop(tmp_path):
    """A hidden training set: what the plain loop draws. Nothing of it comes out unmarked."""
    pipe = tiny_ddpm()
    first = noise(3, (1, 2))
    plain = diffusers.DDPMScheduler()
    plain.set_timesteps(STEPS)
    sample, generator = first, torch.Generator().manual_seed(7)
    with torch.no_grad():
        for t in plain.timesteps:
            sample = plain.step(pipe.unet(sample, t).sample, t, sample, generator=generator).prev_sample
    copies = (sample / 2 + 0.5).clamp(0, 1)
    others = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    index = amg.Index.build(torch.cat([copies, others]), None, None, tmp_path / "p.amg", progress=False)
    asked = amg.AMGConfig.preset("main", threshold=0.7, rewind_threshold=0.7, max_evaluations=None)
    space = run("pixels", unet=pipe.unet, index=index, config=asked, noise=first)
    for verdict, image in zip(space["verdicts"], space["images"], strict=True):
        assert verdict.rewinds or verdict.retries
        assert verdict.memorized == (float(image.abs().max()) == 0)


def test_the_pages_flow_matching_loop(embedding_index):
    pipe = tiny_sd()
    given = parts(pipe)
    decode = lambda x0: pipe.vae.decode(x0, return_dict=False)[0] / 2 + 0.5  # noqa: E731

    def transformer(sample, t, states):
        return pipe.unet(sample, t, states).sample

    space = run(
        "flow",
        transformer=transformer,
        decode=decode,
        encode=given["encode"],
        index=embedding_index,
        config=config(),
        prompts=["abc", "de"],
        noise=noise(4, (1, 2)),
    )
    assert [verdict.rewinds for verdict in space["verdicts"]] == [2, 2]
    assert bool(space["images"].isfinite().all())


def loop(scheduler, first, prompts=None, obey=True):
    """A toy network's loop; the batch's x at the end."""
    sample = scheduler.begin(first, prompts)
    with torch.no_grad():
        while not scheduler.finished:
            t = scheduler.timestep
            x = scheduler.scale_model_input(sample, t)
            output = torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 2000)
            sample = scheduler.step((output, 0.9 * output), t, sample).prev_sample
            if obey:
                sample = scheduler.restarted(sample)
    return sample


def wrapped(index, scheduler=None, **options):
    made = amg.AMGScheduler(
        scheduler or diffusers.EulerDiscreteScheduler(),
        index,
        config(**options),
        decode=lambda x: x[:, :3] / 2 + 0.5,
    )
    made.set_timesteps(STEPS)
    return made


@pytest.mark.parametrize(
    "kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_a_row_does_not_depend_on_its_batch(kind, embedding_index):
    first, make = noise(4, (1, 2, 3), size=16), getattr(diffusers, kind)
    together = wrapped(embedding_index, make(), threshold=0.9, rewind_threshold=0.2)
    whole = loop(together, first)
    assert any(flight.total_rewinds for flight in together._flights)
    for row in range(3):
        alone = wrapped(embedding_index, make(), threshold=0.9, rewind_threshold=0.2)
        apart = (loop(alone, first[row : row + 1])[0] - whole[row]).abs().max()
        assert float(apart) < 1e-5 * float(whole[row].abs().max())


def test_marks_positions_and_captions(embedding_index):
    scheduler = wrapped(embedding_index, max_rewinds=1)
    sample = scheduler.begin(noise(4, (1, 2), size=16), ["a 7", "b 9"])
    assert scheduler.timestep.tolist() == [float(scheduler.timesteps[0])] * 2 and not scheduler.finished
    seen = []
    while not scheduler.finished:
        t = scheduler.timestep
        sample = scheduler.step((sample, sample), t, sample).prev_sample
        seen.append(scheduler.restart.tolist())
        if scheduler.restart.any():
            assert scheduler.captions == ["caption 7", "caption 9"]
            before, sample = sample, scheduler.restarted(sample)
            assert not torch.equal(before, sample) and not scheduler.restart.any()
            assert scheduler.timestep.tolist() == [float(scheduler.timesteps[0])] * 2  # Euler restarts there
        else:
            assert torch.equal(scheduler.restarted(sample), sample)
    assert seen.count([True, True]) == 1 and len(seen) > STEPS


def test_a_loop_that_does_not_obey_is_told_once(embedding_index):
    scheduler = wrapped(embedding_index, max_rewinds=4)
    with pytest.warns(UserWarning, match="2 of 2 samples were found to copy training images") as said:
        loop(scheduler, noise(4, (1, 2), size=16), obey=False)
        loop(scheduler, noise(4, (1, 2), size=16), obey=False)
    assert len(said) == 1
    plain = wrapped(embedding_index, max_rewinds=4)
    sample = noise(4, (1, 2), size=16) * plain.init_noise_sigma
    with pytest.warns(UserWarning, match="pushed under the metric's threshold") as said:
        for t in plain.timesteps:
            sample = plain.step((sample, 0.9 * sample), t, sample).prev_sample
    assert len(said) == 1 and [flight.total_rewinds for flight in plain._flights] == [0, 0]


def test_a_mark_at_the_last_step_is_told_of_with_the_verdicts(embedding_index):
    scheduler = wrapped(embedding_index, rewind_at=(1.0,))
    sample = noise(4, (1, 2), size=16) * scheduler.init_noise_sigma
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in scheduler.timesteps:
            sample = scheduler.step((sample, 0.9 * sample), t, sample).prev_sample
    assert scheduler.restart.tolist() == [True, True]
    with pytest.warns(UserWarning, match="should start again"):
        scheduler.verdicts(normalize(sample[:, :3]).abs())


def test_what_does_not_fit_is_refused(embedding_index):
    scheduler = amg.AMGScheduler(
        diffusers.DDIMScheduler(), embedding_index, config(), decode=lambda x: x[:, :3]
    )
    with pytest.raises(ValueError, match="`set_timesteps` must be called before"):
        scheduler.begin(noise(4, (1,)))
    scheduler.set_timesteps(STEPS)
    for name in ("finished", "timestep"):
        with pytest.raises(ValueError, match=f"`{name}` needs a batch that `begin` started"):
            getattr(scheduler, name)
    with pytest.raises(ValueError, match="`restarted` needs a batch"):
        scheduler.restarted(noise(4, (1,)))
    with pytest.raises(ValueError, match="`prompts` must be 1, one a sample, got 2"):
        scheduler.begin(noise(4, (1,)), ["a", "b"])
    sample = scheduler.begin(noise(4, (1, 2)))
    with pytest.raises(ValueError, match=r"`timestep` must be .*`scheduler.timestep`"):
        scheduler.step((sample, sample), scheduler.timesteps[1], sample)
    with pytest.raises(ValueError, match="must have 2 rows"):
        scheduler.step((sample[:1], sample[:1]), scheduler.timestep, sample[:1])
    broken = sample.clone()
    broken[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
        for _ in range(STEPS):
            scheduler.step((broken, broken), scheduler.timestep, sample)


def test_a_scheduler_without_a_table_is_refused(embedding_index):
    scheduler = wrapped(embedding_index, diffusers.IPNDMScheduler())
    sample = scheduler.begin(noise(4, (1,), size=16))
    with pytest.raises(ValueError, match="IPNDM"):
        scheduler.step((sample, sample), scheduler.timestep, sample)


def test_verdicts_of_earlier_pictures_send_nothing_back(embedding_index):
    """A sample that was run again and waits for others is not run again for what its first picture was."""
    scheduler = wrapped(embedding_index, rewind_at=(), on_memorized="resample", threshold=-1.0)
    first = noise(4, (1, 2), size=16)
    sample = loop(scheduler, first)
    verdicts = scheduler.verdicts((sample[:, :3] / 2 + 0.5).clamp(0, 1))
    assert all(verdict.memorized for verdict in verdicts)
    sample = scheduler.restarted(sample, [replace(verdicts[0], memorized=False), verdicts[1]])
    assert [flight.retries for flight in scheduler._flights] == [0, 1] and not scheduler.finished
    t = scheduler.timestep
    sample = scheduler.step((sample, sample), t, sample).prev_sample
    assert torch.equal(scheduler.restarted(sample, verdicts), sample)  # the first waits, as it is
    assert [flight.retries for flight in scheduler._flights] == [0, 1]
