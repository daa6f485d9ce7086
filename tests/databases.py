"""Databases for tests: SQLite, and PostgreSQL where one is at hand."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tunesmith.store.database import Database

POSTGRESQL = "TUNESMITH_TEST_POSTGRESQL"


def each_database(kind: str, path: Path) -> Iterator[Database]:
    """Yield an empty database of a kind: `sqlite` or `postgresql`."""
    url = f"sqlite:///{path / 'test.db'}" if kind == "sqlite" else os.environ.get(POSTGRESQL, "")
    if not url:
        pytest.skip(f"set {POSTGRESQL} to the SQLAlchemy URL of a PostgreSQL database that may be emptied")
    if kind == "postgresql":
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        engine.dispose()
    database = Database(url)
    database.migrate()
    yield database
    database.close()
