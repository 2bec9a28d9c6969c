"""`Sampler.submit` gives what the sampler's call gives: mixed requests, late ones, failing ones.

Joined products of matrices may round differently than a lone request's. Images are delivered in 8 bits, where
that is at most one level.
"""

import copy
import queue
import threading
import types
from concurrent.futures import CancelledError

import pytest
import torch

import amg
import amg.engine.queue

diffusers = pytest.importorskip("diffusers")

WAIT = 60  # seconds after which a test is considered hung
LEVEL = 1 / 255 + 1e-6
OPEN = {"lambda_min": -1.0, "lambda_max": -1.0, "c1": 20.0, "c2": 20.0, "on_memorized": "flag"}
REWINDS = {**OPEN, "rewind_at": (0.6,), "rewind_threshold": -1.0, "max_rewinds": 1, "rewind_guidance": 1.0}
MIXED = (
    {"prompt": "abc", "num_inference_steps": 6, "guidance_scale": 7.5},
    {"prompt": "cat, red", "num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": "dog"},
    {"prompt": ["one", "two"], "num_inference_steps": 5, "seed": [7, 8]},
    {"prompt": "no guidance", "num_inference_steps": 3, "guidance_scale": 1.0, "num_images_per_prompt": 2},
    {"prompt": "rescaled", "num_inference_steps": 6, "guidance_rescale": 0.7, "eta": 0.5},
)


def config(**more):
    return amg.AMGConfig.preset("main", **{"on_memorized": "flag", "rewind_at": (), **more})


def requests(specs=MIXED):
    return [amg.Request(**{"seed": i, "output_type": "pt", **spec}) for i, spec in enumerate(specs)]


def alone(sampler, request):
    """What the sampler's call gives for a request."""
    names = set(amg.Request.__dataclass_fields__) - {"seed", "deadline"}
    seeds = request.seed if isinstance(request.seed, list) else [request.seed]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {name: getattr(request, name) for name in names}
    generator = generators if isinstance(request.seed, list) else generators[0]
    return sampler(**arguments, generator=generator, progress=False)


def assert_equal(got, expected):
    assert (got.images - expected.images).abs().max() <= LEVEL
    assert len(got.amg) == len(expected.amg)
    for ours, theirs in zip(got.amg, expected.amg, strict=True):
        for name in ("neighbour", "memorized", "rewinds", "retries", "blocked", "evaluations"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.similarity == pytest.approx(theirs.similarity, abs=1e-4)
        assert [step.terms for step in ours.trace] == [step.terms for step in theirs.trace]


class Calls:
    """Rows of every call of the U-Net; runs `at[number of the call]` in it."""

    def __init__(self, pipe):
        self.rows, self.at = [], {}
        pipe.unet.register_forward_hook(self.after)

    def after(self, module, inputs, output):
        self.rows.append(len(output[0]))
        self.at.pop(len(self.rows), lambda: None)()


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "UniPCMultistep"])
@pytest.mark.parametrize("rewinds", [False, True])
def test_mixed_requests_equal_their_solo_runs(sd, embedding_index, scheduler, rewinds):
    sd.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(sd.scheduler.config)
    with amg.Sampler(sd, embedding_index, config(**(REWINDS if rewinds else OPEN))) as sampler:
        calls = Calls(sd)
        expected = [alone(sampler, request) for request in requests()]
        solo = len(calls.rows)
        calls.rows.clear()
        futures = [sampler.submit(request) for request in requests()]
        got = [future.result(WAIT) for future in futures]
    for ours, theirs in zip(got, expected, strict=True):
        assert_equal(ours, theirs)
    assert any(verdict.rewinds for out in got for verdict in out.amg) == rewinds
    assert len(calls.rows) < solo * 0.7 and max(calls.rows) > 6


