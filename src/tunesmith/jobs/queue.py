"""The job queue: rows with leases.

A job is queued, then running under a lease that its worker renews, then done. A stalled job is not a state
but an observation: it is running, and for as long as leases last nobody has renewed this one. Who would claim
it counts that time by a clock of its own that only goes forward: clocks that jump or are wrong end no lease
early or late. What a worker writes carries its claim; once another worker has claimed the job, the first one's
writes are refused.

Accounts take turns: the next job is of the account that has the fewest running, among these of the one that had
its turn the longest ago, and is its oldest. A job that was begun goes on before all that were not. One that is
paused is queued too, or stalled, and passed over.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Select, and_, case, delete, func, not_, or_, select, update
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.errors import ApiError, Cancelled, FailedPrecondition, ResourceExhausted
from tunesmith.jobs import places
from tunesmith.store import events
from tunesmith.store.database import Database, DatabaseUnavailable
from tunesmith.store.snapshots import add_snapshots
from tunesmith.store.tables import RELEASED, Account, Job, Report, Snapshot, TunedModel
from tunesmith.store.times import now, now_in_microseconds, to_timestamp
from tunesmith.training.hyperparameters import Options

MOST_FRUITLESS_ATTEMPTS = 3
RENEWALS = 5  # of a lease, while it lasts
AWAY_SECONDS = 1.0  # between two looks at leases, at least: who was away that long may not have been the only one
FULL_SECONDS = 30.0
"""When to try again with one job too many: jobs take from seconds to hours."""
LONGEST_PAUSE = 5.0  # seconds between two tries, while the database is not available
_FIRST_PAUSE = 0.1

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")

logger = logging.getLogger(__name__)


class LeaseLost(Exception):
    """The job was given to another worker, or deleted with its model."""


@dataclass(frozen=True)
class Claim:
    """A worker's hold on a job, and what it needs to do it.

    Attributes:
        attempt: The fencing token: how often the job has been claimed.
        recorded_steps: The steps that earlier attempts finished.
        start: Path of the adapter that training starts from; None to start from the base model alone.
        checkpoint: Path of the newest checkpoint in the artifact store.
        fruitless: How many attempts in a row just before this one ended at the first step that was new.
        micro_batch_tokens: How many tokens may go through the model at once since memory ran out; None when it
            did not.
        options: How it is tuned beyond the hyperparameters; None for a job from before there were any.
    """

    job: str
    tuned_model: str
    worker: str
    attempt: int
    base: str
    hyperparameters: protos.Hyperparameters
    training_data: protos.Dataset
    seed: int
    recorded_steps: int
    start: str | None
    checkpoint: str | None
    fruitless: int
    micro_batch_tokens: int | None
    cancelled: bool
    options: protos.TuningOptions | None


@dataclass(frozen=True)
class Wishes:
    """What was asked of a job while a worker is at it: its end, or a rest."""

    cancelled: bool
    paused: bool


@dataclass(frozen=True)
class GivenUp:
    """A job that ended instead of being claimed: the artifacts that it had are needed no more."""

    job: str
    tuned_model: str
    start: str | None


@dataclass(frozen=True)
class _Sighting:
    """When a lease was first seen as it is, by the clock that counts seconds."""

    attempt: int
    lease_until: float | None
    time: float


def _patiently(
    method: Callable[Concatenate["JobQueue", _Given], _Found],
) -> Callable[Concatenate["JobQueue", _Given], _Found]:
    """Return a method that waits for the database when that is locked, full or gone."""

    @wraps(method)
    def again(self: "JobQueue", /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Found:
        pause = _FIRST_PAUSE
        while True:
            try:
                return method(self, *args, **kwargs)
            except DatabaseUnavailable as error:
                if self.stopping.is_set():
                    raise
                logger.warning("%s. Waiting for it to %s.", error.message.partition(". ")[0], method.__name__)
            self.stopping.wait(pause)
            # Or others, who find the database well again, would see a lease run out meanwhile.
            pause = min(2 * pause, LONGEST_PAUSE, self.lease_seconds / RENEWALS)

    return again


class JobQueue:
    """Jobs in the database; safe to share between threads and processes.

    While the database is not available, its methods wait.

    Args:
        database: Where the jobs are.
        lease_seconds: How long a worker that gives no sign of life keeps its job.
        clock: Seconds since the epoch, as far as this machine knows.
        elapsed: Seconds since any moment: this clock never jumps.

    Attributes:
        stopping: When it is set, methods no longer wait for the database but raise DatabaseUnavailable.
    """

    def __init__(
        self,
        database: Database,
        lease_seconds: float,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self.database = database
        self.lease_seconds = lease_seconds
        self.stopping = threading.Event()
        self._clock, self._elapsed = clock, elapsed
        self._sightings: dict[str, _Sighting] = {}
        self._looked = elapsed()

    @_patiently
    def claim(self, worker: str) -> Claim | GivenUp | None:
        """Give the next job that nobody works on to a worker; None when there is none."""
        with self.database.read() as session:
            if session.scalars(_next(self._stalled(session))).first() is None:
                return None
        try:
            with self.database.write() as session:
                session.connection()  # begins the transaction, before the clock is looked at
                return self._claim(session, worker)
        except DatabaseUnavailable:
            self._sightings = {}  # who holds a lease cannot renew it meanwhile either
            raise

    def _claim(self, session: Session, worker: str) -> Claim | GivenUp | None:
        job_id = session.scalars(_next(self._stalled(session)).with_for_update(of=Job, skip_locked=True)).first()
        if job_id is None:
            return None
        job = session.get_one(Job, job_id)
        if job.paused:
            _park(session, job)
            return None
        if job.fruitless_attempts >= MOST_FRUITLESS_ATTEMPTS:
            _end(session, job, error=_gave_up(job))
            return GivenUp(job.id, job.tuned_model, job.start)
        started = protos.TuningEvent.Started(interruption=_interruption(session, job))
        job.state = "running"
        job.worker = worker
        job.lease_until = self._clock() + self.lease_seconds
        job.attempt += 1
        job.fruitless_attempts += 1
        self._note_turn(session, job.account)
        model, message = _model(session, job)
        if not message.tuning_task.HasField("start_time"):
            message.tuning_task.start_time.CopyFrom(now())
            model.message = message.SerializeToString()
        started.attempt, started.total_steps = job.attempt, job.total_steps
        events.tell(session, job.id, protos.TuningEvent(started=started))
        recorded = session.scalar(select(func.max(Snapshot.step)).where(Snapshot.job == job.id))
        return Claim(
            job=job.id,
            tuned_model=job.tuned_model,
            worker=worker,
            attempt=job.attempt,
            base=model.base,
            hyperparameters=message.tuning_task.hyperparameters,
            training_data=protos.Dataset.FromString(job.training_data),
            seed=job.seed,
            recorded_steps=recorded or 0,
            start=job.start,
            checkpoint=job.checkpoint,
            fruitless=job.fruitless_attempts - 1,
            micro_batch_tokens=job.micro_batch_tokens,
            cancelled=job.cancelled,
            options=None if job.options is None else protos.TuningOptions.FromString(job.options),
        )

    def _stalled(self, session: Session) -> list[str]:
        """Return the running jobs that nobody holds any more."""
        now, stalled, sightings = self._elapsed(), list[str](), dict[str, _Sighting]()
        if now - self._looked > max(AWAY_SECONDS, self.lease_seconds / RENEWALS):
            self._sightings = {}  # the machine may have been frozen, and who holds a lease with it
        self._looked = now
        wanted = select(Job.id, Job.attempt, Job.lease_until).where(Job.state == "running")
        for job, attempt, lease_until in session.execute(wanted):
            seen = self._sightings.get(job)
            if seen is None or (seen.attempt, seen.lease_until) != (attempt, lease_until):
                seen = _Sighting(attempt, lease_until, now)
            sightings[job] = seen
            if lease_until == RELEASED or now - seen.time >= self.lease_seconds:
                stalled.append(job)
        self._sightings = sightings
        return stalled

    def _note_turn(self, session: Session, account: str) -> None:
        """Note that an account has its turn, after all others, also where the clock was set back."""
        latest = session.scalar(select(func.max(Account.served_time))) or 0.0
        turn = max(self._clock(), latest + 1e-3)
        session.execute(update(Account).where(Account.email == account).values(served_time=turn))

    @_patiently
    def renew(self, claim: Claim) -> Wishes:
        """Prolong the lease; return what was asked meanwhile.

        Raises:
            LeaseLost: The claim no longer holds. So do all methods below that take a claim.
        """
        with self._held(claim) as (_, job):
            job.lease_until = self._clock() + self.lease_seconds
            return Wishes(job.cancelled, job.paused)

    @_patiently
    def describe(self, claim: Claim, recipe: protos.TuningRecipe, warnings: Iterable[protos.DataWarning]) -> None:
        """Store how the job is trained, and what is worth a look in its rows; the first attempt's word stays."""
        with self._held(claim) as (session, job):
            if session.get(Report, job.id) is None:
                message = protos.TuningReport(recipe=recipe).SerializeToString()
                session.add(Report(job=job.id, message=message))
                for warning in warnings:
                    events.tell(session, job.id, protos.TuningEvent(warning=warning))

    @_patiently
    def record(self, claim: Claim, step: protos.TuningStep) -> Wishes:
        """Store a finished step, replacing what an earlier attempt stored of it; return what was asked for."""
        with self._held(claim) as (session, job):
            job.fruitless_attempts = _fruitless(claim, step.step)
            time_ns = time.time_ns()
            session.merge(
                Snapshot(
                    job=job.id,
                    step=step.step,
                    epoch=step.epoch,
                    mean_loss=step.mean_loss,
                    compute_time_ns=time_ns,
                )
            )
            events.tell(session, job.id, protos.TuningEvent(step=step, time=to_timestamp(time_ns)))
            return Wishes(job.cancelled, job.paused)

    @_patiently
    def validated(self, claim: Claim, validation: protos.TuningValidation) -> None:
        """Store a validation."""
        with self._held(claim) as (session, job):
            events.tell(session, job.id, protos.TuningEvent(validation=validation))

    @_patiently
    def checkpointed(self, claim: Claim, path: str, step: int) -> None:
        """Note the newest checkpoint, made after a step."""
        with self._held(claim) as (session, job):
            job.checkpoint = path
            events.tell(session, job.id, protos.TuningEvent(checkpoint=protos.TuningEvent.Checkpoint(step=step)))

    @_patiently
    def warn(self, claim: Claim, warning: protos.DataWarning, micro_batch_tokens: int | None = None) -> None:
        """Tell of trouble on the way; with how many tokens may go through the model at once from now on."""
        with self._held(claim) as (session, job):
            if micro_batch_tokens is not None:
                job.micro_batch_tokens = micro_batch_tokens
            events.tell(session, job.id, protos.TuningEvent(warning=warning))

    @_patiently
    def finish(
        self, claim: Claim, adapter: str, error: ApiError | None = None, stopped_at: int | None = None
    ) -> None:
        """End the job with an adapter.

        Args:
            claim: The claim.
            adapter: Its path in the artifact store.
            error: Says that it was cancelled on the way.
            stopped_at: The step after which training ended before its last, by itself unless there is an error.
        """
        with self._held(claim) as (session, job):
            reason = ""
            if stopped_at is not None and error is None:
                reason = f"Training ended after step {stopped_at} of {job.total_steps}: validation got no better."
                job.total_steps = stopped_at
            _end(session, job, adapter=adapter, error=error, reason=reason)

    @_patiently
    def fail(self, claim: Claim, error: ApiError) -> None:
        """End the job without an adapter."""
        with self._held(claim) as (session, job):
            _end(session, job, error=error)

    @_patiently
    def put_back(self, claim: Claim) -> None:
        """Give an unfinished job back: any worker may take it unless it is to rest; the attempt does not count."""
        with self._held(claim) as (session, job):
            job.fruitless_attempts = min(job.fruitless_attempts, claim.fruitless)
            _park(session, job)

    @_patiently
    def release(self, worker: str) -> bool:
        """End the leases of a worker that is known to be dead; return whether it got its job any further."""
        with self.database.write() as session:
            held = select(Job).where(Job.worker == worker, Job.state == "running").with_for_update()
            jobs = session.scalars(held).all()
            for job in jobs:
                job.lease_until = RELEASED
            return any(job.fruitless_attempts == 0 for job in jobs)

    @contextmanager
    def _held(self, claim: Claim) -> Iterator[tuple[Session, Job]]:
        """A transaction in which the claim is known to hold."""
        with self.database.write() as session:
            job = session.scalars(select(Job).where(Job.id == claim.job).with_for_update()).first()
            if job is None or (job.worker, job.attempt, job.state) != (
                claim.worker,
                claim.attempt,
                "running",
            ):
                raise LeaseLost(f"{claim.worker} no longer holds job {claim.job}")
            yield session, job


