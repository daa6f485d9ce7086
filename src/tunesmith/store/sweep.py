"""Remove artifacts that no row refers to: what a killed worker or a crash between two writes left behind."""

from sqlalchemy import select

from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, TunedModel

FOLDER = "tunedModels"


def sweep(database: Database, artifacts: ArtifactStore) -> None:
    """Delete the artifacts of deleted models, and of finished jobs all but the adapter."""
    for model_id in artifacts.children(FOLDER):
        sweep_model(database, artifacts, model_id)


def sweep_model(database: Database, artifacts: ArtifactStore, model_id: str) -> None:
    """Delete those artifacts of one model that nobody needs: neither itself nor a job that starts from it."""
    folder = f"{FOLDER}/{model_id}"
    jobs = artifacts.children(folder)  # listed before the rows are read: a row comes before its files
    if not jobs:
        return
    with database.read() as session:
        model = session.get(TunedModel, model_id)
        rows = session.execute(select(Job.id, Job.state).where(Job.tuned_model == model_id))
        states = {row.id: row.state for row in rows}
        needed: set[str | None] = {model.adapter} if model else set()
        unfinished = select(Job.start).where(Job.start.startswith(f"{folder}/"), Job.state != "done")
        needed |= set(session.scalars(unfinished))
    if model is None and not needed:
        artifacts.delete(folder)
        return
    for job_id in jobs:
        if states.get(job_id, "done") == "done":
            _delete_all_but(needed, artifacts, f"{folder}/{job_id}")


def _delete_all_but(needed: set[str | None], artifacts: ArtifactStore, folder: str) -> None:
    paths = {f"{folder}/{name}" for name in artifacts.children(folder)}
    for path in paths - needed if paths & needed else [folder]:
        artifacts.delete(path)
