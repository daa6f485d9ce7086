"""The database: migrations, transactions, several writers."""

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from tunesmith.errors import Unavailable
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


def test_a_database_that_another_process_locks_is_unavailable_to_writers(url: str) -> None:
    database = Database(url, busy_seconds=0.3)
    database.migrate()
    locked = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    refused, began = list[Unavailable](), time.monotonic()

    def write() -> None:
        try:
            with database.write() as session:
                session.add(Account(email="ada@example.com", password_hash=None, create_time=0.0))
        except Unavailable as error:
            refused.append(error)

    threads = [threading.Thread(target=write) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 20 * 0.3 / 2  # they do not wait for one another
    assert {error.message.partition(".")[0] for error in refused} == {
        "The server's database is locked by another process"
    }
    assert len(refused) == 20
    with database.read() as session:
        assert session.get(Account, "ada@example.com") is None
    locked.execute("ROLLBACK")
    locked.close()
    write()
    assert len(refused) == 20
    database.close()


def test_faults_of_ours_are_not_the_databases(url: str) -> None:
    database = Database(url)
    database.migrate()
    with pytest.raises(OperationalError, match="no such table"), database.read() as session:
        session.execute(text("SELECT * FROM absent"))
    database.close()