def training_options(given: protos.TuningOptions | None) -> Options:
    """Return options as training takes them; those of a job from before there were any validate nothing."""
    if given is None:
        return Options(validation_fraction=0.0)
    return Options(
        given.validation_fraction if given.HasField("validation_fraction") else None,
        given.patience,
        "last" if given.keep == protos.TuningOptions.LAST else "best",
    )


def enqueue(session: Session, job: Job, warnings: Iterable[protos.DataWarning] = ()) -> None:
    """Add a job, and tell of its place and of what is worth a look in its training data."""
    session.add(job)
    session.flush()
    place = places.places(session)[job.id]
    queued = protos.TuningEvent.Queued(position=place.position, eta_seconds=place.eta_seconds)
    events.tell(session, job.id, protos.TuningEvent(queued=queued))
    for warning in warnings:
        events.tell(session, job.id, protos.TuningEvent(warning=warning))


def cancel(session: Session, job: Job) -> None:
    """Ask for a job's end; one that no worker has begun ends at once, and rest is over."""
    session.refresh(job, with_for_update=True)
    if job.state == "done":
        return
    job.cancelled, job.paused = True, False
    if job.state == "queued" and job.attempt == 0:
        _end(session, job, error=Cancelled("The operation was cancelled before tuning began."))


def pause(session: Session, job: Job) -> None:
    """Ask for a job's rest: a worker that is at it makes a checkpoint first. One that rests stays as it is.

    Raises:
        FailedPrecondition: It is done, or was cancelled.
    """
    session.refresh(job, with_for_update=True)
    _refuse_when_over(job)
    if not job.paused:
        job.paused = True
        if job.state == "queued":
            _park(session, job)


