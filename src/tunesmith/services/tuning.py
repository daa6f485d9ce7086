"""TuningService: tuning with options, watching jobs, their reports, and their rests."""

from collections.abc import Callable, Iterator

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.errors import InvalidArgument
from tunesmith.jobs import places, queue
from tunesmith.services import access
from tunesmith.services.bulletin import Bulletin, Watch
from tunesmith.services.creation import Creation
from tunesmith.services.exports import Exports
from tunesmith.services.reports import Reports
from tunesmith.store import events
from tunesmith.store.database import Database
from tunesmith.store.tables import Job
from tunesmith.store.times import now

HEARTBEAT_SECONDS = 15.0
"""After so long without news a watch gives a sign of life: proxies end streams that are silent for a minute."""
_AT_ONCE = 200  # events that are read together


class TuningService:
    """tunesmith.v1beta.TuningService."""

    def __init__(
        self, database: Database, creation: Creation, bulletin: Bulletin, reports: Reports, exports: Exports
    ) -> None:
        self._database, self._creation = database, creation
        self._bulletin, self._reports, self._exports = bulletin, reports, exports

    def tune_model(self, request: protos.TuneModelRequest, caller: Caller) -> protos.Operation:
        """Accept a tuning job as `create` does, with options: validation, early stopping, what to keep, a seed."""
        return self._creation.create(request, caller, request.options)

    def watch_tuning(
        self, request: protos.WatchTuningRequest, caller: Caller
    ) -> Iterator[protos.TuningEvent | None]:
        """Replay what happened to a tuned model's job, event by event, then follow it until it is done.

        Yields None when there was nothing to tell for a while. With `alt=sse`, or for a browser's EventSource,
        events have names and ids, and a client that comes back goes on after its `Last-Event-ID`.
        """
        if request.after_event < 0:
            reason = f"must be the number of an event, or 0 for all of them, not {request.after_event}"
            raise InvalidArgument.at([("WatchTuningRequest.after_event", reason)])
        with self._database.read() as session:
            job = _find(session, caller, request.name).id
        with self._bulletin.watch(job, caller) as watch:
            yield from self._follow(request, caller, watch)

    def get_tuning_report(self, request: protos.GetTuningReportRequest, caller: Caller) -> protos.TuningReport:
        """Return what is known of a tuned model's training, also while it is under way.

        Who may change the model also sees what the base model and the tuned model answer to some of the examples.
        """
        return self._reports.report(request.name, caller)

    def pause_tuning(self, request: protos.PauseTuningRequest, caller: Caller) -> protos.TuningStatus:
        """Let a job rest until it is resumed: a worker that is at it makes a checkpoint and leaves it."""
        return self._change(request.name, caller, queue.pause)

    def resume_tuning(self, request: protos.ResumeTuningRequest, caller: Caller) -> protos.TuningStatus:
        """Put a job that rests back into the queue, where it goes on from its checkpoint."""
        return self._change(request.name, caller, queue.resume)

    def export_tuned_model(
        self, request: protos.ExportTunedModelRequest, caller: Caller
    ) -> Iterator[protos.HttpBody]:
        """Send a tuned model as a file that other programs load: PEFT, SAFETENSORS, GGUF or OLLAMA.

        It takes the role of a writer. GGUF and OLLAMA store the weights with the quantization that is asked for.
        """
        return self._exports.export_tuned_model(request, caller)

    def _change(self, name: str, caller: Caller, change: Callable[[Session, Job], None]) -> protos.TuningStatus:
        with self._database.write() as session:
            job = _find(session, caller, name, access.WRITER)
            change(session, job)
            session.flush()
            return places.status(session, job)

    def _follow(
        self, request: protos.WatchTuningRequest, caller: Caller, watch: Watch
    ) -> Iterator[protos.TuningEvent | None]:
        last, position, silent = request.after_event, 0, True
        while not caller.gone.is_set():
            found, done = self._news(request.name, caller, last)
            for event in found:
                last, position = event.event_id, event.queued.position
                yield event
            if len(found) == _AT_ONCE:
                continue
            if done:
                return
            place = watch.place
            if place is not None and place.position != position:
                position = place.position
                queued = protos.TuningEvent.Queued(position=position, eta_seconds=place.eta_seconds)
                yield protos.TuningEvent(queued=queued, time=now())
            elif silent and not found:
                yield None
            silent = not watch.wait(HEARTBEAT_SECONDS)

    def _news(self, name: str, caller: Caller, last: int) -> tuple[list[protos.TuningEvent], bool]:
        """Return the next events, and whether the job is done; the caller may have lost the right to see them."""
        with self._database.read() as session:
            job = _find(session, caller, name)
            found = events.after(session, job.id, last, _AT_ONCE)
            if not access.may_change(session, caller, name):
                for event in found:
                    if event.HasField("warning"):
                        event.warning.ClearField("message")
            return found, job.state == "done"


def _find(session: Session, caller: Caller, name: str, role: int = access.READER) -> Job:
    """Return the job that makes or made a tuned model."""
    model = access.tuned_model(session, caller, name, role)
    return session.scalars(select(Job).where(Job.tuned_model == model.id)).one()
