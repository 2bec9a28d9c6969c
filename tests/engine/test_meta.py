"""The proof without a GPU: whole runs of a tiny Stable Diffusion on torch's meta device.

There no value can be read: `tolist`, `item`, `bool`, `nonzero`, masks and mixing with other devices all
raise, so a run that ends has read values only through `amg.guidance.read`, whose answers are injected
here. An index by a tensor of the CPU is the one mixing that torch lets pass: looked for by a mode.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import amg
import amg.guidance.read
from amg.config import AMGConfig
from amg.embed.precision import Modes
from amg.engine.job import Job
from amg.engine.look import Tools
from amg.engine.loop import Engine, first_slots
from amg.engine.plan import Course
from amg.engine.slots import Slots
from amg.engine.step import step
from amg.engine.table import setting
from amg.guidance.flight import Flight
from amg.guidance.gate import Gate, Rule
from amg.guidance.predict import Conditions
from amg.pipelines.denoiser import denoiser_for
from amg.similarity import Judge, similarity_for

from ..integrations.conftest import TinyEmbedder, tiny_sd
from . import flying
from .schedulers import CASES

META, STEPS = torch.device("meta"), 7
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.index_put_}


class NoForeignIndex(TorchFunctionMode):
    """Refuses to index a tensor of the meta device by one of the CPU, or by a list, which is made one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in INDEXING and args[0].device == META:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            for part in parts:
                foreign = isinstance(part, torch.Tensor) and part.device != META
                assert not foreign and not isinstance(part, list), "a meta tensor indexed by one of the CPU"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def pipe():
    sd = tiny_sd()
    for part in (sd.unet, sd.vae):
        part.to(META)
    return sd


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    images = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    captions = [f"caption {row % 9}" for row in range(30)]
    path = tmp_path_factory.mktemp("meta") / "index"
    found = amg.Index.build(images, captions, TinyEmbedder().eval(), path, progress=False)
    found = found.to(META)
    found.embedder.to(META)
    return found


class Answers:
    """What the host reads: every sample ordinary but where `says` has another (similarity, row) to say. NaN
    flags, student and guard say nothing."""

    def __init__(self, monkeypatch):
        self.shapes, self.says = [], {}
        monkeypatch.setattr(amg.guidance.read, "_to_host", self)
        monkeypatch.setattr(amg.guidance.read, "_bytes_to_host", self.first_noises)

    def first_noises(self, rows):
        assert rows.device == META
        self.shapes.append(tuple(rows.shape))
        return [bytes([at]) for at in range(len(rows))]

    def __call__(self, values):
        assert values.device == META
        self.shapes.append(tuple(values.shape))
        similarity, row = self.says.get(len(self.shapes), (-0.9, 3.0))
        if values.ndim == 1:
            return [0.0] * len(values)
        return [[similarity, row, -math.inf, -1.0, 0.0][: values.shape[1]]] * len(values)


def jobs(pipe, index, config, scheduler="ddim", gate=None, counts=(1, 2), **more):
    denoiser = denoiser_for(pipe)

    def encode(captions):
        return {"encoder_hidden_states": torch.zeros(len(captions), 12, 16, device=META)}

    denoiser = replace(denoiser, encode_captions=encode)
    tools = Tools(index, similarity_for(index, denoiser), denoiser, gate=gate, **more)
    case = CASES[scheduler]
    ready = setting(case.make(), {"num_inference_steps": STEPS, **case.times}, case.step)
    how = Course(ready, flying.TABLES, 7.5, gate, META)
    return [job(how, tools, config.for_metric("cosine"), count) for count in counts]


def job(how, tools, config, count):
    noise = torch.zeros(count, 4, 8, 8, device=META)
    states = torch.zeros(count, 12, 16, device=META)
    conditions = Conditions({"encoder_hidden_states": states}, {"encoder_hidden_states": states + 1}, {})
    flights = [Flight(row, prompt="caption 4 of mine") for row in noise]
    return Job(
        how, config, tools, (), conditions, noise, flights, torch.Generator().manual_seed(1), 0.0, "pt", None,
        torch.float32, "key", "owner", Modes.here(), math.inf,
    )  # fmt: skip


def run(ours, late=()):
    """All steps of all samples, one request joining late -> finished samples, and steps made."""
    first = ours[0]
    slots, engine, steps = Slots(first.tools.denoiser, first.sample, torch.float32), Engine(), 0
    with torch.no_grad(), NoForeignIndex():
        for one in ours:
            slots.join(first_slots(one), one.sample)
        while len(slots):
            if steps == 2:
                for one in late:
                    slots.join(first_slots(one), one.sample)
            assert step(slots) == []
            steps += 1
            if slots.tick > slots.event:
                engine._settle(slots)
    assert all(done.sample.device == META and done.broken is None for done in engine._done)
    return [done.slot.flight for done in engine._done], steps


CHECKS = {"check_at": (0.5,), "rewind_at": (0.5,), "rewind_threshold": 0.5, "rewind_to": 0.2}