def test_pixels_and_classes_equal_their_solo_runs(class_ddpm, pixel_index):
    specs = (
        {"class_labels": [1], "num_inference_steps": 6, "guidance_scale": 2.0},
        {"class_labels": torch.tensor([3, 0]), "num_inference_steps": 4, "guidance_scale": 4.0},
        {"batch_size": 2, "num_inference_steps": 5},
    )
    with amg.Sampler(class_ddpm, pixel_index, config(**OPEN)) as sampler:
        expected = [alone(sampler, request) for request in requests(specs)]
        futures = [sampler.submit(request) for request in requests(specs)]
        for future, theirs in zip(futures, expected, strict=True):
            assert_equal(future.result(WAIT), theirs)


def test_measurements_are_joined_too(sd, embedding_index, embedder):
    """As many equal requests as there are, every call of the U-Net and of the embedder is of all of them."""
    embedded = []
    handle = embedder.register_forward_hook(lambda module, inputs, output: embedded.append(len(output)))
    hold = threading.Event()
    with amg.Sampler(sd, embedding_index, config(lambda_min=1.0, lambda_max=1.0, check_at=())) as sampler:
        calls = Calls(sd)
        calls.at[1] = lambda: hold.wait(WAIT)
        first = sampler.submit(amg.Request("abc", num_inference_steps=1, seed=9))
        futures = [sampler.submit(request) for request in requests(MIXED[:1] * 3)]
        hold.set()
        assert [len(future.result(WAIT).amg) for future in (first, *futures)] == [1] * 4
    handle.remove()
    assert calls.rows == [2, *[6] * 6]
    assert embedded == [1, 1, *[3] * 7], "at every step, and the finished images"


@pytest.mark.parametrize("policy", ["resample", "block"])
def test_what_is_memorised_is_run_again_and_blocked_as_alone(sd, embedding_index, policy):
    settings = config(threshold=-1.0, on_memorized=policy, max_retries=1)
    with amg.Sampler(sd, embedding_index, settings) as sampler:
        expected = [alone(sampler, request) for request in requests(MIXED[:2])]
        futures = [sampler.submit(request) for request in requests(MIXED[:2])]
        for future, theirs in zip(futures, expected, strict=True):
            assert theirs.amg[0].blocked and theirs.amg[0].retries == (policy == "resample")
            assert_equal(future.result(WAIT), theirs)


def test_the_gradient_through_the_network_is_each_request_s_own(sd, embedding_index):
    settings = config(**OPEN, gradient="full")
    with amg.Sampler(sd, embedding_index, settings) as sampler:
        expected = [alone(sampler, request) for request in requests(MIXED[:2])]
        futures = [sampler.submit(request) for request in requests(MIXED[:2])]
        for future, theirs in zip(futures, expected, strict=True):
            assert_equal(future.result(WAIT), theirs)


def test_further_indexes_are_asked_as_alone(sd, embedding_index, pixel_index):
    with amg.Sampler(sd, embedding_index, config(), also=[pixel_index]) as sampler:
        expected = [alone(sampler, request) for request in requests(MIXED[:2])]
        futures = [sampler.submit(request) for request in requests(MIXED[:2])]
        for future, theirs in zip(futures, expected, strict=True):
            assert_equal(future.result(WAIT), theirs)
            ours = future.result().amg[0].also[0]
            assert ours.similarity == pytest.approx(theirs.amg[0].also[0].similarity, abs=1e-4)


def test_a_request_on_its_own_gives_the_very_bits_of_the_call(sd, embedding_index):
    with amg.Sampler(sd, embedding_index, config(**REWINDS)) as sampler:
        for request in requests():
            got, expected = sampler.submit(request).result(WAIT), alone(sampler, request)
            assert torch.equal(got.images, expected.images) and got.amg == expected.amg


def test_seeds(sd, embedding_index):
    """None: never twice the same; the global generator has no part in it."""
    with amg.Sampler(sd, embedding_index, amg.AMGConfig.preset("off", on_memorized="flag")) as sampler:
        before = torch.get_rng_state()
        images = [
            sampler.submit(amg.Request("abc", num_inference_steps=1, seed=seed, output_type="pt"))
            .result(WAIT)
            .images
            for seed in (None, None, 3, 3)
        ]
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(images[0], images[1]) and torch.equal(images[2], images[3])


