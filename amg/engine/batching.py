"""Continuous batching: requests run at the same time, and their calls of a network are made as one.

A request is an ordinary function on a thread of its own, which knows nothing of the others. One thread
computes at a time: the engine gives the turn to each request, in the order of their arrival, and gets it back
when the request asks for a shared call or ends. When no request can go on, the engine makes the calls they
wait for, joined (`amg.engine.joining`), and hands out the results. So requests meet at every step, whichever
step of their own that is, and join and leave between steps; no timer decides what is worth waiting for.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amg.engine.joining import Call, together
from amg.kernels import release_threads


def _taken() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class Job:
    """One request: its `work`, how many `images` it computes at once, when it is late (time.monotonic), and
    where it stands. It waits for the answer to `call`, or where that is None for its turn; `thrown` is raised
    in it at its next turn."""

    work: Callable[[], Any]
    images: int
    late_at: float
    future: Future
    call: Call | None = None
    patient: bool = False
    answer: Any = None
    thrown: BaseException | None = None
    ended: bool = False
    turn: threading.Lock = field(default_factory=_taken)

    def due(self) -> BaseException | None:
        """Why the request is not to go on, if so."""
        if self.future.cancelled():
            return CancelledError()
        if time.monotonic() > self.late_at:
            return TimeoutError("the request's `deadline` has passed")
        return None


class Shared:
    """`function`, whose calls by requests of a `Batcher` are joined; anybody else's, and calls under autograd
    (whose graph belongs to one request), go straight through. Its other attributes are the function's."""

    def __init__(self, function: Callable[..., Tensor], batcher: Batcher, patient: bool):
        self.function, self.batcher, self.patient = function, batcher, patient

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        job = self.batcher.current()
        if job is None or torch.is_grad_enabled():
            return self.function(*arguments, **keywords)
        return self.batcher.ask(job, Call(self.function, arguments, keywords), self.patient)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "function":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.function, name)


