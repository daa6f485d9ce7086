"""From what a request brings to the Caller, or to the error that Google's front end would give."""

import re
from typing import NoReturn, Protocol

from tunesmith import protos
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.tokens import AccessTokens
from tunesmith.caller import Caller, Credentials
from tunesmith.errors import InvalidArgument, PermissionDenied, Unauthenticated, error_info


class TokenVerifier(Protocol):
    """Knows one kind of bearer token."""

    def verify(self, token: str, project: str | None) -> Caller | None:
        """Return the token's caller, or None when it is not a good token of this kind."""


class OwnTokens:
    """Tokens that Tunesmith made."""

    def __init__(self, tokens: AccessTokens) -> None:
        self._tokens = tokens

    def verify(self, token: str, project: str | None) -> Caller | None:
        """See TokenVerifier."""
        found = self._tokens.find(token)
        return Caller(found.account, frozenset(found.scopes.split()), project, "access token") if found else None


class Verifier:
    """Picks what to verify from the credentials that came: a bearer token wins over an API key."""

    def __init__(self, keys: ApiKeys, *tokens: TokenVerifier) -> None:
        self._keys, self._tokens = keys, tokens

    def verify(self, credentials: Credentials) -> Caller:
        """Return who is calling.

        Raises:
            PermissionDenied: There are no credentials.
            Unauthenticated: The token is not good.
            InvalidArgument: The key is not good; Google answers 400 here.
        """
        if credentials.bearer is not None:
            for verifier in self._tokens:
                if caller := verifier.verify(credentials.bearer, credentials.project):
                    return caller
            _refuse_token(credentials.bearer)
        if credentials.api_key is not None:
            key = self._keys.find(credentials.api_key)
            if key is None:
                _refuse_key("API key not valid. Please pass a valid API key.")
            if key.expired:
                _refuse_key("API key expired. Please renew the API key.")
            granted = frozenset(key.scopes.split()) or None
            return Caller(key.account, granted, credentials.project, f"API key {key.id}")
        raise PermissionDenied(
            "Method doesn't allow unregistered callers (callers without established identity). Please use API "
            "Key or other form of API consumer identity to call this API."
        )


def _refuse_token(token: str) -> NoReturn:
    well_formed = re.fullmatch(r"[A-Za-z0-9._~+/=-]+", token)  # RFC 6750, section 2.1
    raise Unauthenticated(
        "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other "
        "valid authentication credential. See "
        "https://developers.google.com/identity/sign-in/web/devconsole-project.",
        [] if well_formed else [error_info("ACCESS_TOKEN_TYPE_UNSUPPORTED")],
    )


def _refuse_key(message: str) -> NoReturn:
    localized = protos.LocalizedMessage(locale="en-US", message=message)
    raise InvalidArgument(message, [error_info("API_KEY_INVALID"), localized])
