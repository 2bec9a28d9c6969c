"""Requests that meet in shared calls: who joins when, what ends a request, and that nobody else notices.

A request of its own holds the engine inside a shared call while the others are submitted, so that they start
together.
"""

import os
import queue
import subprocess
import sys
import threading
import types
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass

import pytest
import torch

import amg.engine.batching
from amg.engine.batching import Batcher

WAIT = 30  # seconds after which a test is considered hung


@dataclass(frozen=True)
class Sizes:
    """Says that it can be hashed and cannot."""

    values: list


class Network:
    """row -> row + 1; remembers the rows of every call and runs `at[number of the call]`."""

    def __init__(self):
        self.calls, self.at, self.threads = [], {}, []

    def __call__(self, sample):
        self.calls.append(sample.flatten().tolist())
        self.threads.append(threading.current_thread())
        self.at.pop(len(self.calls), lambda: None)()
        if (sample < -1e6).any():
            raise ArithmeticError("minus a million")
        return sample + 1

    @property
    def sizes(self):
        return [len(call) for call in self.calls]


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def serve():
    """Makes batchers, and sees to it that no test leaves a thread behind."""
    made = []

    def make(max_images=16, max_pending=64):
        made.append(Batcher(max_images, max_pending))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close(cancel=True)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("amg ")]
    assert not left


@torch.no_grad()
def repeat(shared, start, steps, rows=1):
    sample = torch.full((rows, 1), float(start))
    for _ in range(steps):
        sample = shared(sample)
    return sample.flatten().tolist()


class Held:
    """A request that keeps the engine busy until `release`."""

    def __init__(self, batcher):
        self.entered, self.go = threading.Event(), threading.Event()
        shared = batcher.share(self.hold)
        with torch.no_grad():
            self.future = batcher.submit(torch.no_grad()(lambda: shared(torch.zeros(1))))
        assert self.entered.wait(WAIT)

    def hold(self, sample):
        self.entered.set()
        assert self.go.wait(WAIT)
        return sample

    def release(self):
        self.go.set()


def submit(batcher, shared, start, steps, rows=1, **more):
    return batcher.submit(lambda: repeat(shared, start, steps, rows), rows, **more)


def test_requests_share_calls_and_leave_when_they_are_done(serve, network):
    batcher = serve()
    held, shared = Held(batcher), batcher.share(network, patient=True)
    futures = [submit(batcher, shared, 10 * i, steps, rows=2) for i, steps in enumerate((1, 4, 2))]
    held.release()
    assert [future.result(WAIT) for future in futures] == [[1.0] * 2, [14.0] * 2, [22.0] * 2]
    assert network.calls == [
        [0.0, 0.0, 10.0, 10.0, 20.0, 20.0],
        [11.0, 11.0, 21.0, 21.0],
        [12.0, 12.0],
        [13.0, 13.0],
    ]
    assert len({thread.ident for thread in network.threads}) == 1


def test_a_late_request_joins_at_the_next_step(serve, network):
    batcher = serve()
    shared, late = batcher.share(network, patient=True), []
    network.at[2] = lambda: late.append(submit(batcher, shared, 50, 3))
    early = submit(batcher, shared, 0, 4)
    assert early.result(WAIT) == [4.0]
    assert late[0].result(WAIT) == [53.0]
    assert network.calls == [[0.0], [1.0], [2.0, 50.0], [3.0, 51.0], [52.0]]


def test_at_most_max_images_first_come_first_served(serve, network):
    batcher = serve(max_images=3)
    held, shared = Held(batcher), batcher.share(network, patient=True)
    sizes = (2, 2, 1, 5, 1)
    futures = [submit(batcher, shared, 10 * i, 2, rows) for i, rows in enumerate(sizes)]
    held.release()
    assert [future.result(WAIT) for future in futures] == [[10.0 * i + 2] * n for i, n in enumerate(sizes)]
    # 2 alone, as 2 + 2 are too many; then 2 + 1; five only when nobody else runs; then the last
    assert network.sizes == [2, 2, 3, 3, 5, 5, 1, 1]


def test_patient_calls_wait_for_those_behind(serve, network):
    """Decodes, however many, do not tear the network's calls apart."""
    batcher, decoder = serve(), Network()
    held, shared = Held(batcher), batcher.share(network, patient=True)
    decode = batcher.share(decoder)

    @torch.no_grad()
    def work(decodes):
        sample = torch.zeros(1, 1)
        for step in range(3):
            sample = shared(sample)
            for _ in range(decodes if step == 1 else 0):
                decode(sample)
        return float(sample)

    futures = [batcher.submit(lambda n=n: work(n)) for n in (0, 3, 1)]
    held.release()
    assert [future.result(WAIT) for future in futures] == [3.0] * 3
    assert network.sizes == [3, 3, 3] and decoder.sizes == [2, 1, 1]


