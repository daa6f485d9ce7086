"""The places that a server has for answers which are computed there, given to callers by turns."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tunesmith.engines.admission import Admission, closing
from tunesmith.engines.leavers import Leavers
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.queue import Queue
from tunesmith.errors import ApiError, Cancelled


class Places:
    """So many requests may be at the server; the next ones wait here, where it is known whose they are.

    Args:
        count: How many.
        admission: Which may wait.
        metrics: What is told of them.
        model: Id of the base model, for the metrics.
    """

    def __init__(self, count: int, admission: Admission, metrics: EngineMetrics, model: str) -> None:
        self._count, self._admission = count, admission
        self._metrics, self._model = metrics, model
        self._queue: Queue[_Place] = Queue(count, admission, metrics, model)
        self._held: Counter[str] = Counter()
        """How many places each caller has."""
        self._calls: set[threading.Event] = set()
        """What is set when the client leaves, of each call that has a place."""
        self._lock = threading.Lock()
        self._leavers = Leavers()

    @contextmanager
    def held(self, caller: str, gone: threading.Event) -> Iterator[None]:
        """Wait for a place, and keep it until the block is left.

        A call has one place, whatever it asks meanwhile: its safety rater would wait for the answer that it rates.

        Args:
            caller: The account that asks.
            gone: The call's, set when its client has left.

        Raises:
            ResourceExhausted: Too many wait, or this one would for too long.
            Cancelled: `gone` was set.
            Unavailable: Its turn did not come in time, or the engine is closing.
        """
        with self._lock:
            within = gone in self._calls
        if within:
            yield
        else:
            with self._taken(_Place(caller, gone)):
                yield

    @contextmanager
    def _taken(self, place: "_Place") -> Iterator[None]:
        with self._lock:
            if self._leavers.closed:
                raise closing()
            self._queue.let_in(place.caller, self._held.total())
            self._queue.add(place)
            self._give()
        try:
            with self._leavers.watched(place.gone, place.come.set):
                self._wait(place)
            yield
        finally:
            with self._lock:
                if place.given:
                    self._queue.ended(place)
                    self._calls.discard(place.gone)
                    self._held -= Counter([place.caller])
                else:
                    place.end(Cancelled("Nobody waits for it."))  # it gets none later, whatever ended the wait
                self._give()

    def close(self) -> None:
        """End those that wait."""
        self._leavers.close()

    def _wait(self, place: "_Place") -> None:
        """Return when a place is given; raise the error with which it is not."""
        while not place.given:
            place.come.wait(self._admission.seconds)
            with self._lock:
                if self._leavers.closed and not place.given:
                    place.end(closing())
                self._queue.drop(self._held.total())
            if place.error:
                raise place.error

    def _give(self) -> None:
        """Give the places that are free; the lock is held."""
        self._queue.drop(self._held.total())
        while self._held.total() < self._count and (place := self._queue.next(self._held)):
            self._queue.take(place)
            self._held[place.caller] += 1
            self._calls.add(place.gone)
            place.given = True
            place.come.set()
        self._metrics.waiting.labels(self._model).set(len(self._queue))
        self._metrics.under_way.labels(self._model).set(self._held.total())


@dataclass(eq=False)
class _Place:
    """What a request waits for.

    Attributes:
        come: Set when it is given, or never will be.
    """

    caller: str
    gone: threading.Event
    since: float = 0.0
    begun: float = 0.0
    given: bool = False
    error: ApiError | None = None
    come: threading.Event = field(default_factory=threading.Event)

    def leave(self) -> bool:
        if self.gone.is_set():
            self.end(Cancelled("The client went away."))
        return self.error is not None

    def end(self, error: ApiError) -> None:
        self.error = self.error or error
        self.come.set()
