"""Where a tuned model's weights are, and where a new one's come from."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.base_models.catalog import BaseModel, Catalog
from tunesmith.caller import Caller
from tunesmith.errors import FailedPrecondition, NotFound
from tunesmith.services import access
from tunesmith.store.tables import Job, TunedModel


@dataclass(frozen=True)
class Source:
    """What a new model is tuned from.

    Attributes:
        base: The base model, in the end.
        name: The base model as its first request named it.
        parent: `tunedModels/{id}` whose weights training goes on from; None for the base model's own.
        adapter: Path of the parent's adapter in the artifact store.
    """

    base: BaseModel
    name: str
    parent: str | None = None
    adapter: str | None = None

    def write(self, model: protos.TunedModel) -> None:
        """Put the source into a tuned model's message, as it is shown."""
        if self.parent is None:
            model.base_model = self.name
        else:
            model.tuned_model_source.tuned_model = self.parent
            model.tuned_model_source.base_model = self.name


def asked_parent(model: protos.TunedModel) -> str | None:
    """Return the tuned model that a create names as its source, in either of the ways that clients know."""
    if model.HasField("tuned_model_source"):
        return model.tuned_model_source.tuned_model
    return model.base_model if model.base_model.startswith("tunedModels/") else None


def source(session: Session, catalog: Catalog, caller: Caller, model: protos.TunedModel) -> Source:
    """Return what a create asks to tune.

    The parent's row is locked: a delete that comes now waits for the transaction's end, sees the new job, and
    leaves it the adapter.

    Raises:
        NotFound: There is no such model.
        PermissionDenied: The caller may not read the parent.
        FailedPrecondition: The parent has no weights, now or ever.
    """
    parent = asked_parent(model)
    if parent is None:
        base = catalog.find(model.base_model)
        if base is None:
            raise NotFound(f"{model.base_model} is not found for CREATE TUNED MODEL at API version v1beta.")
        return Source(base, model.base_model)
    row = access.tuned_model(session, caller, parent, lock=True)
    message = protos.TunedModel.FromString(row.message)
    return Source(
        catalog.get(f"models/{row.base}"),
        message.tuned_model_source.base_model or message.base_model,
        parent,
        adapter_of(session, row),
    )


def adapter_of(session: Session, row: TunedModel) -> str:
    """Return the path of a tuned model's adapter in the artifact store.

    Raises:
        FailedPrecondition: It has none, now or ever; the message names the model's state and why.
    """
    if row.adapter is not None:
        return row.adapter
    name = f"tunedModels/{row.id}"
    job = session.scalars(select(Job).where(Job.tuned_model == row.id)).one()
    if row.state == protos.TunedModel.CREATING:
        operation = f"{name}/operations/{job.id}"
        raise FailedPrecondition(
            f"Tuned model {name} is in state CREATING: wait until its operation {operation} is done."
        )
    reason = protos.Status.FromString(job.error or b"").message
    raise FailedPrecondition(f"Tuned model {name} is in state FAILED: {reason}")


def violations(catalog: Catalog, model: protos.TunedModel, path: str) -> list[tuple[str, str]]:
    """Return what is wrong with how a create names its source, each with the path of its field."""
    parent = asked_parent(model)
    if parent is None and not model.base_model:
        tunable = ", ".join(f"models/{name}" for name in catalog.models)
        return [(f"{path}.base_model", f"base_model is not specified; this server tunes {tunable}")]
    if parent is not None and not (parent.startswith("tunedModels/") and parent.count("/") == 1):
        field = f"{path}.tuned_model_source.tuned_model"
        return [(field, f"must look like tunedModels/{{id}}, not {parent!r}")]
    return []