def test_the_queue_is_bounded(serve, network):
    batcher = serve(max_images=1, max_pending=2)
    held, shared = Held(batcher), batcher.share(network)
    waiting = [submit(batcher, shared, i, 1) for i in (0, 1)]
    with pytest.raises(queue.Full, match="2 requests wait already"):
        submit(batcher, shared, 2, 1, block=False)
    with pytest.raises(queue.Full):
        submit(batcher, shared, 2, 1, timeout=0.01)
    blocked = []
    thread = threading.Thread(target=lambda: blocked.append(submit(batcher, shared, 2, 1)))
    thread.start()
    held.release()
    thread.join(WAIT)
    assert [future.result(WAIT) for future in (*waiting, *blocked)] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("name", ["max_images", "max_pending"])
def test_bounds_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must be >= 1, got 0"):
        Batcher(**{"max_images": 1, "max_pending": 1, name: 0})


def test_cancelled_before_it_starts(serve, network):
    batcher = serve(max_images=1, max_pending=1)
    held, shared = Held(batcher), batcher.share(network)
    future = submit(batcher, shared, 7, 1)
    assert future.cancel()
    held.release()
    assert submit(batcher, shared, 0, 1).result(WAIT) == [1.0], "its place in the queue is free"
    assert wait([future], WAIT).done == {future} and network.calls == [[0.0]]


def test_cancelled_in_the_middle(serve, network):
    batcher = serve()
    held, shared = Held(batcher), batcher.share(network, patient=True)
    futures = [submit(batcher, shared, start, 5) for start in (0, 100)]
    network.at[2] = lambda: futures[0].cancel()
    held.release()
    with pytest.raises(CancelledError):
        futures[0].result(WAIT)
    assert futures[1].result(WAIT) == [105.0]
    assert network.sizes == [2, 2, 1, 1, 1], "its rows leave at the next step"


def test_a_result_that_is_there_cannot_be_cancelled(serve, network):
    batcher = serve()
    future = submit(batcher, batcher.share(network), 0, 1)
    future.result(WAIT)
    assert not future.cancel() and not future.cancelled()


