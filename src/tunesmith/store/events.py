"""What happened to jobs, event by event, each told in the transaction of what it tells of."""

from collections.abc import Iterable

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.store.tables import Event
from tunesmith.store.times import now


def tell(session: Session, job: str, event: protos.TuningEvent) -> None:
    """Add an event to those of a job, whose row the transaction holds; what a step did is told once.

    Args:
        session: Of a `Database.write()`.
        job: The job's id.
        event: Without a number; without a time it gets the present.
    """
    kind = event.WhichOneof("event")
    if kind is None:
        raise ValueError("the event says nothing")
    about = getattr(event, kind)
    step = about.step if "step" in about.DESCRIPTOR.fields_by_name else None
    if step is not None and session.scalar(_TOLD, {"job": job, "kind": kind, "step": step}):
        return  # by an attempt that was interrupted after it
    if not event.HasField("time"):
        event.time.CopyFrom(now())
    number = session.scalar(_LAST, {"job": job}) or 0
    row = Event(job=job, number=number + 1, kind=kind, step=step, message=event.SerializeToString())
    session.add(row)
    session.flush()  # the next one counts on


def after(session: Session, job: str, number: int, most: int | None = None) -> list[protos.TuningEvent]:
    """Return the events of a job that follow the one with a number, in order; at most so many."""
    wanted = select(Event.number, Event.message).where(Event.job == job, Event.number > number)
    return [_event(*row) for row in session.execute(wanted.order_by(Event.number).limit(most))]


def last_numbers(session: Session, jobs: Iterable[str]) -> dict[str, int]:
    """Return the number of the last event of each job that has any."""
    numbers = select(Event.job, func.max(Event.number)).where(Event.job.in_([*jobs])).group_by(Event.job)
    return {row.job: row[1] for row in session.execute(numbers)}


def last_kind(session: Session, job: str) -> str | None:
    """Return what kind of event was told last."""
    return session.scalar(select(Event.kind).where(Event.job == job).order_by(Event.number.desc()).limit(1))


def last_step(session: Session, job: str) -> protos.TuningEvent | None:
    """Return the event of a job's last finished step."""
    steps = select(Event.number, Event.message).where(Event.job == job, Event.kind == "step")
    row = session.execute(steps.order_by(Event.step.desc()).limit(1)).first()
    return _event(*row) if row else None


def _event(number: int, message: bytes) -> protos.TuningEvent:
    event = protos.TuningEvent.FromString(message)
    event.event_id = number
    return event


# Built once: each step runs them.
_TOLD = select(Event.number).where(
    Event.job == bindparam("job"), Event.kind == bindparam("kind"), Event.step == bindparam("step")
)
_LAST = select(func.max(Event.number)).where(Event.job == bindparam("job"))
