"""Where jobs are: the place of a waiting one in the queue, and when the next thing is likely to happen."""

import heapq
import itertools
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, not_, select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.store import events
from tunesmith.store.tables import RELEASED, Account, Job


@dataclass(frozen=True)
class Place:
    """A waiting job's.

    Attributes:
        position: Jobs that are likely to begin before it, and itself.
        eta_seconds: Until it is likely to begin; None while no running job has shown how long steps take.
    """

    position: int
    eta_seconds: float | None


@dataclass(frozen=True)
class _Waiting:
    id: str
    account: str
    attempt: int
    total_steps: int
    create_time: float
    served: float


@dataclass(frozen=True)
class _Running:
    account: str
    left_seconds: float | None
    step_seconds: float | None


def places(session: Session) -> dict[str, Place]:
    """Return the places of all jobs that wait and do not rest, in the order in which they are likely to begin."""
    running = [_running(session, job) for job in session.scalars(select(Job).where(_under_way()))]
    found: dict[str, Place] = {}
    left = [job.left_seconds for job in running if job.left_seconds is not None]
    paces = [job.step_seconds for job in running if job.step_seconds is not None]
    pace, eta = sum(paces) / len(paces) if paces else None, min(left, default=None)
    for job in _in_turns(session, Counter(job.account for job in running)):
        found[job.id] = Place(len(found) + 1, eta)
        if eta is not None and pace is not None:
            eta += job.total_steps * pace / len(running)
    return found


def status(session: Session, job: Job) -> protos.TuningStatus:
    """Return where a job is."""
    found = protos.TuningStatus(state=_state(job), total_steps=job.total_steps)
    if last := events.last_step(session, job.id):
        found.completed_steps = last.step.step
        if found.state == protos.TuningStatus.RUNNING:
            found.eta_seconds = _left(last)
    if found.state == protos.TuningStatus.QUEUED and (place := places(session).get(job.id)):
        found.position = place.position
        if place.eta_seconds is not None:
            found.eta_seconds = place.eta_seconds
    return found


def _state(job: Job) -> int:
    if job.state == "done":
        return protos.TuningStatus.DONE
    if job.state == "running":
        return protos.TuningStatus.PAUSING if job.paused else protos.TuningStatus.RUNNING
    return protos.TuningStatus.PAUSED if job.paused else protos.TuningStatus.QUEUED


def _under_way() -> ColumnElement[bool]:
    # Whether a lease is over, only who would claim the job knows, unless its worker is known to be dead.
    return and_(Job.state == "running", Job.lease_until != RELEASED)


def _running(session: Session, job: Job) -> _Running:
    last = events.last_step(session, job.id)
    if last is None:
        return _Running(job.account, None, None)
    return _Running(job.account, _left(last), last.step.seconds)


def _left(last: protos.TuningEvent) -> float:
    """Return the seconds that a job is likely to take after its last step, as of now."""
    since = max(0.0, (time.time_ns() - last.time.ToNanoseconds()) / 1e9)  # the clock may have been set back
    return max(0.0, last.step.eta_seconds - since)


def _in_turns(session: Session, running: Counter[str]) -> Iterator[_Waiting]:
    """Yield the waiting jobs as accounts take turns: in `queue.claim`'s order, as if none ended meanwhile."""
    columns = (Job.id, Job.account, Job.attempt, Job.total_steps, Job.create_time, Account.served_time)
    rows = session.execute(
        select(*columns)
        .outerjoin(Account, Account.email == Job.account)
        .where(Job.state == "queued", not_(Job.paused))
        .order_by(Job.create_time, Job.id)
    )
    waiting = [_Waiting(*row[:5], served=row[5] or 0.0) for row in rows]
    served = {job.account: job.served for job in waiting}
    yield from _turns([job for job in waiting if job.attempt], running, served)
    yield from _turns([job for job in waiting if not job.attempt], running, served)


def _turns(waiting: Iterable[_Waiting], running: Counter[str], served: dict[str, float]) -> Iterator[_Waiting]:
    """Yield jobs, oldest first of each account; counts who has how many running, and when each had its turn."""
    lines: dict[str, deque[_Waiting]] = defaultdict(deque)
    for job in waiting:
        lines[job.account].append(job)

    def turn(account: str) -> tuple[int, float, float, str, str]:
        first = lines[account][0]
        return running[account], served[account], first.create_time, first.id, account

    turns, later = [turn(account) for account in lines], itertools.count(max(served.values(), default=0.0) + 1)
    heapq.heapify(turns)
    while turns:
        account = heapq.heappop(turns)[-1]
        yield lines[account].popleft()
        running[account] += 1
        served[account] = next(later)
        if lines[account]:
            heapq.heappush(turns, turn(account))
