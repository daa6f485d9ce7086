"""ModelService: base models, and the tuned models made from them."""

import re

from sqlalchemy import bindparam, delete, select, tuple_

from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.caller import Caller
from tunesmith.services import access, filter, paging
from tunesmith.services.creation import Creation, field_violations, refuse
from tunesmith.services.messages import tuned_model_message, tuned_model_messages
from tunesmith.store import audit
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.sweep import sweep_model
from tunesmith.store.tables import Job, TunedModel
from tunesmith.store.times import now_in_microseconds

DEFAULT_MODELS_PAGE = 50
DEFAULT_TUNED_MODELS_PAGE = 10
MUTABLE = ("display_name", "description", "temperature", "top_p", "top_k", "reader_project_numbers")


class ModelService:
    """google.ai.generativelanguage.v1beta.ModelService."""

    def __init__(self, database: Database, artifacts: ArtifactStore, catalog: Catalog, creation: Creation) -> None:
        self._database, self._artifacts, self._catalog = database, artifacts, catalog
        self._creation = creation
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
        return self._creation.create(request, caller)

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
            refuse(list(field_violations(message, "UpdateTunedModelRequest.tuned_model")))
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


def _changed(fields: list[str], given: protos.TunedModel) -> str:
    """Return which fields an update changes, and with whom it shares the model."""
    numbers = ",".join(map(str, given.reader_project_numbers)) or "none"
    named = (f"{field}={numbers}" if field == "reader_project_numbers" else field for field in fields)
    return ", ".join(named)


def _masked(mask: protos.FieldMask) -> list[str]:
    """Return the fields that a mask names, in snake_case.

    Raises:
        InvalidArgument: It names a field that cannot be changed.
    """
    if "*" in mask.paths:
        return list(MUTABLE)
    fields = [re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", path) for path in mask.paths]
    refuse(
        [
            ("UpdateTunedModelRequest.update_mask", f"{path!r} cannot be updated; {', '.join(MUTABLE)} can")
            for path, field in zip(mask.paths, fields, strict=True)
            if field not in MUTABLE
        ]
    )
    return fields
