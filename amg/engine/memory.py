"""Prompts whose samples were sent back before: their next samples start as later tries do."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from amg.guidance.flight import Flight


class PromptMemory:
    """The last `size` prompts, each with how it is run, whose samples were sent back, and the ordinary
    caption that they went to. It makes a sample depend on earlier requests, so it holds nothing unless asked
    for."""

    def __init__(self, size: int):
        self.size = size
        self._captions: OrderedDict[tuple[str, Hashable], str] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._captions)

    def remember(self, flight: Flight, run: Hashable) -> None:
        """Keep what a finished sample's later tries were conditioned on."""
        if not self.size or flight.prompt is None or flight.caption is None or flight.remembered:
            return
        with self._lock:
            self._captions[flight.prompt, run] = flight.caption
            self._captions.move_to_end((flight.prompt, run))
            while len(self._captions) > self.size:
                self._captions.popitem(last=False)

    def recall(self, flights: Sequence[Flight], run: Hashable, until: int) -> None:
        """Give samples of remembered prompts the caption and the scale of a later try, the scale up to step
        `until`."""
        if not self.size:
            return
        with self._lock:
            for flight in flights:
                caption = None if flight.prompt is None else self._captions.get((flight.prompt, run))
                if caption is not None:
                    self._captions.move_to_end((str(flight.prompt), run))
                    flight.caption, flight.remembered = caption, True
                    flight.rewinds, flight.despecified_until = 1, until
