"""What a list costs: the number of queries does not grow with the number of models."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tunesmith import protos
from tunesmith.auth.accounts import Accounts
from tunesmith.base_models.catalog import Catalog
from tunesmith.caller import Caller
from tunesmith.config import Settings
from tunesmith.services.creation import Creation
from tunesmith.services.models import ModelService
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.store.database import Database
from tunesmith.store.tables import Job, Snapshot, TunedModel

ADA = Caller("ada@x")
STEPS = 4


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    Accounts(database).create(ADA.account)
    yield database
    database.close()


def fill(database: Database, count: int) -> None:
    """Write tuned models as they are while they are trained."""
    with database.write() as session:
        for number in range(count):
            model_id = f"m{number}"
            message = protos.TunedModel(name=f"tunedModels/{model_id}", display_name=f"model {number}")
            row = TunedModel(
                id=model_id,
                owner=ADA.account,
                base="tiny",
                message=message.SerializeToString(),
                state=protos.TunedModel.CREATING,
                create_time=float(number),
            )
            session.add(row)
            session.flush()
            job = Job(
                id=f"j{number}",
                tuned_model=model_id,
                state="running",
                training_data=b"",
                seed=0,
                total_steps=STEPS,
                create_time=float(number),
            )
            session.add(job)
            session.flush()
            session.add_all(
                Snapshot(job=job.id, step=step, epoch=0, mean_loss=step / 8, compute_time_ns=time.time_ns())
                for step in range(1, STEPS + 1)
            )


def service(database: Database, tmp_path: Path) -> ModelService:
    catalog = Catalog.load(Settings(data_dir=tmp_path))
    return ModelService(database, ArtifactStore(f"file://{tmp_path}"), catalog, Creation(database, catalog, 0))


@pytest.fixture
def queries() -> Iterator[list[str]]:
    """The statements that run."""
    ran: list[str] = []

    def note(_connection, _cursor, statement, *_rest):
        ran.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield ran
    event.remove(Engine, "before_cursor_execute", note)


def test_a_thousand_models_take_as_many_queries_as_one(
    database: Database, tmp_path: Path, queries: list[str]
) -> None:
    fill(database, 1001)
    models = service(database, tmp_path)
    counts = []
    for size in (1, 1000):
        queries.clear()
        found = models.list_tuned_models(protos.ListTunedModelsRequest(page_size=size), ADA).tuned_models
        counts.append(len(queries))
        assert [model.name for model in found] == [f"tunedModels/m{number}" for number in range(size)]
        assert all([s.step for s in model.tuning_task.snapshots] == [1, 2, 3, 4] for model in found)
    assert counts[0] == counts[1] <= 3


def test_the_page_size_is_clamped(database: Database, tmp_path: Path) -> None:
    fill(database, 1001)
    models = service(database, tmp_path)
    page = models.list_tuned_models(protos.ListTunedModelsRequest(page_size=5000), ADA)
    assert len(page.tuned_models) == 1000
    rest = protos.ListTunedModelsRequest(page_token=page.next_page_token)
    assert [model.name for model in models.list_tuned_models(rest, ADA).tuned_models] == ["tunedModels/m1000"]
    assert len(models.list_tuned_models(protos.ListTunedModelsRequest(), ADA).tuned_models) == 10