def resume(session: Session, job: Job) -> None:
    """Put a job that rests back into the queue; one that does not stays as it is.

    Raises:
        FailedPrecondition: It is done, or was cancelled.
    """
    session.refresh(job, with_for_update=True)
    _refuse_when_over(job)
    if job.paused:
        job.paused = False
        if job.state == "queued":  # else its worker has not left it yet, and goes on
            events.tell(session, job.id, protos.TuningEvent(resumed=protos.TuningEvent.Resumed()))


def check_room(session: Session, account: str, most: int) -> None:
    """Refuse one more job of an account that has as many waiting as it may; in the transaction that adds it.

    Args:
        session: Of a `Database.write()`.
        account: Whose job it is.
        most: How many; 0 for any number.

    Raises:
        ResourceExhausted: There are as many.
    """
    if not most:
        return
    # Locked, or two requests at once would both be the last one that fits.
    session.execute(select(Account.email).where(Account.email == account).with_for_update(key_share=True))
    waiting = select(func.count()).where(Job.account == account, Job.state == "queued")
    if (session.scalar(waiting) or 0) >= most:
        what = "Too many tuning jobs are waiting for a worker."
        raise ResourceExhausted.over("queued_jobs_per_account", most, account, what, FULL_SECONDS)


def _next(stalled: Collection[str]) -> Select[str]:
    """Return the query of the job whose turn it is among those that nobody works on: queued and stalled ones."""
    running = (
        select(Job.account, func.count().label("jobs"))
        .where(Job.state == "running", Job.id.not_in(stalled))
        .group_by(Job.account)
        .subquery()
    )
    return (
        select(Job.id)
        .outerjoin(running, running.c.account == Job.account)
        .outerjoin(Account, Account.email == Job.account)
        .where(
            or_(and_(Job.state == "queued", not_(Job.paused)), and_(Job.state == "running", Job.id.in_(stalled)))
        )
        .order_by(
            case((Job.attempt > 0, 0), else_=1),
            func.coalesce(running.c.jobs, 0),
            func.coalesce(Account.served_time, 0.0),
            Job.create_time,
            Job.id,
        )
        .limit(1)
    )


