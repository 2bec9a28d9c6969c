"""How often the host reads a value in a whole call: at events, and never in between."""

from collections import Counter

import pytest
import torch

import amg
import amg.engine.loop
import amg.guidance.read
from amg.engine.slots import Slots
from amg.engine.step import step

from .. import reads
from ..integrations.conftest import embedder, embedding_index, sd  # noqa: F401

STEPS, BATCH = 30, 16


class Watched:
    """Reads of every step, by whether it was one with something to do; and reads of the whole run."""

    def __init__(self, monkeypatch):
        self.quiet, self.eventful = [], []
        self.reads = reads.watch(monkeypatch)

        def watched(slots: Slots):
            eventful, before = slots.tick >= slots.event, len(self.reads)
            broken = step(slots)
            (self.eventful if eventful else self.quiet).append(self.reads[before:])
            return broken

        monkeypatch.setattr(amg.engine.loop, "step", watched)


def call(pipe, index, monkeypatch, **more):
    """A call of 16 images at 30 steps -> (its output, what was watched of it, its reads)."""
    options = {"on_memorized": "flag", "max_evaluations": None, **more}
    with amg.Sampler(pipe, index, amg.AMGConfig.preset("main", **options)) as sampler:
        request = {"num_inference_steps": STEPS, "num_images_per_prompt": BATCH, "output_type": "latent"}
        sampler.submit(amg.Request("abc", seed=1, **request)).result(600)  # tables are made once
        with monkeypatch.context() as patch:
            watched = Watched(patch)
            job = amg.Request("abc", seed=1, **request)
            before = len(watched.reads)
            out = sampler.submit(job).result(600)
        return out, watched, [file for file in watched.reads[before:] if "/amg/" in file]


NEVER = {"lambda_min": 0.99, "lambda_max": 0.99, "guard_threshold": None, "on_memorized": "flag"}
ORDINARY = {**NEVER, "rewind_threshold": 0.99}


def test_an_ordinary_call_reads_at_most_ten_times(sd, embedding_index, monkeypatch):  # noqa: F811
    out, watched, found = call(sd, embedding_index, monkeypatch, **ORDINARY)
    assert [verdict.rewinds for verdict in out.amg] == [0] * BATCH
    assert len(watched.quiet) + len(watched.eventful) == STEPS and len(watched.eventful) <= 6
    assert watched.quiet == [[]] * len(watched.quiet)
    assert len(found) <= 10, found


def test_a_call_whose_every_image_goes_back_reads_at_most_thirty_times(
    sd,  # noqa: F811
    embedding_index,  # noqa: F811
    monkeypatch,
):
    """At every checkpoint all go back, until they did so as often as they may; no term acts."""
    every = {**NEVER, "rewind_threshold": -1.0, "max_rewinds": 2}
    out, watched, found = call(sd, embedding_index, monkeypatch, **every)
    assert [verdict.rewinds for verdict in out.amg] == [2] * BATCH
    assert watched.quiet == [[]] * len(watched.quiet) and len(watched.quiet) > STEPS / 2
    assert len(found) <= 30, Counter(found)


def test_open_gates_read_once_a_step_of_all_samples(sd, embedding_index, monkeypatch):  # noqa: F811
    """From `terms_from` on every step is looked at: one read each for all sixteen. The terms' strengths are
    worked out of numbers that the host has then."""
    options = {"lambda_min": -1.0, "lambda_max": -1.0, "rewind_at": (), "check_at": (0.5,), "terms_from": 0.4}
    out, watched, _ = call(sd, embedding_index, monkeypatch, **options)
    assert all(any("dissimilarity" in at.terms for at in verdict.trace) for verdict in out.amg)
    assert watched.quiet == [[]] * len(watched.quiet)
    of_device = [[file for file in made if file.endswith("guidance/read.py")] for made in watched.eventful]
    assert max(map(len, of_device)) == 1


@pytest.mark.parametrize("count", [1, 16])
def test_the_reads_of_a_call_do_not_grow_with_its_batch(sd, embedding_index, monkeypatch, count):  # noqa: F811
    with amg.Sampler(sd, embedding_index, amg.AMGConfig.preset("main", **ORDINARY)) as sampler:
        request = {"num_inference_steps": 10, "output_type": "latent", "num_images_per_prompt": count}
        sampler("abc", **request, progress=False, generator=torch.Generator().manual_seed(1))
        with monkeypatch.context() as patch:
            found = []
            original = amg.guidance.read._to_host
            patch.setattr(amg.guidance.read, "_to_host", lambda values: found.append(1) or original(values))
            sampler("abc", **request, progress=False, generator=torch.Generator().manual_seed(1))
    assert len(found) == 5, "four checks, and the traces of all at once"
