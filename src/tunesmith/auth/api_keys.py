"""API keys. Only their hashes are stored; a key is shown once."""

import logging
import secrets
import threading
import time
from collections.abc import Iterable
from queue import SimpleQueue
from typing import NamedTuple

from sqlalchemy import bindparam, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.auth.scopes import known_scope
from tunesmith.auth.tokens import digest
from tunesmith.errors import InvalidArgument, NotFound, Unavailable
from tunesmith.store import audit
from tunesmith.store.database import Database
from tunesmith.store.tables import Account, ApiKey

PREFIX = "tsk_"
USE_SECONDS = 60.0  # the least time between two times of use that are written
LONGEST_NAME = 100  # characters

log = logging.getLogger(__name__)


class ApiKeys:
    """The keys in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._noted: dict[str, float] = {}  # by id of the key
        self._uses: SimpleQueue[tuple[str, float] | None] = SimpleQueue()
        self._writer: threading.Thread | None = None

    def create(
        self, email: str, name: str = "", seconds: float | None = None, scopes: Iterable[str] = ()
    ) -> tuple[str, str]:
        """Return the id of a new key and the key.

        Args:
            email: The account that it stands for.
            name: What to call it, in one line.
            seconds: How long it is good; None until it is revoked.
            scopes: What it may do, in full or as `known_scope` takes them; none for all that the account may.

        Raises:
            NotFound: There is no such account.
            InvalidArgument: The name, the time or a scope cannot be.
        """
        key, key_id, now = PREFIX + secrets.token_urlsafe(32), secrets.token_hex(6), time.time()
        name = name.strip()
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise InvalidArgument(f"name: use at most {LONGEST_NAME} characters, in one line.")
        if seconds is not None and seconds <= 0:
            raise InvalidArgument("expires: a key that has expired already is of no use; give a longer time.")
        granted = " ".join(dict.fromkeys(map(known_scope, scopes)))
        with self._database.write() as session:
            account = session.get(Account, email.strip().lower())
            if account is None:
                raise NotFound(f"There is no account {email}. Make it with: tunesmith accounts create {email}")
            audit.note(f"apiKeys/{key_id}", f"for {account.email}")
            session.add(
                ApiKey(
                    id=key_id,
                    key_hash=digest(key),
                    account=account.email,
                    create_time=now,
                    name=name,
                    scopes=granted,
                    expire_time=None if seconds is None else now + seconds,
                )
            )
        return key_id, key

    def list(self, email: str) -> list[ApiKey]:
        """Return an account's keys, the oldest first."""
        with self._database.read() as session:
            keys = select(ApiKey).where(ApiKey.account == email.strip().lower())
            return [*session.scalars(keys.order_by(ApiKey.create_time))]

    def revoke(self, key_id: str) -> None:
        """Refuse a key from now on.

        Raises:
            NotFound: There is no such key.
        """
        with self._database.write() as session:
            key = session.get(ApiKey, key_id)
            if key is None:
                raise NotFound(f"There is no API key {key_id}.")
            key.revoked = True

    def find(self, key: str) -> "FoundKey | None":
        """Return a key that is known, not revoked, and whose account is not disabled; it may be expired."""
        row = self._database.first(_FIND, {"key_hash": digest(key)})
        if row is None:
            return None
        key_id, account, scopes, expire_time = row
        now = time.time()
        found = FoundKey(key_id, account, scopes, expired=expire_time is not None and expire_time <= now)
        if not found.expired and now - self._noted.get(key_id, 0.0) >= USE_SECONDS:
            self._noted[key_id] = now
            self._uses.put((key_id, now))
        return found

    def start(self) -> None:
        """Begin to write when keys are used, in a thread: a request never waits for it."""
        self._writer = threading.Thread(target=self._write_uses, name="key-uses", daemon=True)
        self._writer.start()

    def stop(self) -> None:
        """Write what is not written yet, and end the thread."""
        if self._writer is not None:
            self._uses.put(None)
            self._writer.join()

    def _write_uses(self) -> None:
        while (use := self._uses.get()) is not None:
            key_id, now = use
            # Another server of this database may have written it within the minute.
            older = or_(ApiKey.last_use_time.is_(None), ApiKey.last_use_time <= now - USE_SECONDS)
            written = update(ApiKey).where(ApiKey.id == key_id, older).values(last_use_time=now)
            try:
                with self._database.write() as session:
                    session.execute(written)
            except (SQLAlchemyError, Unavailable) as error:  # the next use is a minute later
                log.warning("cannot write when the API key %s was used: %s", key_id, error)


class FoundKey(NamedTuple):
    """A key's id, the account that it stands for, its scopes, separated by spaces, and whether it is past."""

    id: str
    account: str
    scopes: str
    expired: bool


# Built once: every request runs it.
_FIND = (
    select(ApiKey.id, ApiKey.account, ApiKey.scopes, ApiKey.expire_time)
    .join(Account, Account.email == ApiKey.account)
    .where(ApiKey.key_hash == bindparam("key_hash"), ApiKey.revoked.is_(False), Account.disabled.is_(False))
)
