"""The database: migrations, transactions, several writers."""

import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from tunesmith.store.database import Database
from tunesmith.store.tables import Account, Table


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'test.db'}"


def test_the_migrations_make_the_tables(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.migrate()  # again changes nothing
    database.close()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_processes_that_start_together_take_turns(url: str) -> None:
    failures: list[Exception] = []

    def migrate() -> None:
        database = Database(url)
        try:
            database.migrate()
        except Exception as error:  # noqa: BLE001 — whatever it is, the test shows it
            failures.append(error)
        database.close()

    threads = [threading.Thread(target=migrate) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_write_is_whole_or_nothing(url: str) -> None:
    database = Database(url)
    database.migrate()

    def fail_half_way() -> None:
        with database.write() as session:
            session.add(Account(email="a", create_time=0.0))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    with database.read() as session:
        assert session.get(Account, "a") is None
    database.close()


def test_writers_wait_for_each_other(url: str) -> None:
    database = Database(url)
    database.migrate()
    with database.write() as session:
        session.add(Account(email="counter", password_hash="0", create_time=0.0))

    def count(through: Database) -> None:
        for _ in range(25):
            with through.write() as session:
                account = session.get_one(Account, "counter")
                account.password_hash = str(int(account.password_hash or 0) + 1)

    others = [Database(url), Database(url)]  # as other processes have them
    threads = [threading.Thread(target=count, args=[through]) for through in [database, *others] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.get_one(Account, "counter").password_hash == "225"
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
    for each in [database, *others]:
        each.close()
