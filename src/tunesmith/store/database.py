"""Connections and transactions: SQLite in WAL mode or PostgreSQL, one code path."""

import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, TypeVarTuple

from sqlalchemy import Connection, Engine, Select, create_engine, event, exc, inspect, make_url, text
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler

from tunesmith import protos
from tunesmith.errors import Unavailable
from tunesmith.store import audit

BUSY_SECONDS = 10.0
RETRY_SECONDS = 5.0
"""When to try again what the database could not do: whoever locks it or fills its disk takes seconds at least."""
SQLITE_CONNECTIONS = 40  # kept open, as many as threads use at a time; opening one takes longer than most reads

_SQLITE_TROUBLES = {
    "BUSY": "is locked by another process",
    "LOCKED": "is locked by another process",
    "FULL": "has no space left on its disk",
    "IOERR": "cannot be read or written, perhaps for want of space on its disk",
    "CANTOPEN": "cannot be opened",
    "READONLY": "cannot be written",
}
"""By the first word of SQLite's result codes; other errors are faults of ours."""

_MIGRATIONS = files(__package__).joinpath("migrations")

_Columns = TypeVarTuple("_Columns")

logger = logging.getLogger(__name__)


class DatabaseUnavailable(Unavailable):
    """The database is locked, has no space left, or cannot be reached; another try may succeed."""


class Database:
    """The database at a SQLAlchemy URL; safe to share between threads.

    Whatever reads or writes raises DatabaseUnavailable when that is not possible for now.

    Args:
        url: The SQLAlchemy URL.
        busy_seconds: How long to wait for a SQLite file that another process has locked.
    """

    def __init__(self, url: str, busy_seconds: float = BUSY_SECONDS) -> None:
        self._engine, self._busy_seconds = _engine(url, busy_seconds), busy_seconds
        # SQLite has one writer at a time, and lets the others try again and again, in no order.
        self._writing = threading.Lock()
        self._compiled: dict[Select[*tuple[Any, ...]], SQLCompiler] = {}

    @property
    def in_process(self) -> bool:
        """Whether a read is a look at pages in memory, and never waits for the network."""
        return self._engine.dialect.name == "sqlite"

    def migrate(self) -> None:
        """Bring the schema up to date; processes that start together take turns."""
        if self._revision() == _newest_revision():
            return  # as nearly always: alembic takes a fifth of a second to find that out
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7386)")  # one migration at a time
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _revision(self) -> str | None:
        """Return the schema's revision; None when there is no schema."""
        with self._engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session over one consistent state of the database; what it changes is not kept."""
        with self._troubles(), Session(self._engine) as session:
            yield session

    def first(self, statement: Select[*_Columns], values: Mapping[str, object]) -> tuple[*_Columns] | None:
        """Return the first row of a query that stands alone, of columns that the driver gives as they are.

        What every request asks is asked so: compiled once and run on the bare driver, it takes a tenth of the
        time that it takes through a session. The statement is built once, or it would be compiled each time.
        """
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = statement.compile(self._engine)
        named = compiled.construct_params(values)
        parameters = [named[name] for name in compiled.positiontup or ()] if compiled.positional else named
        try:
            connection = self._engine.raw_connection()
            try:
                driver: Any = connection.driver_connection
                row: tuple[*_Columns] | None = driver.execute(compiled.string, parameters).fetchone()
                return row
            finally:
                connection.close()
        except (exc.OperationalError, sqlite3.OperationalError) as error:
            raise self._trouble(error) from error

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are committed when the block ends, or all undone when it raises.

        The commit takes along the record of the change under way, see `audit.py`.
        """
        writing = self._engine.execution_options(writes=True)
        with self._troubles(), self._turn(), Session(writing) as session, session.begin():
            yield session
            if change := audit.unrecorded():
                session.add(change.row())
        if change:
            change.recorded = True

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the threads of this process that write, no longer than for another process."""
        if not self.in_process:
            yield
            return
        if not self._writing.acquire(timeout=self._busy_seconds):
            raise _unavailable("is locked by another process")
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        try:
            yield
        except (exc.OperationalError, exc.InterfaceError, sqlite3.OperationalError) as error:
            raise self._trouble(error) from error

    def _trouble(self, error: Exception) -> Exception:
        """Return what a driver's error is to callers: itself, unless it says that the database is unavailable."""
        cause = error.orig if isinstance(error, exc.DBAPIError) else error
        found: str | None = "is not available"
        if isinstance(cause, sqlite3.Error):
            found = _SQLITE_TROUBLES.get(getattr(cause, "sqlite_errorname", "SQLITE_ERROR").split("_")[1])
        if found is None:
            return error
        where = self._engine.url.database if self.in_process else self._engine.url.render_as_string()
        logger.error("the database %s %s: %s", where, found, cause)
        return _unavailable(found)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _unavailable(trouble: str) -> DatabaseUnavailable:
    retry = protos.RetryInfo()
    retry.retry_delay.FromMilliseconds(round(RETRY_SECONDS * 1000))
    message = f"The server's database {trouble}. Please retry; when it stays so, tell the server's operator."
    return DatabaseUnavailable(message, [retry])


def _engine(url: str, busy_seconds: float) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": busy_seconds}, pool_size=SQLITE_CONNECTIONS)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's begin event below opens transactions
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # an accepted job survives a power cut
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes the write lock at once: one that reads first and upgrades could fail at the upgrade.
        writes = connection.get_execution_options().get("writes", False)
        driver: Any = connection.connection.driver_connection  # a third of the time that SQLAlchemy's way takes
        driver.execute("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _newest_revision() -> str:
    """Return the revision that this version has; each one's file begins with it."""
    names = (file.name for file in _MIGRATIONS.joinpath("versions").iterdir())
    return max(name.partition("_")[0] for name in names if name.endswith(".py"))
