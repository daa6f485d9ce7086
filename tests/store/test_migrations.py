"""Databases of earlier versions keep what they hold."""

from importlib.resources import files
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, select, text

from tunesmith import protos
from tunesmith.store.database import Database
from tunesmith.store.tables import DeletedModel, Job, Snapshot, TunedModel


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


def migrate(url: str, revision: str) -> None:
    """Make the schema of an earlier version."""
    config = Config()
    config.set_main_option("script_location", str(files("tunesmith.store") / "migrations"))
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_models_of_the_first_version(url: str) -> None:
    migrate(url, "0001")
    message = protos.TunedModel(
        name="tunedModels/old", display_name="Old ONE", description="kept", reader_project_numbers=[7, 8]
    )
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO accounts VALUES ('ada@x', NULL, 0, 1.0)"))
        connection.execute(
            text("INSERT INTO tuned_models VALUES ('old', 'ada@x', 'tiny', :message, 2, 1.0, 'a')"),
            {"message": message.SerializeToString()},
        )
        connection.execute(
            text(
                "INSERT INTO jobs (id, tuned_model, state, training_data, seed, total_steps, create_time, attempt,"
                " fruitless_attempts, cancelled, forgotten)"
                " VALUES ('j', 'old', 'done', x'', 0, 1, 1.0, 1, 0, 0, 0)"
            )
        )
        connection.execute(text("INSERT INTO deleted_models VALUES ('gone', 'ada@x')"))
        columns = "(job, step, epoch, mean_loss, compute_time_ns)"
        connection.execute(
            text(f"INSERT INTO snapshots {columns} VALUES ('j', 2, 1, 0.5, 2), ('j', 1, 0, 1.5, 1000000001)")
        )
    engine.dispose()
    database = Database(url)
    database.migrate()
    with database.read() as session:
        model = session.get_one(TunedModel, "old")
        assert (model.owner, model.search_text, model.reader_projects) == ("ada@x", "old one\nkept", ",7,,8,")
        assert session.get_one(DeletedModel, ("gone", "ada@x")).account == "ada@x"
        assert session.scalars(select(Job.id)).all() == ["j"]
        steps = protos.TunedModel.FromString(model.message).tuning_task.snapshots
        assert [(step.step, step.epoch, step.mean_loss) for step in steps] == [(1, 0, 1.5), (2, 1, 0.5)]
        assert [step.compute_time.ToNanoseconds() for step in steps] == [1_000_000_001, 2]
        assert session.scalars(select(Snapshot.step)).all() == []
    database.close()
