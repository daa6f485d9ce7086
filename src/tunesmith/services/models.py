"""ModelService: base models, and the tuned models made from them."""

import re
import secrets
import string
from collections.abc import Iterator

from sqlalchemy import bindparam, delete, select, tuple_
from sqlalchemy.exc import IntegrityError

from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.caller import Caller
from tunesmith.errors import AlreadyExists, InvalidArgument
from tunesmith.jobs import queue
from tunesmith.services import access, datasets, filter, lineage, paging
from tunesmith.services.messages import tuned_model_message, tuned_model_messages
from tunesmith.services.operations import operation_message
from tunesmith.store import audit
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.sweep import sweep_model
from tunesmith.store.tables import Job, TunedModel
from tunesmith.store.times import now_in_microseconds
from tunesmith.training import hyperparameters

LONGEST_DISPLAY_NAME = 40
MOST_VIOLATIONS = 50
DEFAULT_MODELS_PAGE = 50
DEFAULT_TUNED_MODELS_PAGE = 10
MUTABLE = ("display_name", "description", "temperature", "top_p", "top_k", "reader_project_numbers")

_ALPHABET = string.ascii_lowercase + string.digits
_REQUEST = "CreateTunedModelRequest.tuned_model"
_EXAMPLES = f"{_REQUEST}.tuning_task.training_data.examples.examples"