def test_a_late_request_joins_between_steps(sd, embedding_index):
    first, second = requests()[:2]
    with amg.Sampler(sd, embedding_index, config()) as sampler:
        expected = [alone(sampler, request) for request in (first, second)]
        calls, futures = Calls(sd), []
        calls.at[3] = lambda: futures.append(sampler.submit(second))
        early = sampler.submit(first)
        assert_equal(early.result(WAIT), expected[0])
        assert_equal(futures[0].result(WAIT), expected[1])
    assert calls.rows == [2, 2, 2, 4, 4, 4, 2]


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be >= 1, got 0"),
        ({"output_type": "jpeg"}, ValueError, "`output_type` must be"),
        ({"prompt": None}, ValueError, "`prompt` must be a text"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, ValueError, r"`latents` must be \[1, 4, 8, 8\]"),
        ({"deadline": 0}, ValueError, "`deadline` must be > 0 seconds or None, got 0"),
        ({"deadline": float("nan")}, ValueError, "`deadline` must be > 0"),
    ],
)
def test_bad_input_is_refused_at_submit(sd, embedding_index, more, error, message):
    with amg.Sampler(sd, embedding_index, config()) as sampler, pytest.raises(error, match=message):
        sampler.submit(amg.Request(**{"prompt": "abc", **more}))


def test_a_guidance_scale_of_one_is_said_to_the_caller_of_submit(sd, embedding_index):
    sampler = amg.Sampler(sd, embedding_index, config())
    with pytest.warns(UserWarning, match=r"`guidance_scale` is 1.0: despecification") as caught:
        sampler.submit(amg.Request("abc", num_inference_steps=1, guidance_scale=1.0)).result(WAIT)
    assert [one.filename for one in caught if "despecification" in str(one.message)] == [__file__]


def test_nan_in_one_request_is_its_own(sd, embedding_index):
    broken = amg.Request("abc", latents=torch.full((1, 4, 8, 8), torch.nan), num_inference_steps=4)
    with amg.Sampler(sd, embedding_index, config(**OPEN)) as sampler:
        expected = [alone(sampler, request) for request in requests()[:2]]
        futures = [sampler.submit(request) for request in (requests()[0], broken, requests()[1])]
        with pytest.raises(FloatingPointError, match="finite"):
            futures[1].result(WAIT)
        assert_equal(futures[0].result(WAIT), expected[0])
        assert_equal(futures[2].result(WAIT), expected[1])


class Choosy:
    """An embedder that raises where an image of the batch is `refused`."""

    def __init__(self, embedder):
        self.embedder, self.refused = embedder, None

    def __getattr__(self, name):
        return getattr(self.embedder, name)

    def __call__(self, images):
        if self.refused is not None and any((image - self.refused).abs().max() < 0.02 for image in images):
            raise RuntimeError("I do not like this picture")
        return self.embedder(images)


def test_an_embedder_that_fails_on_one_request_s_image(sd, embedding_index, embedder):
    index = copy.copy(embedding_index)
    index.embedder = choosy = Choosy(embedder)
    specs = [{**spec, "num_inference_steps": 4} for spec in MIXED[:2]] * 2
    with amg.Sampler(sd, index, amg.AMGConfig.preset("off", on_memorized="flag")) as sampler:
        expected = [alone(sampler, request) for request in requests(specs)]
        choosy.refused = expected[2].images[0]
        futures = [sampler.submit(request) for request in requests(specs)]
        with pytest.raises(RuntimeError, match="I do not like this picture"):
            futures[2].result(WAIT)
        for i in (0, 1, 3):
            assert_equal(futures[i].result(WAIT), expected[i])


