"""google.longrunning.Operations: the jobs as their callers see them."""

import time

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.errors import NotFound
from tunesmith.jobs import queue
from tunesmith.services import access, paging
from tunesmith.services.messages import tuned_model_message
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.sweep import sweep_model
from tunesmith.store.tables import Job, TunedModel

DEFAULT_PAGE = 50
LONGEST_WAIT = 600.0  # seconds
POLL_SECONDS = 0.2  # between two looks at a job that somebody waits for


def operation_message(session: Session, job: Job, model: TunedModel) -> protos.Operation:
    """Return a job as an Operation, with official fields only: Google's client refuses others."""
    tuned_model = tuned_model_message(session, model)
    operation = protos.Operation(name=f"{tuned_model.name}/operations/{job.id}")
    metadata = protos.CreateTunedModelMetadata(tuned_model=tuned_model.name, total_steps=job.total_steps)
    if snapshots := tuned_model.tuning_task.snapshots:
        metadata.completed_steps = snapshots[-1].step
        metadata.completed_percent = 100 * snapshots[-1].step / job.total_steps
        metadata.snapshots.extend(snapshots)
    operation.metadata.Pack(metadata)
    if job.state == "done":
        operation.done = True
        if job.error:
            operation.error.ParseFromString(job.error)
        else:
            operation.response.Pack(tuned_model)
    return operation


class Operations:
    """Operations live under the tuned model that they make."""

    def __init__(self, database: Database, artifacts: ArtifactStore) -> None:
        self._database, self._artifacts = database, artifacts
        self._tokens = paging.PageTokens(database)

    def get_operation(self, request: protos.GetOperationRequest, caller: Caller) -> protos.Operation:
        """Return an operation as it stands."""
        with self._database.read() as session:
            job, model = _find(session, caller, request.name)
            return operation_message(session, job, model)

    def list_operations(
        self, request: protos.ListOperationsRequest, caller: Caller
    ) -> protos.ListOperationsResponse:
        """Return the operations of a tuned model (name `tunedModels/{id}`), oldest first.

        Without a name, those of all tuned models that the caller has a role for, not counting everyone's.
        """
        name = "" if request.name == "operations" else request.name.removesuffix("/operations")
        size = paging.page_size(request.page_size, DEFAULT_PAGE, "ListOperationsRequest")
        call = ("operations", caller.account, name, request.filter)
        after = self._tokens.decode(request.page_token, *call, request="ListOperationsRequest")
        with self._database.read() as session:
            mine = (
                TunedModel.id == access.tuned_model(session, caller, name).id
                if name
                else access.has_by_name(caller, access.READER)
            )
            jobs = select(Job, TunedModel).join(TunedModel, TunedModel.id == Job.tuned_model)
            jobs = jobs.where(mine, Job.forgotten.is_(False))
            if after:
                jobs = jobs.where(tuple_(Job.create_time, Job.id) > after)
            found = session.execute(jobs.order_by(Job.create_time, Job.id).limit(size + 1)).all()
            response = protos.ListOperationsResponse(
                operations=[operation_message(session, job, model) for job, model in found[:size]]
            )
            if len(found) > size:
                last = found[size - 1][0]
                response.next_page_token = self._tokens.encode((last.create_time, last.id), *call)
            return response

    def cancel_operation(self, request: protos.CancelOperationRequest, caller: Caller) -> protos.Empty:
        """Ask for an operation's end, by its name or its tuned model's; one that is done stays as it is."""
        with self._database.write() as session:
            if "/operations/" in request.name:
                jobs = [_find(session, caller, request.name, access.WRITER)[0]]
            else:  # google-genai and @google/genai cancel so
                model = access.tuned_model(session, caller, request.name, access.WRITER)
                jobs = [*session.scalars(select(Job).where(Job.tuned_model == model.id))]
            for job in jobs:
                queue.cancel(session, job)
            starts = {job.start for job in jobs if job.start and job.state == "done"}
        for start in starts:  # which may have been kept for these jobs alone
            sweep_model(self._database, self._artifacts, start.split("/")[1])
        return protos.Empty()

    def wait_operation(self, request: protos.WaitOperationRequest, caller: Caller) -> protos.Operation:
        """Return an operation once it is done, or as it stands when the time is over.

        The time is the request's `timeout`, else as long as the client waits, and never above ten minutes.
        """
        timeout = request.timeout.seconds + request.timeout.nanos / 1e9
        deadline = time.monotonic() + min(timeout if request.HasField("timeout") else LONGEST_WAIT, LONGEST_WAIT)
        while True:
            left = deadline - time.monotonic()
            with self._database.read() as session:
                job, model = _find(session, caller, request.name)
                if job.state == "done" or left <= 0 or caller.gone.is_set():
                    return operation_message(session, job, model)
            caller.gone.wait(min(left, POLL_SECONDS))

    def delete_operation(self, request: protos.DeleteOperationRequest, caller: Caller) -> protos.Empty:
        """Forget an operation's result; the tuning itself goes on."""
        with self._database.write() as session:
            job, _ = _find(session, caller, request.name, access.WRITER)
            job.forgotten = True
        return protos.Empty()


def _find(session: Session, caller: Caller, name: str, role: int = access.READER) -> tuple[Job, TunedModel]:
    """Return the job and the model of `tunedModels/{id}/operations/{id}`."""
    parent, _, job_id = name.partition("/operations/")
    model = access.tuned_model(session, caller, parent, role)
    job = session.get(Job, job_id)
    if job is None or job.tuned_model != model.id or job.forgotten:
        raise NotFound(f"Operation {name} does not exist.")
    return job, model
