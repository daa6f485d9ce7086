"""Service accounts: programs that sign in with a key of their own. Only its public half is stored."""

import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey
from sqlalchemy import delete, select

from tunesmith.auth.accounts import check_email
from tunesmith.auth.scopes import CLOUD_PLATFORM
from tunesmith.caller import Caller
from tunesmith.errors import AlreadyExists, NotFound
from tunesmith.store.database import Database
from tunesmith.store.tables import AccessToken, Account, ServiceAccountKey

ALGORITHM = "RS256"
BITS = 2048
LONGEST = 3600  # seconds that an assertion may be good
LEEWAY = 60  # seconds that two clocks may differ
GOOGLE_TOKEN_URI = "https://oauth2.googleapis.com/token"  # noqa: S105 — what Google's library writes as `aud`
_END_OF_TIME = 1e12  # seconds; larger numbers are no times, and some no floats
GOOGLE_API = "https://generativelanguage.googleapis.com/"


@dataclass(frozen=True)
class Assertion:
    """A JWT whose signature is that of a key of the account."""

    account: str
    claims: Mapping[str, Any]


class BadAssertion(Exception):
    """A JWT that is refused; the message says why, in ASCII."""


class ServiceAccounts:
    """The service accounts and their keys in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, email: str) -> tuple[str, str]:
        """Make a service account, or one more key of it; return the key's id and its private half in PEM.

        Raises:
            InvalidArgument: That is not an e-mail address.
            AlreadyExists: There is a person's account with that address, or the service account was deleted.
        """
        email = check_email(email)
        key, key_id, now = RSAKey.generate_key(BITS), secrets.token_hex(20), time.time()
        with self._database.write() as session:
            account = session.get(Account, email)
            if account is None:
                account = Account(email=email, create_time=now, service=True)
                session.add(account)
                session.flush()
            elif not account.service:
                raise AlreadyExists(f"{email} is a person's account; give the service account another address.")
            elif account.disabled:
                raise AlreadyExists(f"{email} was deleted, and its models may remain; use another address.")
            public = key.as_pem(private=False).decode()
            session.add(ServiceAccountKey(id=key_id, account=email, public_key=public, create_time=now))
        return key_id, key.as_pem(private=True).decode()

    def list(self) -> list[tuple[Account, list[ServiceAccountKey]]]:
        """Return the service accounts, the oldest first, each with its keys."""
        with self._database.read() as session:
            of_programs = select(Account).where(Account.service.is_(True), Account.disabled.is_(False))
            accounts = session.scalars(of_programs.order_by(Account.create_time)).all()
            keys = session.scalars(select(ServiceAccountKey).order_by(ServiceAccountKey.create_time)).all()
        return [(account, [key for key in keys if key.account == account.email]) for account in accounts]

    def delete(self, email: str) -> None:
        """Refuse a service account and its tokens from now on; its models stay.

        Raises:
            NotFound: There is no such service account.
        """
        email = email.strip().lower()
        with self._database.write() as session:
            account = session.get(Account, email)
            if account is None or not account.service or account.disabled:
                raise NotFound(f"There is no service account {email}. See: tunesmith service-account list")
            account.disabled = True
            for table in (ServiceAccountKey, AccessToken):
                session.execute(delete(table).where(table.account == email))

    def verify(self, token: str, audiences: Collection[str], *, audience_needed: bool) -> Assertion:
        """Return what a service account signed.

        Args:
            token: The JWT.
            audiences: Whom it may be for.
            audience_needed: Whether it must say for whom it is.

        Raises:
            BadAssertion: It is not signed by a key of a service account, or not good here and now.
        """
        try:
            header = jws.extract_compact(token.encode()).headers()
        except (JoseError, ValueError, TypeError):
            raise BadAssertion("The assertion is not a signed JWT.") from None
        public = self._key(header.get("kid"))
        if header.get("alg") != ALGORITHM or public is None:
            raise BadAssertion(f"The assertion must be signed with {ALGORITHM} and a key that is known here.")
        try:
            claims = jwt.decode(token, RSAKey.import_key(public.public_key), [ALGORITHM]).claims
        except (JoseError, ValueError, TypeError):
            raise BadAssertion("The assertion has no good signature.") from None
        if claims.get("iss") != public.account:
            raise BadAssertion("The assertion is signed with a key that is not of its iss.")
        if claims.get("sub", public.account) != public.account:
            raise BadAssertion("The assertion is for another account; a service account speaks for itself only.")
        _check_times(claims)
        _check_audience(claims, audiences, audience_needed)
        return Assertion(public.account, claims)

    def _key(self, key_id: object) -> ServiceAccountKey | None:
        known = (
            select(ServiceAccountKey)
            .join(Account, Account.email == ServiceAccountKey.account)
            .where(ServiceAccountKey.id == key_id, Account.disabled.is_(False))
        )
        if not isinstance(key_id, str):
            return None
        with self._database.read() as session:
            return session.scalars(known).first()


class SelfSignedTokens:
    """Bearer tokens that service accounts sign themselves, without asking for one first; a TokenVerifier.

    Args:
        accounts: The service accounts.
        public_url: The server's address; empty when it has no fixed one.
    """

    def __init__(self, accounts: ServiceAccounts, public_url: str) -> None:
        self._accounts = accounts
        own = public_url.rstrip("/")
        self._audiences = {GOOGLE_API, *((own, f"{own}/") if own else ())}

    def verify(self, token: str, project: str | None) -> Caller | None:
        """See TokenVerifier."""
        if not token.startswith("eyJ") or token.count(".") != 2:
            return None
        try:
            assertion = self._accounts.verify(token, self._audiences, audience_needed=False)
        except BadAssertion:
            return None
        scopes = assertion.claims.get("scope")
        # Without scopes it must name the API, and is then good for all of it.
        if not isinstance(scopes, str) and assertion.claims.get("aud") is None:
            return None
        granted = scopes.split() if isinstance(scopes, str) else [CLOUD_PLATFORM]
        return Caller(assertion.account, frozenset(granted), project, "signed token")


def key_file(email: str, key_id: str, private_key: str, root: str, project: str) -> dict[str, str]:
    """Return what a service account's key file holds, as Google's have it.

    Args:
        email: The service account.
        key_id: Id of its key.
        private_key: The key in PEM.
        root: The server's address, without a slash at its end.
        project: A label.
    """
    return {
        "type": "service_account",
        "project_id": project,
        "private_key_id": key_id,
        "private_key": private_key,
        "client_email": email,
        "client_id": email,
        "auth_uri": f"{root}/o/oauth2/auth",
        "token_uri": f"{root}/token",
        "auth_provider_x509_cert_url": f"{root}/oauth2/v3/certs",
        "universe_domain": "googleapis.com",
    }


def _check_times(claims: Mapping[str, Any]) -> None:
    now = time.time()
    issued, expires = (_seconds(claims.get(name)) for name in ("iat", "exp"))
    if issued is None or expires is None:
        raise BadAssertion("The assertion needs iat and exp, in seconds since 1970.")
    if issued > now + LEEWAY or (_seconds(claims.get("nbf")) or 0) > now + LEEWAY:
        raise BadAssertion("The assertion is from the future; set this machine's clock.")
    if expires <= now - LEEWAY:
        raise BadAssertion("The assertion is expired.")
    if expires - issued > LONGEST + LEEWAY:
        raise BadAssertion("The assertion is good for more than an hour.")


def _check_audience(claims: Mapping[str, Any], audiences: Collection[str], needed: bool) -> None:
    audience = claims.get("aud")
    if audience is None and not needed:
        return
    named = audience if isinstance(audience, list) else [audience]
    if not any(isinstance(one, str) and one in audiences for one in named):
        raise BadAssertion("The assertion is for another audience; its aud must be this server's token endpoint.")


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _END_OF_TIME else None