class ModelService:
    """google.ai.generativelanguage.v1beta.ModelService."""

    def __init__(
        self, database: Database, artifacts: ArtifactStore, catalog: Catalog, seed: int, queued_jobs: int = 0
    ) -> None:
        self._database, self._artifacts, self._catalog = database, artifacts, catalog
        self._seed, self._queued_jobs = seed, queued_jobs
        self._tokens = paging.PageTokens(database)

    def get_model(self, request: protos.GetModelRequest, _caller: Caller) -> protos.Model:
        """Return a base model, under the name that was asked for."""
        return self._catalog.get(request.name).to_message(request.name)

    def list_models(self, request: protos.ListModelsRequest, _caller: Caller) -> protos.ListModelsResponse:
        """Return the base models and their aliases."""
        size = paging.page_size(request.page_size, DEFAULT_MODELS_PAGE, "ListModelsRequest")
        after = self._tokens.decode(request.page_token, "models", request="ListModelsRequest")
        names = self._catalog.names()
        start = int(after[0]) if after else 0
        response = protos.ListModelsResponse(
            models=[self._catalog.get(name).to_message(name) for name in names[start : start + size]]
        )
        if start + size < len(names):
            response.next_page_token = self._tokens.encode((start + size, ""), "models")
        return response

    def create_tuned_model(self, request: protos.CreateTunedModelRequest, caller: Caller) -> protos.Operation:
        """Accept a tuning job: the model, CREATING, and its job are written in one transaction."""
        given = request.tuned_model
        _refuse([*lineage.violations(self._catalog, given), *_violations(request)])
        training_data = given.tuning_task.training_data.SerializeToString()
        rows = datasets.count(given.tuning_task.training_data)
        resolved = hyperparameters.resolve(given.tuning_task.hyperparameters, rows)
        model_id = request.tuned_model_id or generate_id(given.display_name)
        audit.note(f"tunedModels/{model_id}", f"from {lineage.asked_parent(given) or given.base_model}")
        try:
            with self._database.write() as session:
                queue.check_room(session, caller.account, self._queued_jobs)
                source = lineage.source(session, self._catalog, caller, given)
                model = _new(given, f"tunedModels/{model_id}", source, resolved)
                row = TunedModel(
                    id=model_id,
                    owner=caller.account,
                    base=source.base.id,
                    message=model.SerializeToString(),
                    state=model.state,
                    create_time=model.create_time.ToMicroseconds() / 1e6,
                )
                job = Job(
                    id=_random(12),
                    tuned_model=model_id,
                    state="queued",
                    training_data=training_data,
                    seed=self._seed,
                    total_steps=hyperparameters.total_steps(rows, resolved),
                    create_time=row.create_time,
                    start=source.adapter,
                    account=caller.account,
                )
                session.add(row)
                session.flush()
                session.add(job)
                session.flush()
                return operation_message(session, job, row)
        except IntegrityError:
            raise AlreadyExists(f"Tuned model tunedModels/{model_id} already exists.") from None

    def get_tuned_model(self, request: protos.GetTunedModelRequest, caller: Caller) -> protos.TunedModel:
        """Return a tuned model."""
        asked = {"id": request.name.removeprefix("tunedModels/"), "account": caller.account}
        if own := self._database.first(_OWN_AND_DONE, asked):  # as most are
            return protos.TunedModel.FromString(own[0])
        with self._database.read() as session:
            return tuned_model_message(session, access.tuned_model(session, caller, request.name))

    def list_tuned_models(
        self, request: protos.ListTunedModelsRequest, caller: Caller
    ) -> protos.ListTunedModelsResponse:
        """Return the tuned models that the filter selects, oldest first."""
        size = paging.page_size(request.page_size, DEFAULT_TUNED_MODELS_PAGE, "ListTunedModelsRequest")
        call = ("tunedModels", caller.account, request.filter)
        after = self._tokens.decode(request.page_token, *call, request="ListTunedModelsRequest")
        wanted = select(TunedModel).where(filter.condition(request.filter, caller))
        if after:
            wanted = wanted.where(tuple_(TunedModel.create_time, TunedModel.id) > after)
        with self._database.read() as session:
            rows = session.scalars(wanted.order_by(TunedModel.create_time, TunedModel.id).limit(size + 1)).all()
            response = protos.ListTunedModelsResponse(tuned_models=tuned_model_messages(session, rows[:size]))
        if len(rows) > size:
            last = rows[size - 1]
            response.next_page_token = self._tokens.encode((last.create_time, last.id), *call)
        return response

    def update_tuned_model(self, request: protos.UpdateTunedModelRequest, caller: Caller) -> protos.TunedModel:
        """Change the fields of the mask, or without a mask every field that is set and can be changed.

        The mask `*` means every field that can be changed: what is not set is cleared.
        """
        given = request.tuned_model
        fields = _masked(request.update_mask) or [
            field.name for field, _ in given.ListFields() if field.name in MUTABLE
        ]
        audit.note(detail=_changed(fields, given))
        with self._database.write() as session:
            row = access.tuned_model(session, caller, given.name, access.WRITER, lock=True)
            message = protos.TunedModel.FromString(row.message)
            base = self._catalog.models[row.base]
            for field in fields:
                message.ClearField(field)
                if field == "reader_project_numbers":
                    message.reader_project_numbers.extend(given.reader_project_numbers)
                elif given.HasField(field) if field in _PRESENCE else getattr(given, field):
                    setattr(message, field, getattr(given, field))
                elif field in _PRESENCE:  # unset means the base model's
                    setattr(message, field, getattr(base, field))
            _refuse(list(_field_violations(message, "UpdateTunedModelRequest.tuned_model")))
            message.update_time.CopyFrom(now_in_microseconds())
            row.message = message.SerializeToString()
            return tuned_model_message(session, row)

    def delete_tuned_model(self, request: protos.DeleteTunedModelRequest, caller: Caller) -> protos.Empty:
        """Delete a tuned model with its data and its artifacts; a job that makes it ends."""
        with self._database.write() as session:
            row = access.tuned_model(session, caller, request.name, access.OWNER)
            access.remember_who_knew(session, row)
            starts = session.scalars(select(Job.start).where(Job.tuned_model == row.id)).all()
            unused = {row.id, *(start.split("/")[1] for start in starts if start)}
            session.execute(delete(TunedModel).where(TunedModel.id == row.id))  # jobs and snapshots follow
        for model_id in unused:
            sweep_model(self._database, self._artifacts, model_id)
        return protos.Empty()


_OWN_AND_DONE = select(TunedModel.message).where(
    TunedModel.id == bindparam("id"),
    TunedModel.owner == bindparam("account"),
    TunedModel.state != protos.TunedModel.CREATING,
)
_PRESENCE = frozenset(field.name for field in protos.TunedModel.DESCRIPTOR.fields if field.has_presence)