def test_deadlines(serve, network, monkeypatch):
    """One that passes while it waits, one at the second step; who has none goes on."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(amg.engine.batching, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    batcher = serve(max_images=3)
    held, shared = Held(batcher), batcher.share(network, patient=True)
    soon = submit(batcher, shared, 0, 5, late_at=10.0)
    never = submit(batcher, shared, 100, 5)
    waits = submit(batcher, shared, 200, 1, rows=2, late_at=10.0)
    later = submit(batcher, shared, 300, 1, rows=2, late_at=11.0)
    network.at[2] = lambda: setattr(clock, "now", 10.5)
    held.release()
    for future in (soon, waits):
        with pytest.raises(TimeoutError, match="`deadline` has passed"):
            future.result(WAIT)
    assert never.result(WAIT) == [105.0] and later.result(WAIT) == [301.0, 301.0]
    assert network.sizes == [2, 2, 3, 1, 1]


def test_only_the_culprit_of_a_joined_call_fails(serve, network):
    batcher = serve()
    held, shared = Held(batcher), batcher.share(network, patient=True)
    futures = [submit(batcher, shared, start, 2) for start in (0, -1e9, 100)]
    held.release()
    with pytest.raises(ArithmeticError, match="minus a million"):
        futures[1].result(WAIT)
    assert futures[0].result(WAIT) == [2.0] and futures[2].result(WAIT) == [102.0]
    assert network.sizes == [3, 1, 1, 1, 2], "together, each alone, then the two that are left"


def test_a_joined_call_that_fails_as_such_is_said(serve):
    def narrow(sample):
        if len(sample) > 1:
            raise MemoryError("out of memory")
        return sample + 1

    batcher = serve()
    held, shared = Held(batcher), batcher.share(narrow, patient=True)
    with pytest.warns(UserWarning, match=r"a joined call of 2 rows failed.*out of memory"):
        futures = [submit(batcher, shared, start, 1) for start in (0, 100)]
        held.release()
        assert [future.result(WAIT) for future in futures] == [[1.0], [101.0]]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_what_a_request_raises_is_its_own_future_s(serve, network, error):
    batcher = serve()
    held, shared = Held(batcher), batcher.share(network, patient=True)

    def broken():
        repeat(shared, 0, 2)
        raise error

    failing, fine = batcher.submit(broken), submit(batcher, shared, 100, 4)
    held.release()
    assert failing.exception(WAIT) is error and fine.result(WAIT) == [104.0]


def test_an_argument_that_cannot_be_compared_is_its_request_s_error(serve, network):
    batcher = serve()
    held, shared = Held(batcher), batcher.share(network, patient=True)

    @torch.no_grad()
    def odd():
        return shared(torch.zeros(1, 1), sizes=Sizes([1]))

    failing, fine = batcher.submit(odd), submit(batcher, shared, 100, 2)
    held.release()
    with pytest.raises(TypeError, match="unhashable"):
        failing.result(WAIT)
    assert fine.result(WAIT) == [102.0]


def test_calls_under_autograd_and_of_others_go_straight_through(serve, network):
    batcher = serve()
    shared = batcher.share(network)
    assert float(shared(torch.zeros(1, 1))) == 1.0

    def work():
        with torch.enable_grad():
            leaf = torch.zeros(1, 1, requires_grad=True)
            (gradient,) = torch.autograd.grad(2 * shared(leaf), leaf)
        return float(gradient), threading.current_thread()

    gradient, thread = batcher.submit(work).result(WAIT)
    assert gradient == 2.0
    assert network.threads == [threading.current_thread(), thread]


def test_what_is_shared_keeps_its_attributes(serve):
    function = types.SimpleNamespace(name="photos", dimension=512)
    shared = serve().share(function)
    assert (shared.name, shared.dimension) == ("photos", 512) and not hasattr(shared, "sha")


def test_close_finishes_what_was_submitted(serve, network):
    batcher = serve(max_images=1)
    held, shared = Held(batcher), batcher.share(network)
    futures = [submit(batcher, shared, i, 2) for i in range(3)]
    held.release()
    batcher.close()
    assert [future.result(0) for future in futures] == [[2.0], [3.0], [4.0]]
    with pytest.raises(RuntimeError, match="after `close`"):
        submit(batcher, shared, 0, 1)
    batcher.close()


def test_close_with_cancel(serve, network):
    """What runs ends at its next step, what waits never starts, and who is blocked in `submit` is told."""
    batcher = serve(max_images=2, max_pending=1)
    held, shared = Held(batcher), batcher.share(network)
    running, refused, full = submit(batcher, shared, 0, 10**9), [], threading.Event()
    network.at[1] = lambda: full.set() if not full.wait(WAIT) else None
    held.release()
    assert held.future.result(WAIT) is not None
    waiting = submit(batcher, shared, 100, 1, rows=2)

    def blocked():
        with pytest.raises(RuntimeError, match="after `close`") as caught:
            submit(batcher, shared, 0, 1)
        refused.append(caught)

    thread = threading.Thread(target=blocked)
    thread.start()
    full.set()
    batcher.close(cancel=True)
    thread.join(WAIT)
    assert running.cancelled() and waiting.cancelled() and len(refused) == 1
    assert [100.0, 100.0] not in network.calls


def test_a_done_callback_may_submit_even_to_a_full_queue(serve, network):
    batcher = serve(max_images=1, max_pending=1)
    held, shared = Held(batcher), batcher.share(network)
    again, seen = [], threading.Event()

    def callback(future):
        again.append(submit(batcher, shared, future.result()[0], 1, timeout=WAIT))
        seen.set()

    submit(batcher, shared, 0, 1).add_done_callback(callback)
    held.release()
    last = submit(batcher, shared, 50, 3)
    assert seen.wait(WAIT) and again[0].result(WAIT) == [2.0] and last.result(WAIT) == [53.0]


def test_threads_end_with_the_last_request_and_start_again(serve, network):
    batcher = serve()
    shared = batcher.share(network)
    for start in (0, 10):
        assert submit(batcher, shared, start, 1).result(WAIT) == [start + 1.0]
        for thread in threading.enumerate():
            if thread.name.startswith("amg "):
                thread.join(WAIT)
                assert not thread.is_alive()


ENDLESS = """
import torch
from amg.engine.batching import Batcher
batcher = Batcher(2, 8)
started = __import__("threading").Event()
def network(sample):
    started.set()
    return sample + 1
shared = batcher.share(network)
@torch.no_grad()
def endless():
    sample = torch.zeros(1)
    while True:
        sample = shared(sample)
futures = [batcher.submit(endless) for _ in range(4)]
assert started.wait(30)
print("leaving")
"""


def test_the_interpreter_can_end_while_requests_run():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", ENDLESS], capture_output=True, text=True, timeout=120, env=environment
    )
    assert ran.returncode == 0 and ran.stdout == "leaving\n" and "Error" not in ran.stderr, ran.stderr
