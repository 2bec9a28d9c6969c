"""Who comes next: requests wait here, and the engine's thread runs those there is room for."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator

from amg.engine.job import Job
from amg.engine.loop import Engine
from amg.kernels import release_threads

POLL = 1.0  # seconds between looks at the deadlines of requests that wait while none may run


class Queue:
    """Runs requests, at most `max_images` images at the same time; at most `max_pending` requests wait.

    A request of more images than that runs when no other does. One thread, from the first request until
    `close` or `abandon`: cuDNN keeps its plans of convolutions by thread, and a new thread would make them
    all again. Errors: ValueError naming the argument.
    """

    def __init__(self, max_images: int, max_pending: int):
        for name, value in (("max_batch", max_images), ("max_pending", max_pending)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer >= 1, got {value!r}")
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}")
        self.max_images, self.max_pending = max_images, max_pending
        self._changed = threading.Condition()  # guards all that follows
        self._pending: deque[Job] = deque()
        self._active: list[Job] = []
        self._thread: threading.Thread | None = None
        self._held, self._closed, self._ended = 0, False, False

    def submit(self, job: Job, block: bool = True, timeout: float | None = None) -> None:
        """Queue a request.

        Where `max_pending` wait already: waits for room, at most `timeout` seconds, then `queue.Full`, at
        once with block=False.
        """
        release_threads()  # of the caller's own computing: the engine's are to be the only ones
        with self._changed:
            room = self._changed.wait_for(
                lambda: self._shuts_out(job) or self._waiting < self.max_pending, timeout if block else 0
            )
            if self._shuts_out(job):
                raise RuntimeError("no request can be submitted after `close`")
            if not room:
                raise queue.Full(f"{self.max_pending} requests wait already (`max_pending`)")
            self._pending.append(job)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="amg engine", daemon=True)
                self._thread.start()
                atexit.register(self.close, cancel=True)
            self._changed.notify_all()
        job.future.add_done_callback(self._wake)

    @property
    def _waiting(self) -> int:
        """Requests that wait; a cancelled one gives its place up at once, whatever is being computed."""
        return sum(not job.future.done() for job in self._pending)

    def _shuts_out(self, job: Job) -> bool:
        return self._closed and not job.called

    def close(self, cancel: bool = False) -> None:
        """Take no more submissions; return when all are done, or with `cancel` cancelled."""
        with self._changed:
            self._closed, thread = True, self._thread
            if cancel:
                for job in (*self._pending, *self._active):
                    job.future.cancel()
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()  # not killed in the middle of something when the interpreter ends

    def abandon(self) -> None:
        """Nobody can submit any more: the thread ends once what is queued is done. Does not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is in flight inside: requests that run are finished first, others wait until after."""
        with self._changed:
            self._held += 1
            self._changed.wait_for(lambda: not self._active)
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._changed.notify_all()

    def _wake(self, future: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _serve(self) -> None:
        engine = Engine()
        while (new := self._next(engine)) is not None:
            try:
                for job in new:
                    engine.admit(job)
                engine.turn()
            except BaseException as error:  # a fault of the engine, or a caller's callback that ends threads
                engine = Engine()
                for job in tuple(self._active):
                    job.fail(RuntimeError(f"the engine stopped at a fault of its own: {error!r}"))

    def _next(self, engine: Engine) -> list[Job] | None:
        """The requests to start now, once there are any or some run; None where the thread is to end."""
        with self._changed:
            while True:
                self._let_go(engine)
                new = self._fitting(engine)
                if new or self._active:
                    self._active += new
                    self._changed.notify_all()
                    return new
                release_threads()  # of the engine's computing: others may want the cores
                if self._closed and not self._pending:
                    self._thread = None
                    atexit.unregister(self.close)
                    self._changed.notify_all()
                    return None
                self._changed.wait(POLL if self._pending else None)

    def _fitting(self, engine: Engine) -> list[Job]:
        """The requests, first come first served, that there is room for beside those in flight."""
        new: list[Job] = []
        busy, owners = engine.busy, {job.owner for job in self._active}
        while self._pending and not self._held:
            job = self._pending[0]
            beside = self._active or new
            if beside and (busy + len(job) > self.max_images or job.owner not in owners):
                break
            new.append(self._pending.popleft())
            busy, owners = busy + len(job), owners | {job.owner}
        return new

    def _let_go(self, engine: Engine) -> None:
        """Forget requests that are over, cancelled or late."""
        now, jobs = time.monotonic(), (*self._pending, *self._active)
        for job in jobs:
            if now > job.late_at:
                job.fail(TimeoutError("the request's `deadline` has passed"))
        if not self._ended:
            return
        self._ended = False
        if over := {job for job in jobs if job.future.done()}:
            for job in over:
                job.claim()
            self._pending = deque(job for job in self._pending if job not in over)
            self._active = [job for job in self._active if job not in over]
            engine.forget(over)
            self._changed.notify_all()
