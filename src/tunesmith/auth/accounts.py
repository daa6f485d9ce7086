"""Accounts: the people who may call the API."""

import re
import secrets
import threading
import time
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from tunesmith.errors import AlreadyExists, InvalidArgument, NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import Account, Authorization, BrowserSession

_hashing = threading.BoundedSemaphore(2)  # each takes 64 MiB and all cores for a moment


class Accounts:
    """The accounts in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, email: str, password: str | None = None) -> None:
        """Make an account; without a password it can use tokens and keys, and cannot sign in.

        Raises:
            InvalidArgument: That is not an e-mail address.
            AlreadyExists: There is such an account.
        """
        email = check_email(email)
        hashed = PasswordHasher().hash(password) if password else None
        try:
            with self._database.write() as session:
                session.add(Account(email=email, password_hash=hashed, create_time=time.time()))
        except IntegrityError:
            raise AlreadyExists(f"There is an account {email} already.") from None

    def list(self) -> list[Account]:
        """Return all accounts, the oldest first."""
        with self._database.read() as session:
            return [*session.scalars(select(Account).order_by(Account.create_time))]

    def disable(self, email: str) -> None:
        """Refuse an account's tokens and keys from now on; its models stay.

        Raises:
            NotFound: There is no such account.
        """
        with self._database.write() as session:
            account = session.get(Account, email.strip().lower())
            if account is None:
                raise NotFound(f"There is no account {email}.")
            account.disabled = True

    def set_password(self, email: str, password: str) -> None:
        """Give an account a new password, and end its browser sessions and what it allowed programs to do.

        Raises:
            NotFound: There is no such account.
            InvalidArgument: It is a service account, or the password is empty.
        """
        if not password:
            raise InvalidArgument("The password is empty.")
        hashed = PasswordHasher().hash(password)
        with self._database.write() as session:
            account = session.get(Account, email.strip().lower())
            if account is None:
                raise NotFound(f"There is no account {email}. Make it with: tunesmith accounts create {email}")
            if account.service:
                raise InvalidArgument(f"{account.email} is a service account, which signs in with its keys only.")
            account.password_hash = hashed
            for table in (BrowserSession, Authorization):
                session.execute(delete(table).where(table.account == account.email))

    def with_password(self, email: str, password: str) -> str | None:
        """Return the address of the account with that password; None for all others, after the same time."""
        with self._database.read() as session:
            account = session.get(Account, email.strip().lower())
            hashed = account.password_hash if account and not account.disabled else None
        with _hashing:
            try:
                PasswordHasher().verify(hashed or _hash_of_nothing(), password)
            except VerifyMismatchError:
                return None
        return account.email if account and hashed else None


def check_email(email: str) -> str:
    """Return an address as accounts have it.

    Raises:
        InvalidArgument: That is not an e-mail address.
    """
    email = email.strip().lower()
    if not re.fullmatch(r"[^@\s/]+@[^@\s/]+", email):
        raise InvalidArgument(f"{email!r} is not an e-mail address.")
    return email


@cache
def _hash_of_nothing() -> str:
    return PasswordHasher().hash(secrets.token_urlsafe(32))
