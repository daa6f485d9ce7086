"""Access tokens of our own making. Only their hashes are stored."""

import hashlib
import secrets
import time
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import bindparam, select

from tunesmith.errors import NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import AccessToken, Account

PREFIX = "tst."
AUTH = "https://www.googleapis.com/auth/"
DEFAULT_SCOPES = (f"{AUTH}cloud-platform", f"{AUTH}generative-language.tuning")
"""What the tutorial asks for."""


def digest(secret: str) -> str:
    """Return the hash under which a token or key is stored; it has the entropy that a password lacks."""
    return hashlib.sha256(secret.encode()).hexdigest()


class AccessTokens:
    """Bearer tokens."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, email: str, scopes: Iterable[str], seconds: float) -> str:
        """Return a new token for an account, good for so many seconds.

        Raises:
            NotFound: There is no such account.
        """
        token = PREFIX + secrets.token_urlsafe(32)
        now = time.time()
        with self._database.write() as session:
            account = session.get(Account, email.strip().lower())
            if account is None:
                raise NotFound(f"There is no account {email}. Make it with: tunesmith accounts create {email}")
            session.add(
                AccessToken(
                    token_hash=digest(token),
                    account=account.email,
                    scopes=" ".join(scopes),
                    create_time=now,
                    expire_time=now + seconds,
                )
            )
        return token

    def find(self, token: str) -> "Grant | None":
        """Return what a token grants that is good now: known, not expired, its account not disabled."""
        with self._database.read() as session:
            values = {"token_hash": digest(token), "now": time.time()}
            found = session.connection().execute(_FIND, values).first()
            return None if found is None else Grant(*found)


class Grant(NamedTuple):
    """Whom a token stands for, and the scopes it has, separated by spaces."""

    account: str
    scopes: str


# Every request runs it: it is built once, and makes no objects of the session.
_FIND = (
    select(AccessToken.account, AccessToken.scopes)
    .join(Account, Account.email == AccessToken.account)
    .where(
        AccessToken.token_hash == bindparam("token_hash"),
        AccessToken.expire_time >= bindparam("now"),
        Account.disabled.is_(False),
    )
)
