"""Projects: what `x-goog-user-project` and a model's `readerProjectNumbers` name."""

import re
import secrets
import time
from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunesmith.auth.groups import known_accounts
from tunesmith.errors import AlreadyExists, InvalidArgument, NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import Project, ProjectMember

LARGEST_NUMBER = 2**63 - 1  # readerProjectNumbers are int64


class Projects:
    """The projects in the database; each has an id and a number, as Google Cloud's have."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, project_id: str, number: int | None = None) -> int:
        """Make a project without members and return its number.

        Args:
            project_id: What people call it.
            number: The number that models already name; None for one of 12 digits that is free.

        Raises:
            InvalidArgument: The id or the number cannot be.
            AlreadyExists: There is a project with that id or number.
        """
        if not re.fullmatch("[a-z]([a-z0-9-]{0,28}[a-z0-9])?", project_id):
            raise InvalidArgument(
                f"{project_id!r} is not a project id: use at most 30 of a-z, 0-9 and -, a letter first, no - last."
            )
        if number is not None and not 0 < number <= LARGEST_NUMBER:
            raise InvalidArgument(f"{number} is not a project number: use a positive 64-bit number.")
        number = number or 10**11 + secrets.randbelow(9 * 10**11)
        try:
            with self._database.write() as session:
                session.add(Project(number=number, id=project_id, create_time=time.time()))
        except IntegrityError:
            raise AlreadyExists(f"There is a project {project_id}, or one with the number {number}.") from None
        return number

    def list(self) -> list[tuple[Project, list[str]]]:
        """Return the projects, the oldest first, each with its members."""
        with self._database.read() as session:
            projects = session.scalars(select(Project).order_by(Project.create_time)).all()
            members = session.scalars(select(ProjectMember).order_by(ProjectMember.account)).all()
        return [(one, [who.account for who in members if who.project == one.number]) for one in projects]

    def add(self, project: str, accounts: Iterable[str]) -> None:
        """Put accounts into a project, given by id or number; those that are in it stay.

        Raises:
            NotFound: There is no such project, or no such account; then none is put in.
        """
        with self._database.write() as session:
            number = _get(session, project).number
            for account in known_accounts(session, accounts):
                session.merge(ProjectMember(project=number, account=account))

    def remove(self, project: str, accounts: Iterable[str]) -> None:
        """Take accounts out of a project.

        Raises:
            NotFound: There is no such project, or an account is not in it; then none is taken out.
        """
        with self._database.write() as session:
            found = _get(session, project)
            for account in accounts:
                member = session.get(ProjectMember, (found.number, account.strip().lower()))
                if member is None:
                    raise NotFound(f"{account} is not in the project {found.id}.")
                session.delete(member)

    def delete(self, project: str) -> None:
        """Delete a project, given by id or number; models may still list its number, which then means nobody.

        Raises:
            NotFound: There is no such project.
        """
        with self._database.write() as session:
            session.delete(_get(session, project))  # its members follow


def _get(session: Session, project: str) -> Project:
    """Return a project by its id or its number."""
    found = session.scalars(select(Project).where(Project.id == project)).first()
    if found is None and project.isdecimal() and int(project) <= LARGEST_NUMBER:
        found = session.get(Project, int(project))
    if found is None:
        raise NotFound(f"There is no project {project}. Make it with: tunesmith projects create {project}")
    return found
