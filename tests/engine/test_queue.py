"""Who comes next, who waits, and that nobody waits for ever."""

import gc
import queue
import threading
import time
import types
import weakref
from concurrent.futures import CancelledError

import pytest
import torch

import amg
import amg.engine.loop
import amg.engine.queue
from amg.engine.queue import Queue

from ..integrations.conftest import embedder, embedding_index, sd  # noqa: F401

WAIT = 60
OFF = amg.AMGConfig.preset("off", on_memorized="flag")


class Calls:
    """The rows of every call of the U-Net; runs `at[number of the call]` in it."""

    def __init__(self, pipe):
        self.rows, self.at = [], {}
        pipe.unet.register_forward_hook(self.after)

    def after(self, module, inputs, output):
        self.rows.append(len(output[0]))
        self.at.pop(len(self.rows), lambda: None)()


@pytest.fixture
def sampler(sd, embedding_index):  # noqa: F811
    made = []

    def make(**options):
        made.append(amg.Sampler(sd, embedding_index, OFF, **options))
        made[-1].calls = Calls(sd)
        return made[-1]

    yield make
    for one in made:
        one.close(cancel=True)


def request(steps=3, images=1, **more):
    options = {"guidance_scale": 1.0, "output_type": "latent", "num_images_per_prompt": images, "seed": 1}
    return amg.Request("abc", num_inference_steps=steps, **{**options, **more})


def held(sampler, at=1):
    """(event that lets the U-Net's call `at` end, event that says it has begun)."""
    entered, release = threading.Event(), threading.Event()

    def hold():
        entered.set()
        assert release.wait(WAIT)

    sampler.calls.at[at] = hold
    return release, entered


