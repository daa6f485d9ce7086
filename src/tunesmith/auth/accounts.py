"""Accounts: the people who may call the API."""

import re
import time

from argon2 import PasswordHasher
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from tunesmith.errors import AlreadyExists, InvalidArgument, NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import Account


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
        email = email.strip().lower()
        if not re.fullmatch(r"[^@\s/]+@[^@\s/]+", email):
            raise InvalidArgument(f"{email!r} is not an e-mail address.")
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
