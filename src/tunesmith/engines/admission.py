"""Whether one more answer may wait for its turn, or is better refused at once."""

import math
import time
from collections.abc import Callable
from threading import Lock

from tunesmith import protos
from tunesmith.errors import ResourceExhausted, Unavailable

LATEST = 0.1
"""Of how long answers take: the weight of the one that has ended last."""


class Admission:
    """The bounds of one queue, and how long those in it are likely to wait.

    Args:
        most: How many may wait.
        seconds: How long one may wait.
        clock: Seconds of a clock that only goes forwards.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self.now = most, clock
        self.seconds = seconds
        """How long one may wait."""
        self._lock = Lock()
        self._took: float | None = None
        """Seconds that an answer is under way, on average; None before the first has ended."""

    def ended(self, seconds: float) -> None:
        """Learn how long an answer was under way."""
        with self._lock:
            self._took = seconds if self._took is None else self._took + LATEST * (seconds - self._took)

    def wait(self, ahead: int, under_way: int) -> float:
        """Return the seconds until a place is free for one that comes after so many others."""
        return (self._took or 0.0) * (ahead + 1) / max(under_way, 1)

    def full(self, waiting: int) -> bool:
        """Return whether no more may wait."""
        return waiting >= self._most

    def refuse(self, under_way: int) -> ResourceExhausted:
        """Return the error of an answer for which the queue has no room."""
        what = f"As many answers as may wait for their turn do so already: {self._most:,} (waiting_answers)."
        return _busy(what, self.wait(0, under_way))

    def check(self, ahead: int, under_way: int) -> None:
        """Refuse one that would wait for too long.

        Args:
            ahead: How many come before it.
            under_way: How many are computed together.

        Raises:
            ResourceExhausted: Where it says after how many seconds to try again.
        """
        expected = self.wait(ahead, under_way)
        if expected > self.seconds:
            what = (
                f"The answer would wait for its turn for about {math.ceil(expected):,} seconds, and "
                f"{self.seconds:g} are the most (waiting_seconds)."
            )
            raise _busy(what, expected - self.seconds)

    def late(self, since: float) -> bool:
        """Return whether what came then has waited for longer than it may."""
        return self.now() - since > self.seconds

    def overdue(self, under_way: int) -> Unavailable:
        """Return the error of an answer that was let in and whose turn did not come in time."""
        return Unavailable(
            f"The answer's turn did not come within {self.seconds:g} seconds (waiting_seconds): those before it "
            "took longer than was to be expected. Try again.",
            [_retry(self.wait(0, under_way))],
        )


def closing() -> Unavailable:
    """Return the error that ends requests when the engine closes."""
    return Unavailable("The server is shutting down.")


def _busy(what: str, seconds: float) -> ResourceExhausted:
    retry = _retry(seconds)
    after = retry.retry_delay.seconds
    return ResourceExhausted(f"{what} Try again in {after} second{'s' if after > 1 else ''}.", [retry])


def _retry(seconds: float) -> protos.RetryInfo:
    retry = protos.RetryInfo()
    retry.retry_delay.FromSeconds(max(math.ceil(seconds), 1))
    return retry
