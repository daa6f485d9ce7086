"""The keys with which the server signs identity tokens, and their rotation."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

from joserfc import jwt
from joserfc.jwk import RSAKey
from sqlalchemy import delete, select

from tunesmith.store.database import Database
from tunesmith.store.tables import SigningKey

ALGORITHM = "RS256"
AGE = 90 * 86_400.0  # seconds after which a key is replaced
TOKEN_SECONDS = 3600  # of identity tokens
BITS = 2048


class SigningKeys:
    """The keys in the database; all its servers sign with the same one."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Return a JWT of these claims, `iat` and `exp` added."""
        now = int(time.time())
        row = self._current() or self.rotate()
        key = RSAKey.import_key(row.private_key)
        header = {"alg": ALGORITHM, "kid": row.id}
        return jwt.encode(header, {**claims, "iat": now, "exp": now + TOKEN_SECONDS}, key, [ALGORITHM])

    def public(self) -> dict[str, list[dict[str, Any]]]:
        """Return the JWK Set of all keys whose tokens may still be good."""
        if self._current() is None:
            self.rotate()
        with self._database.read() as session:
            rows = session.scalars(select(SigningKey).order_by(SigningKey.create_time)).all()
        now = time.time()
        good = [row for row in rows if row.retire_time is None or row.retire_time >= now]
        return {"keys": [_public(row) for row in good]}

    def rotate(self) -> SigningKey:
        """Sign with a new key from now on; the old ones stay public until their last tokens are past."""
        private = RSAKey.generate_key(BITS).as_pem(private=True).decode()
        now = time.time()
        with self._database.write() as session:
            session.execute(delete(SigningKey).where(SigningKey.retire_time < now))
            for row in session.scalars(select(SigningKey).where(SigningKey.retire_time.is_(None))):
                row.retire_time = now + 2 * TOKEN_SECONDS  # twice: a server may be about to sign with it
            made = SigningKey(id=secrets.token_hex(20), private_key=private, create_time=now)
            session.add(made)
            session.flush()
            session.expunge(made)
        return made

    def _current(self) -> SigningKey | None:
        in_use = select(SigningKey).where(
            SigningKey.retire_time.is_(None), SigningKey.create_time >= time.time() - AGE
        )
        with self._database.read() as session:
            return session.scalars(in_use.order_by(SigningKey.create_time.desc())).first()


def _public(row: SigningKey) -> dict[str, Any]:
    parameters = {"kid": row.id, "use": "sig", "alg": ALGORITHM}
    return {**RSAKey.import_key(row.private_key).as_dict(private=False), **parameters}
