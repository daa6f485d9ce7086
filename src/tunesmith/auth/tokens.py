"""Access tokens of our own making. Only their hashes are stored."""

import hashlib
import secrets
import time
from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from tunesmith.auth.scopes import CLOUD_PLATFORM, TUNING
from tunesmith.errors import NotFound
from tunesmith.store import audit
from tunesmith.store.database import Database
from tunesmith.store.tables import AccessToken, Account

PREFIX = "tst."
DEFAULT_SCOPES = (CLOUD_PLATFORM, TUNING)
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
        with self._database.write() as session:
            account = session.get(Account, email.strip().lower())
            if account is None:
                raise NotFound(f"There is no account {email}. Make it with: tunesmith accounts create {email}")
            return new_token(session, account.email, " ".join(scopes), seconds)

    def find(self, token: str) -> "Grant | None":
        """Return what a token grants that is good now: known, not expired, its account not disabled."""
        found = self._database.first(_FIND, {"token_hash": digest(token), "now": time.time()})
        return Grant(*found) if found else None


def new_token(
    session: Session, account: str, scopes: str, seconds: float, authorization: str | None = None
) -> str:
    """Add a token to a session's changes and return it.

    Args:
        session: Of a `Database.write()`.
        account: The e-mail address of an account.
        scopes: Separated by spaces.
        seconds: How long it is good.
        authorization: Id of the authorization that it ends with.
    """
    token, now = PREFIX + secrets.token_urlsafe(32), time.time()
    audit.tell(session, account, "IssueToken", f"accounts/{account}", f"good for {seconds:g} s")
    session.add(
        AccessToken(
            token_hash=digest(token),
            account=account,
            scopes=scopes,
            create_time=now,
            expire_time=now + seconds,
            authorization=authorization,
        )
    )
    return token


class Grant(NamedTuple):
    """Whom a token stands for, and the scopes it has, separated by spaces."""

    account: str
    scopes: str


# Built once: every request runs it.
_FIND = (
    select(AccessToken.account, AccessToken.scopes)
    .join(Account, Account.email == AccessToken.account)
    .where(
        AccessToken.token_hash == bindparam("token_hash"),
        AccessToken.expire_time >= bindparam("now"),
        Account.disabled.is_(False),
    )
)
