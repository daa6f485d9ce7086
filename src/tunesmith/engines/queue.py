"""Those that wait for one of an engine's places: callers take turns, so many may wait, and none for too long."""

from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from tunesmith.engines.admission import Admission
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.turns import Turns
from tunesmith.errors import ApiError, ResourceExhausted


class Waiting(Protocol):
    """Something that waits.

    Attributes:
        caller: Whose it is.
        since: When it came, in seconds of the admission's clock.
        begun: When its turn came.
    """

    caller: str
    since: float
    begun: float

    def leave(self) -> bool:
        """Return whether it has ended or nobody waits for it."""

    def end(self, event: ApiError, /) -> None:
        """Say how it ended."""


_Item = TypeVar("_Item", bound=Waiting)


class Queue(Generic[_Item]):
    """What waits for a place. Not safe to share between threads.

    Args:
        places: How many may be under way together.
        admission: Which may wait.
        metrics: What is told of them.
        model: Id of the base model, for the metrics.
    """

    def __init__(self, places: int, admission: Admission, metrics: EngineMetrics, model: str) -> None:
        self._places, self._admission = places, admission
        self._metrics, self._model = metrics, model
        self._turns: Turns[_Item] = Turns()

    def let_in(self, caller: str, under_way: int, others: int = 0) -> None:
        """Make sure that one more of a caller's may wait.

        Where the queue is full, who has most waiting gives up the last of it for somebody who has less.

        Args:
            caller: Who wants to wait.
            under_way: How many have a place.
            others: How many wait elsewhere and count, too.

        Raises:
            ResourceExhausted: It may not.
        """
        free = max(self._places - under_way, 0)
        waiting = max(len(self._turns) - free, 0) + others
        try:
            ahead = self._turns.ahead(caller) - free
            if ahead >= 0:
                self._admission.check(ahead, under_way)
        except ResourceExhausted:
            self._refused("too_long")
            raise
        if waiting and self._admission.full(waiting):
            self._refused("queue_full")
            error, given_up = self._admission.refuse(under_way), self._turns.give_up(caller)
            if given_up is None:
                raise error
            given_up.end(error)

    def add(self, item: _Item) -> None:
        """Put one behind those of the same caller."""
        item.since = self._admission.now()
        self._turns.add(item.caller, [item])

    def drop(self, under_way: int) -> None:
        """Drop those that nobody waits for, and end those that have waited for too long."""
        self._turns.keep(lambda item: self._stays(item, under_way))

    def next(self, held: Mapping[str, int]) -> _Item | None:
        """Return the one whose turn it is; None when nothing waits.

        Args:
            held: How many places each caller has: who has fewest comes first.
        """
        turn = self._turns.next(held)
        return turn[1] if turn else None

    def take(self, item: _Item) -> None:
        """Take out the one whose turn it is; all others then come before the same caller's next."""
        self._turns.take(item.caller)
        item.begun = self._admission.now()
        self._metrics.wait.labels(self._model).observe(item.begun - item.since)

    def ended(self, item: _Item) -> None:
        """Learn from one that had a place and has left it how long that took."""
        self._admission.ended(self._admission.now() - item.begun)

    def _stays(self, item: _Item, under_way: int) -> bool:
        if item.leave():
            self._refused("gone")
            return False
        if self._admission.late(item.since):
            self._refused("overdue")
            item.end(self._admission.overdue(under_way))
            return False
        return True

    def _refused(self, reason: str) -> None:
        self._metrics.refused.labels(self._model, reason).inc()

    def __iter__(self) -> Iterator[_Item]:
        return iter(self._turns)

    def __len__(self) -> int:
        return len(self._turns)
