"""API keys. Only their hashes are stored; a key is shown once."""

import secrets
import time

from sqlalchemy import bindparam, select

from tunesmith.auth.tokens import digest
from tunesmith.errors import NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import Account, ApiKey

PREFIX = "tsk_"


class ApiKeys:
    """The keys in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, email: str) -> tuple[str, str]:
        """Return the id of a new key and the key.

        Raises:
            NotFound: There is no such account.
        """
        key, key_id = PREFIX + secrets.token_urlsafe(32), secrets.token_hex(6)
        with self._database.write() as session:
            account = session.get(Account, email.strip().lower())
            if account is None:
                raise NotFound(f"There is no account {email}. Make it with: tunesmith accounts create {email}")
            session.add(ApiKey(id=key_id, key_hash=digest(key), account=account.email, create_time=time.time()))
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

    def find(self, key: str) -> str | None:
        """Return the account of a key that is good: known, not revoked, its account not disabled."""
        found = self._database.first(_FIND, {"key_hash": digest(key)})
        return found[0] if found else None


# Built once: every request runs it.
_FIND = (
    select(ApiKey.account)
    .join(Account, Account.email == ApiKey.account)
    .where(ApiKey.key_hash == bindparam("key_hash"), ApiKey.revoked.is_(False), Account.disabled.is_(False))
)
