"""Groups: people with whom tuned models are shared at once."""

import re
import time
from collections.abc import Iterable

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.errors import AlreadyExists, InvalidArgument, NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import Account, Group, GroupMember, Permission


class Groups:
    """The groups in the database; a group has an e-mail address, as permissions name their grantees by one."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, email: str) -> None:
        """Make a group without members.

        Raises:
            InvalidArgument: That is not an e-mail address.
            AlreadyExists: There is such a group.
        """
        email = email.strip().lower()
        if not re.fullmatch(r"[^@\s/]+@[^@\s/]+", email):
            raise InvalidArgument(
                f"{email!r} is not an e-mail address; a group has one, such as team@example.com."
            )
        try:
            with self._database.write() as session:
                session.add(Group(email=email, create_time=time.time()))
        except IntegrityError:
            raise AlreadyExists(f"There is a group {email} already.") from None

    def list(self) -> dict[str, list[str]]:
        """Return the members of each group, the oldest group first."""
        with self._database.read() as session:
            groups = session.scalars(select(Group).order_by(Group.create_time)).all()
            members = session.scalars(select(GroupMember).order_by(GroupMember.account)).all()
        return {group.email: [one.account for one in members if one.group == group.email] for group in groups}

    def add(self, email: str, accounts: Iterable[str]) -> None:
        """Put accounts into a group; those that are in it stay.

        Raises:
            NotFound: There is no such group, or no such account; then none is put in.
        """
        with self._database.write() as session:
            group = _get(session, email)
            for account in known_accounts(session, accounts):
                session.merge(GroupMember(group=group.email, account=account))

    def remove(self, email: str, accounts: Iterable[str]) -> None:
        """Take accounts out of a group.

        Raises:
            NotFound: There is no such group, or an account is not in it; then none is taken out.
        """
        with self._database.write() as session:
            group = _get(session, email)
            for account in accounts:
                member = session.get(GroupMember, (group.email, account.strip().lower()))
                if member is None:
                    raise NotFound(f"{account} is not in the group {group.email}.")
                session.delete(member)

    def delete(self, email: str) -> None:
        """Delete a group, and what is shared with it: a later group of that name starts with nothing.

        Raises:
            NotFound: There is no such group.
        """
        with self._database.write() as session:
            group = _get(session, email)
            session.execute(
                delete(Permission).where(
                    Permission.grantee_type == protos.Permission.GROUP, Permission.grantee == group.email
                )
            )
            session.delete(group)


def known_accounts(session: Session, emails: Iterable[str]) -> list[str]:
    """Return the addresses as their accounts have them.

    Raises:
        NotFound: There is no such account.
    """
    found = []
    for email in emails:
        account = session.get(Account, email.strip().lower())
        if account is None:
            raise NotFound(f"There is no account {email}. Make it with: tunesmith accounts create {email}")
        found.append(account.email)
    return found


def _get(session: Session, email: str) -> Group:
    group = session.get(Group, email.strip().lower())
    if group is None:
        raise NotFound(f"There is no group {email}. Make it with: tunesmith groups create {email}")
    return group