@pytest.mark.parametrize(("name", "value"), [("max_batch", 0), ("max_pending", -1)])
def test_bounds_are_named(name, value):
    options = {"max_batch": 1, "max_pending": 1, name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be >= 1, got {value}"):
        Queue(options["max_batch"], options["max_pending"])


def test_requests_are_admitted_whole_in_their_order_as_there_is_room(sampler):
    """Room for 4: 2 and 1 run, 2 more wait, and the 1 behind them does not pass them by."""
    one = sampler(max_batch=4)
    release, entered = held(one)
    futures = [one.submit(request(4, 2))]
    assert entered.wait(WAIT)
    futures += [one.submit(request(2, 1)), one.submit(request(2, 2)), one.submit(request(1, 1))]
    release.set()
    assert [len(future.result(WAIT).amg) for future in futures] == [2, 1, 2, 1]
    assert one.calls.rows == [2, 3, 3, 4, 3], "2; 2+1 twice; then 2+2; then 2+1"


def test_a_request_larger_than_the_batch_runs_alone(sampler):
    one = sampler(max_batch=2)
    release, entered = held(one)
    futures = [one.submit(request(2, 1))]
    assert entered.wait(WAIT)
    futures += [one.submit(request(2, 5)), one.submit(request(2, 1))]
    release.set()
    assert [len(future.result(WAIT).amg) for future in futures] == [1, 5, 1]
    assert one.calls.rows == [1, 1, 5, 5, 1, 1]


def test_no_call_is_of_more_images_than_there_is_room_for(sampler):
    one = sampler(max_batch=5)
    futures = [one.submit(request(1 + at % 4, 1 + at % 3)) for at in range(20)]
    assert [len(future.result(WAIT).amg) for future in futures] == [1 + at % 3 for at in range(20)]
    assert max(one.calls.rows) <= 5 and sum(one.calls.rows) == sum(
        (1 + at % 4) * (1 + at % 3) for at in range(20)
    )


def test_a_full_queue_refuses_or_waits(sampler):
    one = sampler(max_batch=1, max_pending=1)
    release, entered = held(one)
    futures = [one.submit(request())]
    assert entered.wait(WAIT)
    futures.append(one.submit(request()))
    start = time.monotonic()
    with pytest.raises(queue.Full, match=r"1 requests wait already \(`max_pending`\)"):
        one.submit(request(), block=False)
    with pytest.raises(queue.Full):
        one.submit(request(), timeout=0.05)
    assert 0.05 <= time.monotonic() - start < WAIT / 2
    futures[1].cancel()
    futures.append(one.submit(request(), timeout=WAIT))
    release.set()
    assert futures[0].result(WAIT).amg and futures[2].result(WAIT).amg and futures[1].cancelled()


def test_cancelled_while_it_waits_and_while_it_runs(sampler):
    one = sampler(max_batch=1)
    release, entered = held(one, 2)
    running, waiting, last = (one.submit(request(6)) for _ in range(3))
    assert entered.wait(WAIT)
    assert waiting.cancel() and running.cancel() and running.cancel() is not None
    release.set()
    assert last.result(WAIT).amg
    for future in (running, waiting):
        with pytest.raises(CancelledError):
            future.result(WAIT)
    assert one.calls.rows == [1] * (2 + 6), "the running one left at the next step"
    assert not last.cancel() and last.done()


def test_a_deadline_that_passes_while_it_waits(sampler, monkeypatch):
    clock = types.SimpleNamespace(now=10.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    for module in ("queue", "loop", "finish", "sampler"):
        monkeypatch.setattr(f"amg.engine.{module}.time", fake)
    one = sampler(max_batch=1)
    release, entered = held(one)
    first = one.submit(request())
    assert entered.wait(WAIT)
    late, kept = one.submit(request(deadline=5)), one.submit(request(deadline=50))
    clock.now = 15.5
    release.set()
    with pytest.raises(TimeoutError, match="`deadline` has passed"):
        late.result(WAIT)
    assert first.result(WAIT).amg and kept.result(WAIT).amg and one.calls.rows == [1] * 6


def test_close_waits_for_all_and_takes_no_more(sampler):
    one = sampler(max_batch=1)
    futures = [one.submit(request()) for _ in range(3)]
    one.close()
    assert all(future.done() and not future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="no request can be submitted after `close`"):
        one.submit(request())
    assert one("abc", num_inference_steps=1, output_type="latent", progress=False).amg, "calls go on"


def test_close_with_cancel_leaves_at_the_next_step(sampler):
    one = sampler(max_batch=1)
    release, entered = held(one)
    futures = [one.submit(request(500)) for _ in range(3)]
    assert entered.wait(WAIT)
    release.set()
    one.close(cancel=True)
    assert all(future.cancelled() for future in futures) and len(one.calls.rows) < 10


def test_a_request_waiting_for_room_is_refused_when_the_queue_closes(sampler):
    one = sampler(max_batch=1, max_pending=1)
    release, entered = held(one)
    one.submit(request())
    assert entered.wait(WAIT)
    one.submit(request())
    found = []

    def blocked():
        try:
            one.submit(request())
        except RuntimeError as error:
            found.append(str(error))

    client = threading.Thread(target=blocked)
    client.start()
    closing = threading.Thread(target=one.close)
    closing.start()
    client.join(WAIT)
    assert found == ["no request can be submitted after `close`"]
    release.set()
    closing.join(WAIT)
    assert not closing.is_alive()


def test_inside_paused_nothing_runs_and_after_it_all_do(sampler):
    one = sampler()
    release, entered = held(one)
    first = one.submit(request())
    assert entered.wait(WAIT)
    inside, leave = threading.Event(), threading.Event()

    def pause():
        with one.paused():
            assert first.done(), "what ran was finished first"
            inside.set()
            assert leave.wait(WAIT)

    pausing = threading.Thread(target=pause)
    pausing.start()
    release.set()
    assert inside.wait(WAIT)
    made = len(one.calls.rows)
    later = [one.submit(request()) for _ in range(2)]
    threading.Event().wait(0.1)
    assert len(one.calls.rows) == made == 3 and not any(future.done() for future in later)
    leave.set()
    assert all(future.result(WAIT).amg for future in later)
    pausing.join(WAIT)


def test_a_changed_pipeline_serves_new_requests_when_the_old_ones_are_done(sampler, sd):  # noqa: F811
    """Another U-Net while one runs: no call of one has rows of both, each gets its own network's picture."""
    import copy

    one = sampler()
    before = one.submit(request()).result(WAIT).images
    other = copy.deepcopy(sd.unet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    old, order = sd.unet, []
    one.calls.rows.clear()
    release, entered = held(one)
    first = one.submit(request())
    assert entered.wait(WAIT)
    sd.unet = other
    other.register_forward_hook(lambda *_: order.append(first.done()))
    second = one.submit(request())
    release.set()
    assert torch.equal(first.result(WAIT).images, before)
    changed = second.result(WAIT).images
    assert order == [True] * 3 and (changed - before).abs().max() > 0.05
    sd.unet = old
    assert torch.equal(one.submit(request()).result(WAIT).images, before)


def test_one_thread_serves_a_sampler_and_ends_with_it(sampler):
    """What cuDNN keeps is a thread's own: a second call finds what the first one made."""
    one, threads = sampler(), set()
    for _ in range(2):
        assert one.submit(request()).result(WAIT).amg
        assert one("abc", num_inference_steps=2, progress=False, output_type="latent").amg
        threads.add(one._queue._thread)
    (thread,) = threads
    one.close()
    assert not thread.is_alive() and one._queue._thread is None


def test_a_sampler_that_nobody_holds_ends_its_thread_once_its_requests_are_done(sd, embedding_index):  # noqa: F811
    one = amg.Sampler(sd, embedding_index, OFF)
    future = one.submit(request())
    thread, gone = one._queue._thread, weakref.ref(one)
    del one
    assert future.result(WAIT).amg
    del future
    gc.collect()
    thread.join(WAIT)
    assert gone() is None and not thread.is_alive()


def test_a_callback_that_raises_is_its_caller_s_trouble(sampler, caplog):
    one = sampler()
    first, second = one.submit(request()), one.submit(request(6))
    first.add_done_callback(lambda future: 1 / 0)
    assert first.result(WAIT).amg and second.result(WAIT).amg
    assert one.submit(request()).result(WAIT).amg


def test_a_callback_may_submit_and_close(sampler):
    """On the engine's own thread."""
    one, later = sampler(), []
    done = threading.Event()

    def again(future):
        later.append(one.submit(request()))
        one.close()
        done.set()

    one.submit(request()).add_done_callback(again)
    assert done.wait(WAIT) and later[0].result(WAIT).amg


def test_a_fault_of_the_engine_itself_ends_its_requests_with_it(sampler, monkeypatch):
    """Nobody waits for ever, and the next request is served."""
    one = sampler()
    with monkeypatch.context() as patch:

        def broken(slots):
            raise KeyboardInterrupt("not an Exception")

        patch.setattr(amg.engine.loop, "step", broken)
        first, second = one.submit(request()), one.submit(request())
        for future in (first, second):
            with pytest.raises(RuntimeError, match="the engine stopped"):
                future.result(WAIT)
    assert one.submit(request()).result(WAIT).amg
