"""Tokens of other people's sign-in: signed JWTs of OpenID Connect issuers, to Caller."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from joserfc import jws, jwt
from joserfc.errors import JoseError
from sqlalchemy import bindparam, select

from tunesmith.auth.accounts import Accounts, check_email
from tunesmith.auth.issuer_keys import IssuerKeys
from tunesmith.auth.scopes import known_scope
from tunesmith.caller import Caller
from tunesmith.config import Issuer
from tunesmith.errors import AlreadyExists, InvalidArgument
from tunesmith.store.database import Database
from tunesmith.store.tables import Account

LEEWAY = 60  # seconds that two clocks may differ
TYPES = {"jwt", "at+jwt"}
"""What a token may call itself: the same keys also sign logout tokens and others that open nothing."""

log = logging.getLogger(__name__)


class _Refused(Exception):
    """A token of an issuer that opens nothing here; the message says why, for the log."""


class ExternalIssuers:
    """The issuers that the settings name; a TokenVerifier, and one that may wait for the network.

    Args:
        issuers: The issuers.
        database: Where the accounts are.

    Raises:
        InvalidArgument: An issuer's tokens would have a scope that opens nothing.
    """

    def __init__(self, issuers: Iterable[Issuer], database: Database) -> None:
        self._issuers = {issuer.url: _ExternalIssuer(issuer, database) for issuer in issuers}

    def verify(self, token: str, project: str | None) -> Caller | None:
        """See TokenVerifier.

        Raises:
            Unavailable: It may be good, but its issuer cannot be reached to tell.
        """
        if not token.startswith("eyJ") or token.count(".") != 2:
            return None
        try:
            header, claimed = _unverified(token)
            name = claimed.get("iss")
            # To the letter: this is the check of `iss`, for the key must then be that issuer's.
            issuer = self._issuers.get(name) if isinstance(name, str) else None
            return issuer.verify(token, header, project) if issuer else None
        except _Refused as why:
            log.info("refused a token: %s", why)
            return None


class _ExternalIssuer:
    def __init__(self, issuer: Issuer, database: Database) -> None:
        self._issuer, self._database, self._accounts = issuer, database, Accounts(database)
        self._keys = IssuerKeys(issuer.url)
        self._rules = _Rules(algorithms=issuer.algorithms, strict_check_header=False)
        self._scopes = frozenset(map(known_scope, issuer.scopes))

    def verify(self, token: str, header: Mapping[str, Any], project: str | None) -> Caller:
        """Return the caller, or raise _Refused or Unavailable."""
        claims = self._verified(token, header)
        _check_times(claims)
        self._check_audience(claims)
        email = self._email(claims)
        self._admit(email)
        return Caller(email, self._scopes, project, "issuer's token", groups=self._groups(claims))

    def _verified(self, token: str, header: Mapping[str, Any]) -> dict[str, Any]:
        algorithm, key_id, kind = (header.get(name) for name in ("alg", "kid", "typ"))
        # Before any key is looked for: with a public key, HS256 is a secret that everybody knows.
        if algorithm not in self._issuer.algorithms:
            raise _Refused(f"alg {algorithm!r} is not among the algorithms of {self._issuer.url}")
        if kind is not None and str(kind).lower().removeprefix("application/") not in TYPES:
            raise _Refused(f"typ {kind!r} of {self._issuer.url} is no sign-in")
        key = self._keys.find(str(algorithm), key_id if isinstance(key_id, str) else None)
        if key is None:
            raise _Refused(f"{self._issuer.url} has no key {key_id!r} for {algorithm}")
        try:
            claims = jwt.decode(token, key, registry=self._rules).claims
        except (
            JoseError,
            ValueError,
            TypeError,
            RecursionError,
        ) as error:  # TypeError: of a `crit` that is no list
            raise _Refused(f"not signed by {self._issuer.url}: {error}") from None
        if "events" in claims:  # RFC 8417, section 2.2: it tells of something that happened
            raise _Refused(f"of {self._issuer.url}, and no sign-in")
        return claims

    def _check_audience(self, claims: Mapping[str, Any]) -> None:
        audience, party = claims.get("aud"), claims.get("azp", claims.get("client_id"))
        named = audience if isinstance(audience, list) else [audience]
        if not any(one in self._issuer.audiences for one in named):
            raise _Refused(f"for the audience {audience!r}, not one of {', '.join(self._issuer.audiences)}")
        allowed = self._issuer.authorized_parties
        if allowed and party not in allowed:
            raise _Refused(f"made for the program {party!r}, not one of {', '.join(allowed)}")

    def _email(self, claims: Mapping[str, Any]) -> str:
        claim, verified = self._issuer.account_claim, self._issuer.verified_claim
        value = claims.get(claim)
        try:
            email = check_email(value if isinstance(value, str) else "")
        except InvalidArgument:
            raise _Refused(f"{claim} is {value!r}, not an e-mail address") from None
        if verified and claims.get(verified) not in (True, "true"):  # some issuers write it as text
            raise _Refused(f"{email} is not verified: {verified} is {claims.get(verified)!r}")
        if not self._speaks_for(email):
            raise _Refused(f"{email} is not in the domains of {self._issuer.url}")
        return email

    def _speaks_for(self, email: str) -> bool:
        return "*" in self._issuer.domains or email.rpartition("@")[2] in self._issuer.domains

    def _admit(self, email: str) -> None:
        found = self._database.first(_FIND, {"email": email})
        if found is None and not self._issuer.create_accounts:
            raise _Refused(f"there is no account {email}, and {self._issuer.url} makes none")
        if found is None:
            with suppress(AlreadyExists):  # by another request of theirs, a moment ago
                self._accounts.create(email)
                log.info("made the account %s, vouched for by %s", email, self._issuer.url)
        elif any(found):
            raise _Refused(f"{email} is disabled, or a service account")

    def _groups(self, claims: Mapping[str, Any]) -> frozenset[str]:
        """The groups here that the token names; the issuer says anew with each token who is in them."""
        value = claims.get(self._issuer.groups_claim) if self._issuer.groups_claim else None
        named = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
        mapped = {self._issuer.groups[one].strip().lower() for one in named if one in self._issuer.groups}
        return frozenset(mapped | {one.lower() for one in named if "@" in one and self._speaks_for(one.lower())})


def _unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a token says of itself, to find out who has to have signed it."""
    try:
        signed = jws.extract_compact(token.encode(), registry=_ANY)
        claims = json.loads(signed.payload)
    except (JoseError, ValueError, RecursionError):
        raise _Refused("not a signed JWT") from None
    if not isinstance(claims, dict):
        raise _Refused("not a JWT of claims")
    return signed.headers(), claims


def _check_times(claims: Mapping[str, Any]) -> None:
    now = time.time()
    issued = _time(claims, "iat")
    if _time(claims, "exp") <= now - LEEWAY:
        raise _Refused("expired")
    if max(issued, _time(claims, "nbf") if "nbf" in claims else issued) > now + LEEWAY:
        raise _Refused("from the future; is this machine's clock right?")


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:  # and no NaN
        raise _Refused(f"{name} is not a time, or missing")
    return value


class _Rules(jws.JWSRegistry):
    """Headers that no standard names are common, and ignored; those that `crit` names are refused."""

    max_header_length = 8192  # bytes; some issuers send the chain of certificates along


_ANY = _Rules()  # to read with, before it is known whose rules hold

# Built once: every request with such a token runs it.
_FIND = select(Account.disabled, Account.service).where(Account.email == bindparam("email"))