class Batcher:
    """Runs requests, at most `max_images` images at the same time, the rest in a queue of `max_pending`
    requests.

    A request of more images than that runs when no other does. Threads exist only while there are requests.
    Errors: ValueError naming the argument.
    """

    def __init__(self, max_images: int, max_pending: int):
        for name, value in (("max_images", max_images), ("max_pending", max_pending)):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}")
        self.max_images, self.max_pending = max_images, max_pending
        self._changed = threading.Condition()  # guards the next five
        self._pending: list[Job] = []
        self._active: list[Job] = []
        self._threads: list[threading.Thread] = []
        self._engine: threading.Thread | None = None
        self._closed = False
        self._turn_back = _taken()
        self._here = threading.local()

    def share(self, function: Callable[..., Tensor], patient: bool = False) -> Any:
        """`function` for use by requests: `Shared`. Calls of `patient` ones wait until every request has one,
        which makes them large; the others' go first, whenever no request can go on without."""
        return Shared(function, self, patient)

    def submit(
        self,
        work: Callable[[], Any],
        images: int = 1,
        late_at: float = float("inf"),
        block: bool = True,
        timeout: float | None = None,
    ) -> Future:
        """Queue `work` -> the future of its result.

        Where `max_pending` requests wait already: waits for room, at most `timeout` seconds, then
        `queue.Full`, at once with block=False. `future.cancel()` succeeds until the result is there. A
        request that is cancelled, or late after `late_at`, ends at its next shared call. RuntimeError once
        closed.
        """
        job = Job(work, images, late_at, Future())
        release_threads()  # of the caller's own computing: the engine's are to be the only ones
        with self._changed:
            room = self._changed.wait_for(
                lambda: self._closed or len(self._pending) < self.max_pending, timeout if block else 0
            )
            if self._closed:
                raise RuntimeError("no request can be submitted after `close`")
            if not room:
                raise queue.Full(f"{self.max_pending} requests wait already (`max_pending`)")
            if self._engine is None:
                self._engine = threading.Thread(target=self._serve, name="amg batching", daemon=True)
                self._engine.start()
                atexit.register(self.close, cancel=True)
            thread = threading.Thread(target=self._run, args=(job,), name="amg request", daemon=True)
            thread.start()
            self._threads = [*(other for other in self._threads if other.is_alive()), thread]
            self._pending.append(job)
        return job.future

    def close(self, cancel: bool = False) -> None:
        """Take no more requests; return when all are done, or with `cancel` cancelled."""
        with self._changed:
            self._closed = True
            jobs, threads, engine = [*self._pending, *self._active], self._threads, self._engine
            self._changed.notify_all()
        if cancel:
            for job in jobs:
                job.future.cancel()
        for thread in threads if engine is None else [engine, *threads]:
            thread.join()

    def current(self) -> Job | None:
        """The request that this thread runs."""
        return getattr(self._here, "job", None)

    def ask(self, job: Job, call: Call, patient: bool) -> Tensor:
        """Wait, inside a request, for the result of a joined call."""
        hash(call.key())  # an argument that cannot be compared is this request's own error
        job.call, job.patient = call, patient
        release_threads()
        self._turn_back.release()
        job.turn.acquire()
        if job.thrown is not None:
            raise job.thrown
        answer, job.answer = job.answer, None
        return answer

    def _run(self, job: Job) -> None:
        result, error = None, None
        job.turn.acquire()
        self._here.job = job
        try:
            if job.thrown is not None:
                raise job.thrown
            result = job.work()
        except BaseException as caught:  # whatever it is, it is the future's
            error = caught
        self._here.job = None
        job.ended = True
        self._turn_back.release()  # first: what a done callback does holds nobody up
        if not job.future.set_running_or_notify_cancel():
            return
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)

    def _serve(self) -> None:
        while self._admit():
            if not self._take_turns():
                self._answer()

    def _take_turns(self) -> bool:
        """Let every request that can go on do so, and tell those that are due; whether any left or is to
        leave, so that others may take its place before the next call."""
        for job in self._active:
            if job.call is None:
                job.turn.release()
                self._turn_back.acquire()
        going_on = [job for job in self._active if not job.ended]
        left = len(going_on) < len(self._active)
        with self._changed:
            self._active = going_on
        for job in going_on:
            job.thrown = job.due()
            if job.thrown is not None:
                job.call, left = None, True
        return left

    def _admit(self) -> bool:
        """Start the requests there is room for, first come first served, and end those that are due; False,
        and no engine any more, where there are none at all."""
        with self._changed:
            busy = sum(job.images for job in self._active)
            waiting: list[Job] = []
            for job in self._pending:
                job.thrown = job.due()
                fits = not waiting and (busy == 0 or busy + job.images <= self.max_images)
                if job.thrown is not None or fits:
                    self._active.append(job)
                    busy += job.images if job.thrown is None else 0
                else:
                    waiting.append(job)
            self._pending = waiting
            self._changed.notify_all()
            if not self._active:
                self._engine = None
                atexit.unregister(self.close)
            return bool(self._active)

    def _answer(self) -> None:
        """Make the calls that are waited for: those of impatient functions, else, all requests being there,
        the patient ones'."""
        hasty = [job for job in self._active if not job.patient]
        groups: dict[Hashable, list[Job]] = {}
        for job in hasty or self._active:
            assert job.call is not None
            groups.setdefault(job.call.key(), []).append(job)
        for group in groups.values():
            _answer_together(group)


def _answer_together(jobs: list[Job]) -> None:
    """Make one group's joined call. Where it fails each request's part is made alone, and what fails then is
    thrown into that request only."""
    calls = [job.call for job in jobs if job.call is not None]
    answers: list[Tensor | None]
    try:
        answers = [*together(calls)]
    except Exception as error:
        joint: Exception = error
        answers = [None] * len(jobs)
    for job, call, answer in zip(jobs, calls, answers, strict=True):
        job.call, job.answer = None, answer
        if answer is None:
            job.thrown = joint if len(jobs) == 1 else _answer_alone(job, call)
    if len(jobs) > 1 and answers[0] is None and not any(job.thrown for job in jobs):
        rows = sum(call.rows for call in calls)
        warnings.warn(
            f"a joined call of {rows} rows failed, though none of its {len(jobs)} parts failed alone: "
            f"{joint!r}",
            stacklevel=2,
        )


def _answer_alone(job: Job, call: Call) -> Exception | None:
    try:
        (job.answer,) = together([call])
    except Exception as error:
        return error
    return None
