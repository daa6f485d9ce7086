"""How often a secret may be guessed at: counted in the database, so that all servers count together."""

import ipaddress
import math
import time
from collections.abc import Mapping

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunesmith.auth.tokens import digest
from tunesmith.errors import ResourceExhausted
from tunesmith.store.database import Database
from tunesmith.store.tables import Attempts as Row

WINDOW = 900.0  # seconds, from the first guess that is counted
OF_ACCOUNT = 10  # wrong passwords of one account in that time, from wherever
OF_ADDRESS = 50  # wrong guesses from one address, at whatever


class Attempts:
    """The guesses in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, kind: str, subject: str, address: str) -> None:
        """Count a guess before it is looked at, so that guesses made at once are counted too.

        Args:
            kind: What is guessed: password, device code.
            subject: At whose.
            address: The network address that it comes from.

        Raises:
            ResourceExhausted: There were too many; the message says how long to wait, and tells nothing else.
        """
        limits = {_key(kind, subject): OF_ACCOUNT, _key("address", network(address)): OF_ADDRESS}
        now = time.time()
        with self._database.read() as session:  # who is refused anyway keeps no writer waiting
            _check(session, limits, now)
        while True:
            try:
                self._count(limits, now)
            except IntegrityError:  # another server counts the first guess
                continue
            return

    def _count(self, limits: Mapping[str, int], now: float) -> None:
        with self._database.write() as session:
            session.execute(delete(Row).where(Row.start_time < now - WINDOW))
            rows = _check(session, limits, now)
            for key in limits:
                if key in rows:
                    rows[key].count += 1
                else:
                    session.add(Row(subject=key, count=1, start_time=now))

    def succeeded(self, kind: str, subject: str, address: str) -> None:
        """Take back what `begin` counted: the guess was right. The subject's count starts anew."""
        with self._database.write() as session:
            session.execute(delete(Row).where(Row.subject == _key(kind, subject)))
            row = session.get(Row, _key("address", network(address)), with_for_update=True)
            if row is not None and row.count > 0:
                row.count -= 1


def network(address: str) -> str:
    """Return what of an address one caller cannot choose: of IPv6 the first 64 bits."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def _key(kind: str, subject: str) -> str:
    return digest(f"{kind} {subject.strip().lower()}")


def _check(session: Session, limits: Mapping[str, int], now: float) -> dict[str, Row]:
    """Return what is counted, locked; raise ResourceExhausted when it is too much."""
    counted = select(Row).where(Row.subject.in_(limits), Row.start_time >= now - WINDOW).order_by(Row.subject)
    rows = {row.subject: row for row in session.scalars(counted.with_for_update())}
    late = [row for key, row in rows.items() if row.count >= limits[key]]
    if late:
        minutes = math.ceil(max(row.start_time + WINDOW - now for row in late) / 60)
        raise ResourceExhausted(f"Too many tries. Wait {minutes} minutes, then try again.")
    return rows
