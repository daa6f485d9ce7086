"""What is new of the jobs that somebody watches: one look at the database for all of them."""

import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from sqlalchemy import not_, select
from sqlalchemy.exc import SQLAlchemyError

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.errors import ResourceExhausted, Unavailable
from tunesmith.jobs.places import Place, places
from tunesmith.store import events
from tunesmith.store.database import Database
from tunesmith.store.tables import Job

POLL_SECONDS = 0.2  # between two looks, while anybody watches
MOST_WATCHES = 240
"""Watches that one server process holds, a thread each: fewer than transports have threads for them."""
FULL_SECONDS = 5.0
"""When to try again with one watch too many."""

_Seen = dict[str, tuple[int, Place | None]]

log = logging.getLogger(__name__)


class Watch:
    """Somebody who waits for news of a job.

    Attributes:
        place: The job's place in the queue, as of the last look; None when it does not wait.
    """

    def __init__(self, job: str, caller: Caller) -> None:
        self.job, self.account, self._gone = job, caller.account, caller.gone
        self.place: Place | None = None
        self._told: tuple[int | None, int | None] | None = None
        self._news = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Return when there is news, when the caller has left, or after so long; say whether it was sooner."""
        sooner = self._news.wait(seconds)
        self._news.clear()
        return sooner

    def note(self, seen: _Seen) -> None:
        """Take note of a look at the database."""
        number, self.place = seen.get(self.job, (None, None))
        now = number, self.place.position if self.place else None
        if now != self._told or self._gone.is_set():
            self._told = now
            self._news.set()


class Bulletin:
    """Looks for news from a thread that lives as long as anybody watches.

    Args:
        database: Where jobs and their events are.
        per_account: Watches of one account; 0 for as many as there are.
    """

    def __init__(self, database: Database, per_account: int = 0) -> None:
        self._database, self._per_account = database, per_account
        self._lock = threading.Lock()
        self._watches: set[Watch] = set()
        self._looking = False
        self._pause = threading.Event()  # never set

    @contextmanager
    def watch(self, job: str, caller: Caller) -> Iterator[Watch]:
        """Watch a job until the block ends.

        Raises:
            ResourceExhausted: There are as many watches as there may be.
        """
        watch = Watch(job, caller)
        with self._lock:
            self._check_room(caller.account)
            self._watches.add(watch)
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._look_out, name="bulletin", daemon=True).start()
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.discard(watch)

    def _check_room(self, account: str) -> None:
        if len(self._watches) >= MOST_WATCHES:
            retry = protos.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(FULL_SECONDS * 1000))
            raise ResourceExhausted(
                f"This server has {MOST_WATCHES} watches of jobs open, as many as it holds. Try again later, or "
                "ask for the operation instead.",
                [retry],
            )
        mine = Counter(watch.account for watch in self._watches)[account]
        if self._per_account and mine >= self._per_account:
            what = "Too many jobs are being watched."
            raise ResourceExhausted.over("watches_per_account", self._per_account, account, what, FULL_SECONDS)

    def _look_out(self) -> None:
        while True:
            with self._lock:
                watches = [*self._watches]
                if not watches:
                    self._looking = False
                    return
            try:
                seen = self._look({watch.job for watch in watches})
            except (SQLAlchemyError, Unavailable) as error:
                log.warning("cannot look for news of jobs: %s", error)
            else:
                for watch in watches:
                    watch.note(seen)
            self._pause.wait(POLL_SECONDS)

    def _look(self, jobs: Collection[str]) -> _Seen:
        """Return the last event's number of each job that has events, and its place when it waits."""
        with self._database.read() as session:
            numbers = events.last_numbers(session, jobs)
            waits = select(Job.id).where(Job.id.in_(jobs), Job.state == "queued", not_(Job.paused))
            found = places(session) if session.scalars(waits.limit(1)).first() else {}
        return {job: (number, found.get(job)) for job, number in numbers.items()}
