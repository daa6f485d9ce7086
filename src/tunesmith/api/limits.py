"""What one account may ask of this server process at a time; what it may have in the job queue, the queue counts.

Counted in memory: several servers of one database each allow as much.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.errors import ResourceExhausted

MINUTE = 60.0  # seconds
GENERATION_SECONDS = 1.0
"""When to try again with one answer too many: some of the others are likely to have ended by then."""


class Limits:
    """The limits of every account; 0 is none.

    Args:
        requests_per_minute: A bucket of so many tokens, which fills up again in a minute.
        generations: Answers under way.
    """

    def __init__(self, requests_per_minute: int = 0, generations: int = 0) -> None:
        self._per_minute, self._generations = requests_per_minute, generations
        self._token = MINUTE / requests_per_minute if requests_per_minute else 0.0
        """Seconds until a token comes."""
        self._lock = threading.Lock()
        self._full: dict[str, float] = {}
        """When each account's bucket will be full again: all that there is to know of it."""
        self._under_way: Counter[str] = Counter()

    def request(self, account: str) -> None:
        """Count a request.

        Raises:
            ResourceExhausted: It is one too many, and not counted.
        """
        if not self._per_minute:
            return
        now = time.monotonic()
        with self._lock:
            full = max(self._full.get(account, 0.0), now) + self._token
            if full <= now + MINUTE:
                self._full[account] = full
                return
        raise ResourceExhausted.over(
            "requests_per_minute", self._per_minute, account, "Too many requests a minute.", full - now - MINUTE
        )

    @contextmanager
    def generation(self, account: str) -> Iterator[None]:
        """Count an answer until the block ends.

        Raises:
            ResourceExhausted: It is one too many.
        """
        with self._lock:
            room = not self._generations or self._under_way[account] < self._generations
            if room:
                self._under_way[account] += 1
        if not room:
            what = "Too many answers are being generated."
            raise ResourceExhausted.over(
                "generations_per_account", self._generations, account, what, GENERATION_SECONDS
            )
        try:
            yield
        finally:
            with self._lock:
                self._under_way[account] -= 1
                if not self._under_way[account]:
                    del self._under_way[account]
