"""The OAuth 2.0 authorization server: Authlib's core with our rules. It knows requests and answers, and no HTTP.

Rules beyond Authlib's: PKCE with S256 for every client, redirects to the loopback interface only, every code used
once and its second use noticed, refresh tokens that stay as they are because gcloud keeps no new ones.
"""

import base64
import binascii
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from authlib.common.urls import add_params_to_uri
from authlib.oauth2 import AuthorizationServer, OAuth2Error, OAuth2Request
from authlib.oauth2.rfc6749 import (
    AccessDeniedError,
    BaseGrant,
    ClientMixin,
    InvalidGrantError,
    InvalidRequestError,
    InvalidScopeError,
    TokenEndpointMixin,
)
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant, RefreshTokenGrant
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc7523 import JWTBearerGrant
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc8628 import DEVICE_CODE_GRANT_TYPE, DeviceCodeGrant

from tunesmith.auth import device_codes
from tunesmith.auth.authorizations import Authorizations, Code, Issued, Refreshable, TokenInfo
from tunesmith.auth.clients import Clients
from tunesmith.auth.device_codes import DeviceCodes, Pending
from tunesmith.auth.scopes import IDENTITY, OPENID, WORDS, understood
from tunesmith.auth.service_accounts import GOOGLE_TOKEN_URI, Assertion, BadAssertion, ServiceAccounts
from tunesmith.auth.signing_keys import SigningKeys
from tunesmith.auth.tokens import AccessTokens