def test_cancelled_between_steps(sd, embedding_index):
    with amg.Sampler(sd, embedding_index, config()) as sampler:
        expected = alone(sampler, requests()[1])
        calls, futures = Calls(sd), []
        calls.at[1] = lambda: futures.append(sampler.submit(requests()[1]))
        calls.at[2] = lambda: first.cancel()
        first = sampler.submit(requests()[0])
        with pytest.raises(CancelledError):
            first.result(WAIT)
        while not futures:  # the first call of the U-Net has begun, as the second ended the first request
            threading.Event().wait(0.001)
        assert_equal(futures[0].result(WAIT), expected)
    assert calls.rows == [2, 4, 2, 2, 2]


def test_a_deadline_that_passes_between_steps(sd, embedding_index, monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(amg.engine.queue, "time", fake)
    monkeypatch.setattr("amg.engine.loop.time", fake)
    monkeypatch.setattr("amg.engine.finish.time", fake)
    monkeypatch.setattr("amg.engine.sampler.time", fake)
    with amg.Sampler(sd, embedding_index, config()) as sampler:
        calls = Calls(sd)
        calls.at[2] = lambda: setattr(clock, "now", 105.5)
        late = sampler.submit(amg.Request("abc", num_inference_steps=6, deadline=5))
        with pytest.raises(TimeoutError, match="`deadline` has passed"):
            late.result(WAIT)
        assert len(calls.rows) == 2
        sampler.submit(amg.Request("abc", num_inference_steps=6, deadline=5)).result(WAIT)


def test_the_queue_s_bound(sd, embedding_index):
    entered, release = threading.Event(), threading.Event()

    def hold():
        entered.set()
        assert release.wait(WAIT)

    with amg.Sampler(sd, embedding_index, config(), max_batch=1, max_pending=1) as sampler:
        Calls(sd).at[1] = hold
        futures = [sampler.submit(requests()[0])]
        assert entered.wait(WAIT)
        futures.append(sampler.submit(requests()[1]))
        with pytest.raises(queue.Full, match="`max_pending`"):
            sampler.submit(requests()[1], block=False)
        release.set()
        futures.append(sampler.submit(requests()[1], timeout=WAIT))
        assert all(future.result(WAIT).amg for future in futures)


def test_calls_and_other_threads_submissions_do_not_disturb(sd, embedding_index):
    """Calls in this thread while requests from two others run. A call joins what is in flight, so that its
    results are equal as those of `submit` are, no longer the very bits."""
    with amg.Sampler(sd, embedding_index, config(**OPEN)) as sampler:
        expected = [alone(sampler, request) for request in requests()]
        outs = {}

        def client(which):
            futures = [sampler.submit(request) for request in requests()]
            outs[which] = [future.result(WAIT) for future in futures]

        clients = [threading.Thread(target=client, args=(which,)) for which in "ab"]
        for thread in clients:
            thread.start()
        mine = [alone(sampler, request) for request in requests()]
        for thread in clients:
            thread.join(WAIT)
    for got, theirs in zip(mine, expected, strict=True):
        assert_equal(got, theirs)
    for which in "ab":
        for got, theirs in zip(outs[which], expected, strict=True):
            assert_equal(got, theirs)


def test_after_close_calls_go_on_and_submissions_do_not(sd, embedding_index):
    with amg.Sampler(sd, embedding_index, config()) as sampler:
        future = sampler.submit(requests()[0])
    assert future.done() and not future.cancelled()
    with pytest.raises(RuntimeError, match="after `close`"):
        sampler.submit(requests()[0])
    assert_equal(alone(sampler, requests()[0]), future.result())


def test_an_error_in_the_with_block_cancels(sd, embedding_index):
    with pytest.raises(KeyError), amg.Sampler(sd, embedding_index, config()) as sampler:
        futures = [sampler.submit(amg.Request("abc", num_inference_steps=900)) for _ in range(2)]
        raise KeyError
    assert all(future.cancelled() for future in futures)