def _new(
    given: protos.TunedModel, name: str, source: lineage.Source, resolved: protos.Hyperparameters
) -> protos.TunedModel:
    """Return the message of a model that is to be tuned."""
    model = protos.TunedModel()
    model.CopyFrom(given)
    # Without the training data, which is input only: it is kept with the job.
    model.tuning_task.CopyFrom(protos.TuningTask(hyperparameters=resolved))
    source.write(model)
    model.name = name
    model.state = protos.TunedModel.CREATING
    model.create_time.CopyFrom(now_in_microseconds())
    model.update_time.CopyFrom(model.create_time)
    for field in ("temperature", "top_p", "top_k"):
        if not model.HasField(field):
            setattr(model, field, getattr(source.base, field))
    return model


def generate_id(display_name: str) -> str:
    """Return a model id as Google makes them: the display name's words, then a random part."""
    words = ("".join(re.findall("[a-z0-9]", word)) for word in display_name.lower().split())
    slug = "-".join(word for word in words if word)
    return f"{slug}-{_random(12)}" if slug else secrets.choice(string.ascii_lowercase) + _random(11)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _refuse(violations: list[tuple[str, str]]) -> None:
    if len(violations) > MOST_VIOLATIONS:
        more = len(violations) - MOST_VIOLATIONS
        violations = [*violations[:MOST_VIOLATIONS], (_EXAMPLES, f"… and {more} more of them")]
    if violations:
        raise InvalidArgument.at(violations)


def _violations(request: protos.CreateTunedModelRequest) -> Iterator[tuple[str, str]]:
    """Yield all that is wrong with a create, each with the path of its field."""
    model = request.tuned_model
    model_id = request.tuned_model_id
    if model_id and not re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", model_id):
        yield (
            "CreateTunedModelRequest.tuned_model_id",
            f"must be at most 40 of a-z, 0-9 and -, begin with a letter and not end with -, not {model_id!r}",
        )
    yield from _field_violations(model, _REQUEST)
    for field, reason in hyperparameters.violations(model.tuning_task.hyperparameters):
        yield f"{_REQUEST}.tuning_task.hyperparameters.{field}", reason
    yield from datasets.violations(model.tuning_task.training_data, f"{_REQUEST}.tuning_task.training_data")


def _field_violations(model: protos.TunedModel, path: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the fields that can also be changed later."""
    if len(model.display_name) > LONGEST_DISPLAY_NAME:
        yield f"{path}.display_name", _too_long(model.display_name, LONGEST_DISPLAY_NAME)
    if model.HasField("temperature") and not 0 <= model.temperature <= 2:
        yield f"{path}.temperature", f"must be between 0 and 2, not {model.temperature:g}"
    if model.HasField("top_p") and not 0 < model.top_p <= 1:
        yield f"{path}.top_p", f"must be above 0 and at most 1, not {model.top_p:g}"
    if model.HasField("top_k") and model.top_k < 1:
        yield f"{path}.top_k", f"must be at least 1, not {model.top_k}"
    for index, number in enumerate(model.reader_project_numbers):
        if number < 1:
            yield f"{path}.reader_project_numbers[{index}]", f"must be a project's number, not {number}"


def _changed(fields: list[str], given: protos.TunedModel) -> str:
    """Return which fields an update changes, and with whom it shares the model."""
    numbers = ",".join(map(str, given.reader_project_numbers)) or "none"
    named = (f"{field}={numbers}" if field == "reader_project_numbers" else field for field in fields)
    return ", ".join(named)


def _too_long(text: str, most: int) -> str:
    return f"must be at most {most:,} characters long, not {len(text):,}"


def _masked(mask: protos.FieldMask) -> list[str]:
    """Return the fields that a mask names, in snake_case.

    Raises:
        InvalidArgument: It names a field that cannot be changed.
    """
    if "*" in mask.paths:
        return list(MUTABLE)
    fields = [re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", path) for path in mask.paths]
    _refuse(
        [
            ("UpdateTunedModelRequest.update_mask", f"{path!r} cannot be updated; {', '.join(MUTABLE)} can")
            for path, field in zip(mask.paths, fields, strict=True)
            if field not in MUTABLE
        ]
    )
    return fields