def _fruitless(claim: Claim, step: int) -> int:
    """Return how many attempts in a row will have been fruitless if this one ends after a step.

    Steps that an earlier attempt finished kill no worker: only an end at the first one that is new counts.
    """
    if step > claim.recorded_steps:
        return 0
    return claim.fruitless + (step == claim.recorded_steps)


def _gave_up(job: Job) -> ApiError:
    return FailedPrecondition(
        f"The training process ended {job.fruitless_attempts} times in a row without finishing a step, the last "
        "time with one example at a time, perhaps for want of memory. Try shorter examples or a smaller base "
        "model, or ask the server's operator, whose log says more."
    )


def _refuse_when_over(job: Job) -> None:
    name = f"tunedModels/{job.tuned_model}"
    if job.state == "done":
        raise FailedPrecondition(f"The tuning of {name} is done: there is nothing to pause or to resume.")
    if job.cancelled:
        raise FailedPrecondition(f"The tuning of {name} was cancelled, and is about to end.")


def _park(session: Session, job: Job) -> None:
    """Let nobody hold a job any more; tell when it rests from now on."""
    job.state, job.lease_until, job.worker = "queued", None, None
    if job.paused:
        last = events.last_step(session, job.id)
        paused = protos.TuningEvent.Paused(completed_steps=last.step.step if last else 0)
        events.tell(session, job.id, protos.TuningEvent(paused=paused))