@pytest.mark.parametrize("scheduler", ["ddim", "euler-a", "unipc", "pndm"])
def test_an_ordinary_run_reads_at_its_checks_and_its_end(pipe, index, monkeypatch, scheduler):
    """Three images of two requests: one look of all at the check, one read of all that leave."""
    answers = Answers(monkeypatch)
    ours = jobs(pipe, index, AMGConfig.preset("main", **CHECKS), scheduler)
    flights, steps = run(ours)
    assert len(flights) == 3 and answers.shapes[0] == (3, 5) and len(answers.shapes) == 2
    total = ours[0].steps
    assert steps == total and all(flight.evaluations == 2 * total for flight in flights)
    assert [at.step for at in flights[0].trace if at.similarity is not None] == [round(0.5 * (total - 1))]


@pytest.mark.parametrize("form", ["exact", "constant", "full", "released", "ungated"])
def test_gates_open_with_all_three_terms(pipe, index, monkeypatch, form):
    """From the check on, at every step: despecification, de-duplication and the gradient."""
    options = {
        "exact": {"step_length": "exact"},
        "constant": {"step_length": "constant"},
        "full": {"step_length": "constant", "gradient": "full"},
        "ungated": {"gated": False, "check_at": ()},
    }
    plain = {"check_at": (0.5,), "rewind_at": (), "terms_from": 0.0, "c1": 4.0, "c2": 3.0}
    if form == "released":
        config = AMGConfig.preset("released", max_evaluations=None)
    else:
        config = AMGConfig.preset("main", **{**plain, "max_evaluations": None, **options[form]})
    answers = Answers(monkeypatch)
    answers.says = dict.fromkeys(range(1, 60), (0.9, 3.0))
    flights, steps = run(jobs(pipe, index, config))
    looked = [at for at in flights[0].trace if at.similarity is not None]
    assert len(looked) == (4 if form in ("exact", "constant", "full") else STEPS) and steps == STEPS
    for at in looked:
        assert at.terms[0] == "despecification" and (form == "released" or "deduplication" in at.terms)
    each = {"exact": 3, "constant": 3, "full": 5, "ungated": 3, "released": 2}[form]
    assert flights[0].evaluations == 2 * (STEPS - len(looked)) + each * len(looked)


@pytest.mark.parametrize(
    ("scheduler", "caption"), [("ddim", "prompt"), ("euler-a", "ordinary"), ("dpm2m-karras", "ordinary")]
)
def test_samples_go_back_take_other_captions_and_finish(pipe, index, monkeypatch, scheduler, caption):
    """The first look says copy: all go back; a request that joined late has its own look, ordinary."""
    answers = Answers(monkeypatch)
    answers.says = {1: (0.9, 3.0)}
    config = AMGConfig.preset("main", **{**CHECKS, "rewind_caption": caption})
    *ours, late = jobs(pipe, index, config, scheduler, counts=(1, 2, 2))
    flights, _ = run(ours, [late])
    assert sorted(flight.rewinds for flight in flights) == [0, 0, 1, 1, 1]
    for flight in flights:
        again = [at.step for at in flight.trace]
        assert again == ([*range(4), *range(1, STEPS)] if flight.rewinds else [*range(STEPS)])


def test_a_calibration_s_rules_and_alarm_are_asked(pipe, index, monkeypatch):
    """The check at step 3 is passed over by its rule, and step 2's alarm says nothing: two reads."""
    combined = Rule("combined", 1.0, 2.0, (1.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    flat = torch.ones(STEPS - 1, dtype=torch.float64)
    gate = Gate(rules={3: Rule("region", 1.0, 2.0)}, alarm={2: combined}, mean=flat, deviation=flat)
    answers = Answers(monkeypatch)
    answers.says = {1: (-1.0, -1.0), 2: (-1.0, -1.0)}
    flights, _ = run(jobs(pipe, index, AMGConfig.preset("main", **CHECKS), gate=gate))
    assert answers.shapes[:2] == [(3, 2), (3, 2)] and len(answers.shapes) == 3
    assert all(at.similarity is None for flight in flights for at in flight.trace)


def test_further_indexes_are_asked_at_checkpoints(pipe, index, monkeypatch):
    answers = Answers(monkeypatch)
    denoiser = denoiser_for(pipe)
    judge = Judge(index, similarity_for(index, denoiser))
    run(jobs(pipe, index, AMGConfig.preset("main", **CHECKS), judges=(judge,)))
    assert answers.shapes[0] == (3, 5)


def test_the_interval_and_samples_of_several_schedulers(pipe, index, monkeypatch):
    """One set: a request with guidance on half of its steps beside others of other schedulers."""
    Answers(monkeypatch)
    config = AMGConfig.preset("off", guidance_interval=(0.0, 0.5))
    names = ("ddim", "euler", "dpm3m", "euler-a")
    ours = list(itertools.chain.from_iterable(jobs(pipe, index, config, name) for name in names))
    flights, steps = run(ours)
    assert steps == STEPS and all(flight.evaluations == STEPS + 4 for flight in flights)