JWT_BEARER = JWTBearerGrant.GRANT_TYPE
_RESPONSE_TYPE = re.compile("[a-z_ ]{1,40}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_AUTH_METHODS = ("client_secret_basic", "client_secret_post", "none")


@dataclass(frozen=True)
class OAuthCall:
    """A request to an endpoint of the server.

    Attributes:
        method: The HTTP method.
        root: The server's address as the client sees it, without a slash at its end.
        parameters: Of the query or the form, as they came: name and value.
        authorization: The value of the Authorization header.
    """

    method: str
    root: str
    parameters: Collection[tuple[str, str]]
    authorization: str = field(default="", repr=False)


@dataclass(frozen=True)
class Answer:
    """What the server says: a status, JSON, headers; or a redirect, when there is a Location."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Consent:
    """What a person is asked to allow."""

    client: str
    scopes: tuple[str, ...]
    redirect_uri: str
    pasted: bool
    """The client listens nowhere: what it is to be told is shown, to be pasted."""


class _Request(OAuth2Request):
    """A call as Authlib's grants read it."""

    def __init__(self, call: OAuthCall, *, insecure: bool) -> None:
        # Authlib refuses plain http here, but for the loopback interface.
        address = "https://insecure.invalid" if insecure else call.root
        super().__init__(call.method, address, headers=_headers(call.authorization))
        names = [name for name, _ in call.parameters]
        repeated = sorted({name for name in names if names.count(name) > 1 and name.isidentifier()})
        if len(names) != len(set(names)):
            raise InvalidRequestError(f"More than once in the request: {', '.join(repeated) or 'a parameter'}")
        self.root = call.root
        self._parameters = dict(call.parameters)
        self.payload = BasicOAuth2Payload(self._parameters)

    @property
    def args(self) -> Any:
        return self._parameters

    @property
    def form(self) -> dict[str, str]:
        return self._parameters


class OAuthServer(AuthorizationServer):
    """Authlib's server over our rows; a public method for each endpoint.

    Args:
        clients: The programs that people sign in with.
        authorizations: What people allowed them.
        devices: Sign-ins that wait for a browser.
        service_accounts: Programs with keys of their own.
        tokens: Makes the tokens that are bound to no authorization.
        keys: Sign identity tokens.
        public_url: The server's address; empty when it has no fixed one.
        insecure: Take requests over http from other machines.
    """

    def __init__(
        self,
        clients: Clients,
        authorizations: Authorizations,
        devices: DeviceCodes,
        service_accounts: ServiceAccounts,
        tokens: AccessTokens,
        keys: SigningKeys,
        *,
        public_url: str = "",
        insecure: bool = False,
    ) -> None:
        super().__init__()
        self.public_url = public_url
        self._insecure = insecure
        self.clients, self.authorizations, self.devices = clients, authorizations, devices
        self.service_accounts, self.tokens, self.keys = service_accounts, tokens, keys
        self.register_grant(_CodeGrant, [_S256()])
        for grant in (_RefreshGrant, _ServiceAccountGrant, _DeviceGrant):
            self.register_grant(grant)

    # What Authlib asks of a server.

    def query_client(self, client_id: str) -> ClientMixin:
        found: Any = self.clients.find(client_id)  # None for none, whatever the stubs say
        return found  # type: ignore[no-any-return]

    def create_oauth2_request(self, request: Any) -> OAuth2Request:
        return _Request(request, insecure=self._insecure)

    def handle_response(self, status: int, body: Any, headers: Any) -> Answer:
        return Answer(status, body or {}, dict(headers))

    def send_signal(self, name: Any, *args: object, **kwargs: object) -> None:
        pass

    def validate_requested_scope(self, scope: str) -> None:
        if not all(understood(one) for one in (scope or "").split()):
            raise InvalidScopeError("A scope is not one of this server or of Google.")

    def get_authorization_grant(self, request: OAuth2Request) -> BaseGrant:
        if not _RESPONSE_TYPE.fullmatch((request.payload and request.payload.response_type) or ""):
            raise InvalidRequestError("response_type must be code.")  # Authlib would repeat whatever it is
        grant: BaseGrant = super().get_authorization_grant(request)
        return grant

    # The endpoints.

    def consent(self, call: OAuthCall) -> Consent:
        """Return what to ask a person for; they are not told apart here.

        Raises:
            OAuth2Error: The request is not good; `redirect_uri` says where to tell it, or is None.
        """
        grant = self.get_consent_grant(call)  # type: ignore[no-untyped-call]
        request: _Request = grant.request
        client: Any = request.client
        if request.payload.data.get("prompt") == "none":  # type: ignore[union-attr]
            raise OAuth2Error(
                error="interaction_required",
                description="This server always asks.",
                redirect_uri=grant.redirect_uri,
                state=request.payload.state,  # type: ignore[union-attr]
            )
        pasted = not request.payload.redirect_uri  # type: ignore[union-attr]
        return Consent(client.name, tuple(request.scope.split()), grant.redirect_uri, pasted)

    def decide(self, call: OAuthCall, account: str, *, allowed: bool) -> Answer:
        """Return the redirect that tells the client what the person decided.

        Raises:
            OAuth2Error: As for `consent`.
        """
        grant = self.get_consent_grant(call)  # type: ignore[no-untyped-call]
        user = account if allowed else None
        return cast(Answer, self.create_authorization_response(grant.request, user, grant))

    def token(self, call: OAuthCall) -> Answer:
        """Give tokens for a code, a refresh token, an assertion or a device code."""
        try:
            return cast(Answer, self.create_token_response(call))
        except OAuth2Error as error:
            return self.refusal(error)

    def device(self, call: OAuthCall) -> Answer:
        """Give a device a code to ask with, and one for the person to type."""
        try:
            request = self.create_oauth2_request(call)
            client: Any = self.authenticate_client(request, _AUTH_METHODS, "device_authorization")
            self.validate_requested_scope(request.scope)
            scopes = client.get_allowed_scope(request.scope)
            if not scopes:
                raise InvalidScopeError("Say which scopes you want in 'scope'.")
        except OAuth2Error as error:
            return self.refusal(error)
        device_code, user_code = self.devices.create(client.id, scopes)
        page = f"{call.root}/device"
        body = {
            "device_code": device_code,
            "user_code": user_code,
            "verification_uri": page,
            "verification_url": page,  # as Google calls it
            "verification_uri_complete": f"{page}?user_code={user_code}",
            "expires_in": device_codes.SECONDS,
            "interval": device_codes.INTERVAL,
        }
        return Answer(200, body, {})

    def revoke(self, call: OAuthCall) -> Answer:
        """End a token: a client its own (RFC 7009), and whoever holds it, as at Google. Unknown ones are ended."""
        try:
            request = self.create_oauth2_request(call)
            token = request.form.get("token")
            if not token:
                raise InvalidRequestError("Missing 'token' in request.")
            if call.authorization or "client_id" in request.form:
                client: Any = self.authenticate_client(request, _AUTH_METHODS, "revocation")
                found = self.authorizations.inspect(token)
                if found is not None and found.client != client.id:
                    return Answer(200, {}, {})
        except OAuth2Error as error:
            return self.refusal(error)
        self.authorizations.revoke_token(token)
        return Answer(200, {}, {})

    def introspect(self, call: OAuthCall) -> Answer:
        """Tell a client about a token of its own (RFC 7662)."""
        try:
            request = self.create_oauth2_request(call)
            client: Any = self.authenticate_client(request, _AUTH_METHODS[:2], "introspection")
            token = request.form.get("token")
            if not token:
                raise InvalidRequestError("Missing 'token' in request.")
        except OAuth2Error as error:
            return self.refusal(error)
        found = self.authorizations.inspect(token)
        if found is None or found.client != client.id:
            return Answer(200, {"active": False}, {})
        return Answer(200, {"active": True, "iss": call.root, **_described(found)}, {})

    def token_info(self, token: str) -> Mapping[str, Any] | None:
        """Tell whoever holds an access token about it, in Google's words; None when it is not good."""
        found = self.authorizations.inspect(token)
        if found is None or found.kind != "access_token" or found.expire_time is None:
            return None
        client = found.client or found.account
        about = _described(found)
        return {
            "azp": client,
            "aud": client,
            "sub": found.account,
            "scope": found.scopes,
            "exp": str(about["exp"]),
            "expires_in": str(max(0, int(found.expire_time - time.time()))),
            "email": found.account,
            "email_verified": "true",
            "access_type": "offline" if found.client else "online",
        }

    def refusal(self, error: OAuth2Error) -> Answer:
        """Return the answer that an error means."""
        return self.handle_response(*error())

    def metadata(self, root: str) -> dict[str, Any]:
        """Return what RFC 8414 and OpenID Connect Discovery say about a server."""
        return {
            "issuer": root,
            "authorization_endpoint": f"{root}/o/oauth2/auth",
            "token_endpoint": f"{root}/token",
            "device_authorization_endpoint": f"{root}/device/code",
            "revocation_endpoint": f"{root}/revoke",
            "introspection_endpoint": f"{root}/introspect",
            "userinfo_endpoint": f"{root}/userinfo",
            "jwks_uri": f"{root}/oauth2/v3/certs",
            "scopes_supported": list(WORDS),
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": ["authorization_code", "refresh_token", JWT_BEARER, DEVICE_CODE_GRANT_TYPE],
            "code_challenge_methods_supported": ["S256"],
            "token_endpoint_auth_methods_supported": list(_AUTH_METHODS),
            "revocation_endpoint_auth_methods_supported": list(_AUTH_METHODS),
            "introspection_endpoint_auth_methods_supported": list(_AUTH_METHODS[:2]),
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "claims_supported": ["iss", "sub", "aud", "exp", "iat", "email", "email_verified", "nonce"],
        }


class _S256(CodeChallenge):
    """PKCE for every client, by S256 only (RFC 9700, section 2.1.1)."""

    def validate_code_challenge(self, grant: Any, redirect_uri: Any) -> None:
        data = grant.request.payload.data
        if not data.get("code_challenge") or data.get("code_challenge_method") != "S256":
            raise InvalidRequestError("Send a code_challenge with code_challenge_method=S256: PKCE is required.")
        super().validate_code_challenge(grant, redirect_uri)

    def get_authorization_code_challenge_method(self, authorization_code: Any) -> str:  # noqa: ARG002
        return "S256"


class _CodeGrant(AuthorizationCodeGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = _AUTH_METHODS
    server: OAuthServer

    @staticmethod
    def validate_authorization_redirect_uri(request: OAuth2Request, client: ClientMixin) -> str:
        asked = request.payload.redirect_uri if request.payload else None
        if asked and not client.check_redirect_uri(asked):
            # In words of our own: Authlib's repeat the address, which may be anything.
            raise InvalidRequestError("The redirect_uri must be http on localhost, 127.0.0.1 or [::1], any port.")
        return asked or client.get_default_redirect_uri()

    def validate_requested_scope(self) -> None:
        if not self.request.payload or not self.request.payload.scope:
            raise InvalidScopeError("Say which scopes you want in 'scope'.")
        super().validate_requested_scope()

    def create_authorization_response(self, redirect_uri: str, grant_user: Any) -> Any:
        if not grant_user:
            raise AccessDeniedError(redirect_uri=redirect_uri)
        data: Any = self.request.payload.data if self.request.payload else {}
        code = self.server.authorizations.issue_code(
            grant_user,
            _client_id(self.request),
            self.request.scope,
            redirect_uri,
            data["code_challenge"],
            data.get("nonce"),
        )
        told = [("code", code), ("scope", self.request.scope)]
        if "state" in data:
            told.append(("state", data["state"]))
        return 302, "", [("Location", add_params_to_uri(redirect_uri, told))]

    def query_authorization_code(self, code: str, client: Any) -> Any:
        return self.server.authorizations.find_code(code, client.id)

    def create_token_response(self) -> Any:
        code = cast(Code, self.request.authorization_code)
        return _tokens(self, self.server.authorizations.redeem(code))


class _RefreshGrant(RefreshTokenGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = _AUTH_METHODS
    server: OAuthServer

    def authenticate_refresh_token(self, refresh_token: str) -> Any:
        return self.server.authorizations.find_refresh(refresh_token)

    def _validate_token_scope(self, token: Refreshable) -> None:
        asked = set((self.request.scope or "").split())
        if not asked <= {*token.scopes.split(), *IDENTITY}:
            raise InvalidScopeError("More than was allowed; sign in again to ask for it.")

    def create_token_response(self) -> Any:
        found = cast(Refreshable, self.request.refresh_token)
        return _tokens(self, self.server.authorizations.refresh(found, self.request.scope or found.scopes))


class _DeviceGrant(DeviceCodeGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = _AUTH_METHODS
    server: OAuthServer

    def query_device_credential(self, device_code: str) -> Pending | None:
        return self.server.devices.find(device_code)

    def validate_device_credential(self, credential: Pending) -> Any:
        self._found = credential
        return super().validate_device_credential(credential)  # type: ignore[no-untyped-call]

    def query_user_grant(self, user_code: str) -> tuple[str, bool] | None:  # noqa: ARG002 — it is that of `_found`
        return (self._found.account, self._found.approved) if self._found.account else None

    def should_slow_down(self, credential: Pending) -> bool:
        return self.server.devices.asked_too_soon(credential)

    def create_token_response(self) -> Any:
        return _tokens(self, self.server.authorizations.redeem_device(self._found.hash))


class _ServiceAccountGrant(BaseGrant, TokenEndpointMixin):
    """JWT bearer assertions (RFC 7523) that service accounts sign."""

    GRANT_TYPE = JWT_BEARER
    server: OAuthServer

    def validate_token_request(self) -> None:
        assertion, root = self.request.form.get("assertion"), _root(self.request)
        if not assertion:
            raise InvalidRequestError("Missing 'assertion' in request.")
        audiences = {GOOGLE_TOKEN_URI}
        # An address that only the request names could be that of another server, whose assertion this is.
        if root == self.server.public_url or urlsplit(root).hostname in _LOOPBACK:
            audiences |= {root, f"{root}/token", f"{root}/oauth2/v4/token"}
        try:
            self._assertion: Assertion = self.server.service_accounts.verify(
                assertion, audiences, audience_needed=True
            )
        except BadAssertion as error:
            raise InvalidGrantError(str(error)) from None

    def create_token_response(self) -> Any:
        account, claims = self._assertion.account, self._assertion.claims
        target, scope = claims.get("target_audience"), claims.get("scope")
        if isinstance(target, str) and target:
            token = self.server.keys.sign(
                {**_identity(account, _root(self.request)), "aud": target, "azp": account}
            )
            return 200, {"id_token": token}, self.TOKEN_RESPONSE_HEADER
        if not isinstance(scope, str) or not scope.strip():
            raise InvalidScopeError("The assertion needs a scope, or a target_audience.")
        self.server.validate_requested_scope(scope)
        # No scope in the answer: Google's library takes what it asked for as given.
        seconds = self.server.authorizations.token_seconds
        body = {
            "access_token": self.server.tokens.create(account, dict.fromkeys(scope.split()), seconds),
            "token_type": "Bearer",
            "expires_in": seconds,
        }
        return 200, body, self.TOKEN_RESPONSE_HEADER


def _tokens(grant: Any, issued: Issued | None) -> tuple[int, dict[str, Any], Any]:
    """Return what the token endpoint answers a client with what it is given."""
    if issued is None:
        raise InvalidGrantError("It was used or revoked.")
    server: OAuthServer = grant.server
    body: dict[str, Any] = {
        "access_token": issued.access_token,
        "token_type": "Bearer",
        "expires_in": server.authorizations.token_seconds,
        "scope": issued.scopes,
    }
    if issued.refresh_token:
        body["refresh_token"] = issued.refresh_token
    if OPENID in issued.scopes.split():
        nonce = {"nonce": issued.nonce} if issued.nonce else {}
        identity = _identity(issued.account, _root(grant.request))
        body["id_token"] = server.keys.sign({**identity, "aud": _client_id(grant.request), **nonce})
    return 200, body, grant.TOKEN_RESPONSE_HEADER


def _identity(account: str, root: str) -> dict[str, Any]:
    return {"iss": root, "sub": account, "email": account, "email_verified": True}


def _described(found: TokenInfo) -> dict[str, Any]:
    """Return what RFC 7662 says about a token."""
    about = {
        "client_id": found.client,
        "username": found.account,
        "sub": found.account,
        "scope": found.scopes,
        "token_type": "Bearer" if found.kind == "access_token" else found.kind,
        "iat": int(found.create_time),
        "exp": None if found.expire_time is None else int(found.expire_time),
    }
    return {name: value for name, value in about.items() if value is not None}


def _client_id(request: OAuth2Request) -> str:
    return request.client.get_client_id() if request.client else ""


def _root(request: OAuth2Request) -> str:
    return cast(_Request, request).root


def _headers(authorization: str) -> dict[str, str]:
    """Return the header for Authlib, which cannot take one that is not what it says."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "basic":
        try:
            base64.b64decode(value.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return {}
    return {"Authorization": authorization}
