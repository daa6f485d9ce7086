"""Device codes (RFC 8628): a sign-in that a person approves in a browser elsewhere."""

import secrets
import time
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from tunesmith.auth.tokens import digest
from tunesmith.store import audit
from tunesmith.store.database import Database
from tunesmith.store.tables import DeviceCode

SECONDS = 900
INTERVAL = 5  # seconds between two questions of a device
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels, so no words (RFC 8628, section 6.1)


@dataclass(frozen=True)
class Pending:
    """A device code as Authlib's grant asks for it; `account` is None while nobody has decided."""

    hash: str
    user_code: str
    client: str
    scopes: str
    account: str | None
    approved: bool
    expire_time: float

    def get_client_id(self) -> str:
        """Return the client that asks."""
        return self.client

    def get_scope(self) -> str:
        """Return the scopes that it asks for, separated by spaces."""
        return self.scopes

    def get_user_code(self) -> str:
        """Return what the person types."""
        return self.user_code

    def is_expired(self) -> bool:
        """Whether it is too late."""
        return self.expire_time < time.time()


class DeviceCodes:
    """The device codes in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, client: str, scopes: str) -> tuple[str, str]:
        """Return the device's code and the code that the person types."""
        while True:
            device, letters = secrets.token_urlsafe(32), "".join(secrets.choice(_LETTERS) for _ in range(8))
            user_code = f"{letters[:4]}-{letters[4:]}"
            try:
                with self._database.write() as session:
                    session.add(
                        DeviceCode(
                            code_hash=digest(device),
                            user_code=user_code,
                            client=client,
                            scopes=scopes,
                            expire_time=time.time() + SECONDS,
                        )
                    )
            except IntegrityError:  # somebody else has these letters
                continue
            return device, user_code

    def find(self, device_code: str) -> Pending | None:
        """Return what a device asked for."""
        with self._database.read() as session:
            row = session.get(DeviceCode, digest(device_code))
            return _pending(row) if row else None

    def asked_too_soon(self, found: Pending) -> bool:
        """Note that the device asks; return whether it asked within the interval."""
        now = time.time()
        with self._database.write() as session:
            row = session.get(DeviceCode, found.hash)
            if row is None:
                return False
            row.poll_time, before = now, row.poll_time
            return now - before < INTERVAL - 0.5  # the device's clock and the network are not exact

    def awaiting(self, user_code: str) -> Pending | None:
        """Return what waits for a decision under the code that a person typed, however they wrote it."""
        letters = "".join(letter for letter in user_code.upper() if letter.isalpha())
        asked = select(DeviceCode).where(
            DeviceCode.user_code == f"{letters[:4]}-{letters[4:]}",
            DeviceCode.account.is_(None),
            DeviceCode.expire_time >= time.time(),
        )
        with self._database.read() as session:
            row = session.scalars(asked).first()
            return _pending(row) if row else None

    def decide(self, found: Pending, account: str, *, approved: bool) -> bool:
        """Let the device in as an account, or not; return False when that was decided meanwhile."""
        with self._database.write() as session:
            row = session.get(DeviceCode, found.hash, with_for_update=True)
            if row is None or row.account is not None:
                return False
            row.account, row.approved = account, approved
            action = "ApproveDevice" if approved else "RefuseDevice"
            audit.tell(session, account, action, f"clients/{row.client}")
            return True


def _pending(row: DeviceCode) -> Pending:
    return Pending(
        row.code_hash, row.user_code, row.client, row.scopes, row.account, row.approved, row.expire_time
    )
