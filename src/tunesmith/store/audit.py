"""The audit record: who did what to what, when and from where; written together with what was done.

A change is announced where it is known who makes it: by the dispatcher and by the commands. The first transaction
that commits within the announcement takes the record along, so that there is none without the other. What sign-in
does, it tells by itself, because only there it turns out whose sign-in it was. Triggers in the database refuse to
change or remove what is recorded.
"""

import getpass
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, or_, select
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.caller import Caller
from tunesmith.errors import ApiError, InvalidArgument, Unavailable
from tunesmith.store.tables import Account, AuditRecord

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tunesmith.store.database import Database

LONGEST = 300  # characters of a field
HOUR = 3600.0  # seconds
NOTHING_TRIED = frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "CANCELLED", "UNAVAILABLE"})
"""Refusals that go unrecorded: they say nothing of rights, and who is over a limit must not fill the record."""

log = logging.getLogger(__name__)


@dataclass
class Change:
    """What is about to be done, and its outcome."""

    caller: Caller
    action: str
    resource: str = ""
    detail: str = ""
    outcome: str = "OK"
    recorded: bool = False
    prunes_before: float | None = None

    def row(self) -> AuditRecord:
        """Return it as a row."""
        return AuditRecord(
            time=time.time(),
            account=_plain(self.caller.account),
            credential=_plain(self.caller.credential),
            action=self.action,
            resource=_plain(self.resource),
            outcome=self.outcome,
            detail=_plain(self.detail),
            address=_plain(self.caller.address),
            project=_plain(self.caller.project) if self.caller.project else None,
            prunes_before=self.prunes_before,
        )


_under_way: ContextVar[Change | None] = ContextVar("change", default=None)
_origin: ContextVar[Caller | None] = ContextVar("origin", default=None)


def note(resource: str = "", detail: str = "") -> None:
    """Say of the change under way what only its doer knows, such as the name of what it makes; never a secret."""
    change = _under_way.get()
    if change is not None:
        change.resource = resource or change.resource
        change.detail = detail or change.detail


@contextmanager
def request_from(address: str, credential: str = "") -> Iterator[None]:
    """Say for `tell`, within the block, from which network address a request comes and what it brings."""
    before = _origin.set(Caller("", credential=credential, address=address))
    try:
        yield
    finally:
        _origin.reset(before)


def tell(
    session: "Session", account: str, action: str, resource: str, detail: str = "", outcome: str = "OK"
) -> None:
    """Record, in a transaction, what an account does; part of the change under way, if there is one.

    Args:
        session: Of a `Database.write()`.
        account: Whose doing it is; empty when that is unknown.
        action: As in `Audit.change`.
        resource: What it is done to.
        detail: A few words more; never a secret.
        outcome: OK, or the name of a canonical code.
    """
    if _under_way.get() is not None:
        note(resource, detail)
    else:
        caller = replace(_origin.get() or Caller(""), account=account)
        session.add(Change(caller, action, resource, detail, outcome).row())


def tell_refused_sign_in(session: "Session", email: str, outcome: str) -> None:
    """Record that somebody was refused.

    An address that no account has is left out: people type passwords where it belongs. So are tries over the
    limit, or who guesses would fill the record.
    """
    known = session.get(Account, email.strip().lower())
    if outcome not in NOTHING_TRIED:
        tell(session, known.email if known else "", "SignIn", "", outcome=outcome)


def unrecorded() -> Change | None:
    """Return the change under way when no transaction has taken it along yet; for `Database.write`."""
    change = _under_way.get()
    return None if change is None or change.recorded else change


def administrator() -> Caller:
    """Return whoever runs a command on the data dir: a user of this machine."""
    user = f"{getpass.getuser()}@{socket.gethostname()}"
    return Caller("administrator", credential="command line", address=user)


class Audit:
    """The record in the database."""

    def __init__(self, database: "Database") -> None:
        self._database = database
        self._used: dict[str, float] = {}
        self._behind = ThreadPoolExecutor(1, "audit")

    @contextmanager
    def change(self, caller: Caller, action: str, resource: str = "", detail: str = "") -> Iterator[None]:
        """Record what the block does, in the first transaction that it commits; or that it was refused.

        Args:
            caller: Who does it, with which credential and from where.
            action: An RPC's name, or one of the same form.
            resource: What it is done to; `note` may say it later.
            detail: A few words more; never a secret, or what a model was tuned on or asked.
        """
        change = Change(caller, action, resource, detail)
        under_way = _under_way.set(change)
        try:
            yield
            if not change.recorded:
                self._record()
        except ApiError as error:
            if error.status not in NOTHING_TRIED:
                change.outcome, change.recorded = error.status, False
                self._record()
            raise
        finally:
            _under_way.reset(under_way)

    def record(self, caller: Caller, action: str, resource: str = "", outcome: str = "OK") -> None:
        """Record what changes nothing in the database; not within a transaction, which it would wait for."""
        under_way = _under_way.set(Change(caller, action, resource, outcome=outcome))
        try:
            self._record()
        finally:
            _under_way.reset(under_way)

    def used(self, caller: Caller) -> None:
        """Record that a key is in use, once an hour by each server, in a thread: no request waits for it."""
        now = time.monotonic()
        if now - self._used.get(caller.credential, -HOUR) >= HOUR:
            self._used[caller.credential] = now
            self._behind.submit(self._use, caller)

    def close(self) -> None:
        """Write what is not written yet."""
        self._behind.shutdown()

    def newest(
        self, most: int, *, account: str | None = None, model: str | None = None, since: float | None = None
    ) -> list[AuditRecord]:
        """Return the newest records, at most so many, oldest first.

        Args:
            most: How many; 0 for all.
            account: Only what this account did.
            model: Only what was done to this tuned model, its permissions and its operations.
            since: Only from this time on, in seconds since 1970.
        """
        wanted = select(AuditRecord)
        if account is not None:
            wanted = wanted.where(AuditRecord.account == account.strip().lower())
        if model is not None:
            name = f"tunedModels/{model.removeprefix('tunedModels/')}"
            below = AuditRecord.resource.startswith(f"{name}/", autoescape=True)
            wanted = wanted.where(or_(AuditRecord.resource == name, below))
        if since is not None:
            wanted = wanted.where(AuditRecord.time >= since)
        with self._database.read() as session:
            return [*session.scalars(wanted.order_by(AuditRecord.id.desc()).limit(most or None))][::-1]

    def prune(self, caller: Caller, before: float) -> int:
        """Remove the records from before a time, in seconds since 1970; return how many. That itself is recorded.

        Raises:
            InvalidArgument: The time is not past.
        """
        if before > time.time():
            raise InvalidArgument("Only what is past can be pruned: give a date that is not in the future.")
        day = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(before))
        prune = Change(caller, "PruneAudit", "audit", f"before {day}", prunes_before=before)
        with self._database.write() as session:
            session.add(prune.row())
            session.flush()  # the trigger looks for it
            count = session.scalar(select(func.count()).where(AuditRecord.time < before))
            session.execute(delete(AuditRecord).where(AuditRecord.time < before))
        return count or 0

    def _use(self, caller: Caller) -> None:
        try:
            self.record(caller, "UseApiKey", f"apiKeys/{caller.credential.rpartition(' ')[2]}")
        except (SQLAlchemyError, Unavailable) as error:
            log.warning("cannot record that %s was used: %s", caller.credential, error)

    def _record(self) -> None:
        with self._database.write():  # takes the change along
            pass


def _plain(text: str) -> str:
    """Return a text that no terminal and no database takes for more than text."""
    return "".join(letter if letter.isprintable() else "�" for letter in text[:LONGEST])
