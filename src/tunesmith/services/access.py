"""Who may do what with a tuned model."""

from sqlalchemy.orm import Session

from tunesmith.caller import Caller
from tunesmith.errors import NotFound, PermissionDenied
from tunesmith.store.tables import DeletedModel, TunedModel


def tuned_model(session: Session, caller: Caller, name: str) -> TunedModel:
    """Return the row of `tunedModels/{id}` when the caller owns it.

    Raises:
        NotFound: It was the caller's, and is deleted.
        PermissionDenied: It is somebody else's, or never was: only its owner may tell the two apart.
    """
    model_id = name.removeprefix("tunedModels/")
    row = session.get(TunedModel, model_id)
    if row is not None and row.owner == caller.account:
        return row
    deleted = session.get(DeletedModel, (model_id, caller.account))
    if row is None and deleted is not None:
        raise NotFound(f"Tuned model {name} does not exist.")
    raise PermissionDenied(f"You do not have permission to access tuned model {name}.")
