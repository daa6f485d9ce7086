"""google.longrunning.Operations: the jobs as their callers see them."""

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.errors import NotFound
from tunesmith.jobs import queue
from tunesmith.services import access, paging
from tunesmith.services.messages import tuned_model_message
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, TunedModel

DEFAULT_PAGE = 50


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

    def __init__(self, database: Database) -> None:
        self._database = database

    def get_operation(self, request: protos.GetOperationRequest, caller: Caller) -> protos.Operation:
        """Return an operation as it stands."""
        with self._database.read() as session:
            job, model = _find(session, caller, request.name)
            return operation_message(session, job, model)

    def list_operations(
        self, request: protos.ListOperationsRequest, caller: Caller
    ) -> protos.ListOperationsResponse:
        """Return the operations of a tuned model (name `tunedModels/{id}`), oldest first."""
        name = request.name.removesuffix("/operations")
        size = paging.page_size(request.page_size, DEFAULT_PAGE, "ListOperationsRequest")
        call = ("operations", caller.account, name, request.filter)
        after = paging.decode(request.page_token, *call, request="ListOperationsRequest")
        with self._database.read() as session:
            model = access.tuned_model(session, caller, name)
            jobs = select(Job).where(Job.tuned_model == model.id, Job.forgotten.is_(False))
            if after:
                jobs = jobs.where(tuple_(Job.create_time, Job.id) > after)
            found = session.scalars(jobs.order_by(Job.create_time, Job.id).limit(size + 1)).all()
            response = protos.ListOperationsResponse(
                operations=[operation_message(session, job, model) for job in found[:size]]
            )
            if len(found) > size:
                last = found[size - 1]
                response.next_page_token = paging.encode((last.create_time, last.id), *call)
            return response

    def cancel_operation(self, request: protos.CancelOperationRequest, caller: Caller) -> protos.Empty:
        """Ask for an operation's end; one that is done stays as it is."""
        with self._database.write() as session:
            job, _ = _find(session, caller, request.name)
            queue.cancel(session, job)
        return protos.Empty()

    def delete_operation(self, request: protos.DeleteOperationRequest, caller: Caller) -> protos.Empty:
        """Forget an operation's result; the tuning itself goes on."""
        with self._database.write() as session:
            job, _ = _find(session, caller, request.name)
            job.forgotten = True
        return protos.Empty()


def _find(session: Session, caller: Caller, name: str) -> tuple[Job, TunedModel]:
    """Return the job and the model of `tunedModels/{id}/operations/{id}`."""
    parent, _, job_id = name.partition("/operations/")
    model = access.tuned_model(session, caller, parent)
    job = session.get(Job, job_id)
    if job is None or job.tuned_model != model.id or job.forgotten:
        raise NotFound(f"Operation {name} does not exist.")
    return job, model
