"""Remove artifacts that no row refers to: what a killed worker or a crash between two writes left behind."""

from sqlalchemy import select

from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, TunedModel

FOLDER = "tunedModels"


def sweep(database: Database, artifacts: ArtifactStore) -> None:
    """Delete the artifacts of deleted models, and of finished jobs all but the adapter."""
    for model_id in artifacts.children(FOLDER):  # listed before the rows are read: a row comes before its files
        with database.read() as session:
            model = session.get(TunedModel, model_id)
            states = {job.id: job.state for job in session.scalars(select(Job).where(Job.tuned_model == model_id))}
        if model is None:
            artifacts.delete(f"{FOLDER}/{model_id}")
            continue
        for job_id in artifacts.children(f"{FOLDER}/{model_id}"):
            if job_id not in states:
                artifacts.delete(f"{FOLDER}/{model_id}/{job_id}")
            elif states[job_id] == "done":
                for name in artifacts.children(f"{FOLDER}/{model_id}/{job_id}"):
                    path = f"{FOLDER}/{model_id}/{job_id}/{name}"
                    if path != model.adapter:
                        artifacts.delete(path)