def _interruption(session: Session, job: Job) -> int:
    """Return what ended the attempt before the one that begins now."""
    started = protos.TuningEvent.Started
    if job.state == "running":
        return started.WORKER_ENDED if job.lease_until == RELEASED else started.WORKER_LOST
    if job.attempt == 0:
        return started.INTERRUPTION_UNSPECIFIED
    return started.PAUSED if events.last_kind(session, job.id) == "resumed" else started.SERVER_STOPPED


def _model(session: Session, job: Job) -> tuple[TunedModel, protos.TunedModel]:
    row = session.get_one(TunedModel, job.tuned_model)
    return row, protos.TunedModel.FromString(row.message)


def _end(
    session: Session, job: Job, *, adapter: str | None = None, error: ApiError | None = None, reason: str = ""
) -> None:
    """Bring job and model to their final state, in the caller's transaction."""
    job.state, job.worker, job.lease_until, job.checkpoint = "done", None, None, None
    job.error = error.to_status().SerializeToString() if error else None
    model, message = _model(session, job)
    add_snapshots(session, {model.id: message})
    session.execute(delete(Snapshot).where(Snapshot.job == job.id))
    message.state = protos.TunedModel.ACTIVE if adapter else protos.TunedModel.FAILED
    message.update_time.CopyFrom(now_in_microseconds())
    message.tuning_task.complete_time.CopyFrom(message.update_time)
    model.state, model.adapter, model.message = message.state, adapter, message.SerializeToString()
    finished = protos.TuningEvent.Finished(state=message.state, reason=error.message if error else reason)
    if snapshots := message.tuning_task.snapshots:
        finished.completed_steps = snapshots[-1].step
    events.tell(session, job.id, protos.TuningEvent(finished=finished, time=message.update_time))
