"""Samples at different steps of different schedulers in one batch are what each is alone."""

from itertools import pairwise

import pytest
import torch

from amg.engine.loop import Engine, first_slots
from amg.engine.step import step

from . import flying

MIXED = (
    ("ddim", 6, 3.0, {}),
    ("euler", 5, 7.5, {}),
    ("dpm2m-karras", 7, 2.0, {"images": 2}),
    ("unipc", 9, 1.5, {}),
    ("pndm", 4, 5.0, {}),
    ("heun", 3, 4.0, {}),
    ("euler-v-karras", 6, 3.0, {}),
    ("ddpm-clip", 5, 1.0, {"guided": False}),
    ("dpm3m", 8, 6.0, {"rescale": 0.7}),
    ("kdpm2", 3, 2.5, {"guided": False, "images": 2}),
)


def jobs(mixed=MIXED):
    """One of each, every request with its own generator."""
    return [
        flying.job(flying.course(name, steps, scale), seed, generator=chance(seed), **more)
        for seed, (name, steps, scale, more) in enumerate(mixed)
    ]


def chance(seed):
    return torch.Generator().manual_seed(1000 + seed)


def expected(job, place, seed):
    """The image's run alone, its noise drawn for the whole request as pipelines draw."""
    table, generator = job.course.plan(job.config).table, chance(seed)
    noises = [
        torch.randn(job.sample.shape, generator=generator)[place : place + 1] if drawn else torch.zeros(1)
        for drawn in table.draws
    ]
    sample, conditions = job.sample[place : place + 1], job.conditions_of(place)
    return flying.alone(table, sample, conditions, [job.course.scale] * len(table), noises, job.rescale)


def assert_as_alone(done, seeds):
    assert done
    for (job, place), one in done.items():
        alone = expected(job, place, seeds[job])
        size = float(alone.after[-1].abs().max())
        assert float((one.sample - alone.after[-1]).abs().max()) <= 3e-5 * size
        trace = one.slot.flight.trace
        plan = job.course.plan(job.config)
        assert [(step.step, step.t) for step in trace] == [(at.position, at.t) for at in plan.steps]
        signals = torch.tensor([step.signals for step in trace], dtype=torch.float64)
        torch.testing.assert_close(signals, torch.tensor(alone.signals).double(), rtol=2e-4, atol=1e-3)
        each = 1 if job.conditions.uncond is None else 2
        assert one.slot.flight.evaluations == each * len(trace) and one.broken is None


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_mixed_set_gives_each_sample_s_own_run(every):
    """All at once, and one request joining after another while others leave."""
    ours = jobs()
    arrivals = {0: ours} if not every else {every * at: [job] for at, job in enumerate(ours)}
    done = flying.fly(flying.empty(), arrivals)
    assert len(done) == sum(len(job) for job in ours)
    assert_as_alone(done, {job: seed for seed, job in enumerate(ours)})


def test_a_request_of_two_images_in_a_set_of_its_own():
    ours = jobs()[2:3]
    assert_as_alone(flying.fly(flying.empty(), {0: ours}), {ours[0]: 2})


@pytest.mark.parametrize("after", [1, 3])
def test_what_stays_when_others_leave_and_what_is_parted_go_on_as_if_alone(after):
    """After some steps three requests are let go, one is parted from the rest; all keep their histories."""
    ours, slots, engine = jobs(), flying.empty(), Engine()
    with torch.no_grad():
        for job in ours:
            slots.join(first_slots(job), job.sample)
        for _ in range(after):
            step(slots)
            engine._settle(slots)
        gone = [at for at, slot in enumerate(slots.slots) if slot.job in (ours[0], ours[4], ours[7])]
        samples = slots.sample.clone()
        slots.leave(gone)
        kept = [row for row in range(len(samples)) if row not in gone]
        assert torch.equal(slots.sample, samples[kept])
        other = slots.part(ours[2])
        assert [slot.job for slot in other.slots] == [ours[2]] * 2
        slots.leave([at for at, slot in enumerate(slots.slots) if slot.job is ours[2]])
    assert len(slots) == len(samples) - len(gone) - 2
    done = {**flying.fly(slots, {}), **flying.fly(other, {})}
    early = {(one.slot.job, one.slot.place): one for one in engine._done}
    assert_as_alone({**done, **early}, {job: seed for seed, job in enumerate(ours)})


def test_a_sample_put_in_another_s_place_begins_with_an_empty_history():
    """dpm3m carries states; its successor in the same slot is a fresh run, its neighbour's goes on."""
    first, other, later = (flying.job(flying.course("dpm3m", 6), seed) for seed in (1, 2, 3))
    slots, engine = flying.empty(), Engine()
    with torch.no_grad():
        slots.join([*first_slots(first), *first_slots(other)], torch.cat([first.sample, other.sample]))
        for _ in range(4):
            step(slots)
            engine._settle(slots)
        (slots.slots[0],) = first_slots(later)
        slots.start_again([0], later.sample)
    done = flying.fly(slots, {})
    for job in (other, later):
        table = job.course.plan(job.config).table
        alone = flying.alone(table, job.sample, job.conditions, [3.0] * len(table)).after[-1]
        torch.testing.assert_close(done[job, 0].sample.double(), alone, rtol=1e-4, atol=1e-4)


def test_a_trace_longer_than_its_room_is_kept_whole():
    """200 steps, joined by one of 3: more than a trace has room for at first."""
    long, short = flying.job(flying.course("ddim", 200), 1), flying.job(flying.course("ddim", 3), 2)
    done = flying.fly(flying.empty(), {0: [short], 2: [long]})
    for job in (long, short):
        table = job.course.plan(job.config).table
        alone = flying.alone(table, job.sample, job.conditions, [3.0] * len(table))
        found = torch.tensor([step.signals for step in done[job, 0].slot.flight.trace], dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(alone.signals).double(), rtol=1e-3, atol=1e-3)


def test_between_events_nothing_is_packed_anew():
    """Ten steps without an event: the same tensors, cursors moved on by one a step."""
    job, slots, engine = flying.job(flying.course("ddim", 12), 1, 3), flying.empty(), Engine()
    kept = []
    with torch.no_grad():
        slots.join(first_slots(job), job.sample)
        for _ in range(10):
            step(slots)
            if slots.tick > slots.event:
                engine._settle(slots)
            kept.append((slots.conditions, slots.rows, slots.cursor, slots.cursor.clone()))
    for before, after in pairwise(kept):
        assert all(one is other for one, other in zip(before[:3], after[:3], strict=True))
        assert torch.equal(after[3], before[3] + 1)


def test_plans_that_are_not_followed_any_more_do_not_pile_up():
    slots = flying.empty()
    for at in range(40):
        job = flying.job(flying.course("ddim", 3, 1.0 + at), at)
        flying.fly(slots, {slots.tick: [job]})
    assert len(slots.plans) <= 33 and len(slots.bank) <= 33 * 3
