"""What there is to say of a tuned model's training."""

import threading
from collections.abc import Sequence
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.caller import Caller
from tunesmith.engines.base import Engine
from tunesmith.jobs import places
from tunesmith.services import access, samples
from tunesmith.store import events
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, Report, TunedModel

MOST_STEPS = 1000

_Kind = TypeVar("_Kind")


class Reports:
    """Makes reports.

    Args:
        database: Where jobs and their events are.
        engine: Answers the samples.
        catalog: The base models.
    """

    def __init__(self, database: Database, engine: Engine, catalog: Catalog) -> None:
        self._database, self._engine, self._catalog = database, engine, catalog
        # One at a time: samples are not worth more of the engine than one batch.
        self._sampling = threading.Lock()

    def report(self, name: str, caller: Caller) -> protos.TuningReport:
        """Return a report; who may change the model sees samples in it, which the first to ask waits for.

        Raises:
            NotFound, PermissionDenied: As `access.tuned_model`.
            Cancelled: The caller left before the samples were made.
        """
        with self._database.read() as session:
            model = access.tuned_model(session, caller, name)
            job = session.scalars(select(Job).where(Job.tuned_model == model.id)).one()
            writes = access.may_change(session, caller, name)
            found = _report(session, name, job)
        if not writes:
            for warning in found.warnings:
                warning.ClearField("message")
            del found.samples[:]
        elif model.adapter and not found.samples:
            with self._sampling:
                found.samples.extend(self._samples(job.id, model, caller))
        return found

    def _samples(self, job_id: str, model: TunedModel, caller: Caller) -> Sequence[protos.SamplePrediction]:
        """Return samples, made now unless somebody else has just done it."""
        with self._database.read() as session:
            job, kept = session.get(Job, job_id), _kept(session, job_id)
            if job is None or kept.samples:
                return kept.samples
            examples = protos.Dataset.FromString(job.training_data).examples
        base = self._catalog.models[model.base]
        made = samples.predictions(self._engine, base, model.adapter, examples, kept.recipe.held_out_rows, caller)
        with self._database.write() as session:
            if made and session.get(Job, job_id) is not None:
                kept.samples.extend(made)
                session.merge(Report(job=job_id, message=kept.SerializeToString()))
        return made


def _kept(session: Session, job_id: str) -> protos.TuningReport:
    row = session.get(Report, job_id)
    return protos.TuningReport.FromString(row.message if row else b"")


def _report(session: Session, name: str, job: Job) -> protos.TuningReport:
    """Return all that the database knows."""
    report = _kept(session, job.id)
    report.name = name
    report.status.CopyFrom(places.status(session, job))
    report.options.ParseFromString(job.options or b"")
    told = events.after(session, job.id, 0)
    for event in told:
        if event.HasField("step"):
            event.step.time.CopyFrom(event.time)
        elif event.HasField("validation"):
            event.validation.time.CopyFrom(event.time)
    steps = [event.step for event in told if event.HasField("step")]
    report.warnings.extend(event.warning for event in told if event.HasField("warning"))
    report.steps.extend(_spread(steps, MOST_STEPS))
    report.validations.extend(event.validation for event in told if event.HasField("validation"))
    report.timings.CopyFrom(_timings(job, steps, told))
    if told and told[-1].HasField("finished"):
        report.reason = told[-1].finished.reason
        if report.validations:
            report.final_validation.CopyFrom(_final(report))
    return report


def _final(report: protos.TuningReport) -> protos.TuningValidation:
    """Return the validation of the weights that were kept."""
    if report.options.keep == protos.TuningOptions.LAST:
        return report.validations[-1]
    return [one for one in report.validations if one.best][-1]


def _timings(
    job: Job, steps: Sequence[protos.TuningStep], told: Sequence[protos.TuningEvent]
) -> protos.TuningTimings:
    seconds, tokens = sum(step.seconds for step in steps), sum(step.tokens for step in steps)
    last_goes_on_or_ended_it = job.attempt > 0 and job.state != "queued"
    timings = protos.TuningTimings(
        training_seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        attempts=job.attempt,
        interruptions=job.attempt - last_goes_on_or_ended_it,
    )
    for event in told:
        since = max(0.0, event.time.ToNanoseconds() / 1e9 - job.create_time)  # the clock may have been set back
        if event.HasField("started") and event.started.attempt == 1:
            timings.queued_seconds = since
        if event.HasField("finished"):
            timings.total_seconds = since
    return timings


def _spread(all_of_them: Sequence[_Kind], most: int) -> Sequence[_Kind]:
    """Return at most so many, evenly spread, the first and the last among them."""
    if len(all_of_them) <= most:
        return all_of_them
    return [all_of_them[round(n * (len(all_of_them) - 1) / (most - 1))] for n in range(most)]
