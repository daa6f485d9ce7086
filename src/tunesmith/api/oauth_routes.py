"""The OAuth endpoints that programs call: tokens, revocation, introspection, discovery, keys."""

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tunesmith.api.documents import root_url
from tunesmith.auth.oauth_server import Answer, OAuthCall, OAuthServer
from tunesmith.store import audit

LONGEST_FORM = 64 << 10  # bytes
_FORM = "application/x-www-form-urlencoded"
_NO_STORE = {"cache-control": "no-store", "pragma": "no-cache"}
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)

Parameters = list[tuple[str, str]]


class FormError(Exception):
    """A form that cannot be read; the message says why."""


def root_of(public_url: str) -> Callable[[Request], str]:
    """Return what tells the server's address as the caller sees it, without a slash at its end.

    Args:
        public_url: The address when it is fixed; empty for the one that each request names.
    """
    fixed = public_url.rstrip("/")
    return lambda request: fixed or root_url(request).rstrip("/")


async def read_form(request: Request) -> Parameters:
    """Return the fields of a request's form, empty ones left out; none when it has no body.

    Raises:
        FormError: It is too long, not a form, or not UTF-8.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_FORM:
            raise FormError(f"The form is longer than {LONGEST_FORM} bytes.")
    if body and request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise FormError(f"Send the parameters as {_FORM}.")
    return _pairs(body)


def query_of(request: Request) -> Parameters:
    """Return the parameters of a request's query, empty ones left out.

    Raises:
        FormError: They are not UTF-8.
    """
    return _pairs(request.scope["query_string"])


def oauth_routes(server: OAuthServer, root: Callable[[Request], str]) -> list[BaseRoute]:
    """Return the routes.

    Args:
        server: Answers.
        root: Tells the server's address as the caller of a request sees it.
    """

    def posted(answer: Callable[[OAuthCall], Answer], *, query: bool = False) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                parameters = await read_form(request) + (query_of(request) if query else [])
            except FormError as error:
                return _json({"error": "invalid_request", "error_description": str(error)}, 400)
            authorization = request.headers.get("authorization", "")
            call = OAuthCall(request.method, root(request), parameters, authorization)
            address = request.client.host if request.client else ""
            with audit.request_from(address, "OAuth client"):
                given = await run_in_threadpool(answer, call)
            return _json(given.body, given.status, given.headers)

        return endpoint

    def metadata(request: Request) -> Response:
        return JSONResponse(server.metadata(root(request)))

    def certs(_request: Request) -> Response:
        return JSONResponse(server.keys.public(), headers={"cache-control": "public, max-age=600"})

    async def tokeninfo(request: Request) -> Response:
        try:
            parameters = dict(await read_form(request) + query_of(request))
        except FormError as error:
            return _json({"error": "invalid_request", "error_description": str(error)}, 400)
        found = await run_in_threadpool(server.token_info, parameters.get("access_token", ""))
        return _json(found, 200) if found else _json({"error_description": "Invalid Value"}, 400)

    def userinfo(request: Request) -> Response:
        bearer = _BEARER.fullmatch(request.headers.get("authorization", "").strip())
        found = server.token_info(bearer[1]) if bearer else None
        if found is None:
            challenge = {"www-authenticate": 'Bearer error="invalid_token"'}
            return _json({"error": "invalid_token", "error_description": "Invalid Credentials"}, 401, challenge)
        return _json({"sub": found["sub"], "email": found["email"], "email_verified": True}, 200)

    token = posted(server.token)
    return [
        Route("/token", token, methods=["POST"]),
        Route("/oauth2/v4/token", token, methods=["POST"]),
        Route("/device/code", posted(server.device), methods=["POST"]),
        Route("/revoke", posted(server.revoke, query=True), methods=["POST"]),
        Route("/introspect", posted(server.introspect), methods=["POST"]),
        Route("/tokeninfo", tokeninfo, methods=["GET", "POST"]),
        Route("/oauth2/v3/tokeninfo", tokeninfo, methods=["GET", "POST"]),
        Route("/userinfo", userinfo, methods=["GET", "POST"]),
        Route("/v1/userinfo", userinfo, methods=["GET", "POST"]),
        Route("/oauth2/v3/userinfo", userinfo, methods=["GET", "POST"]),
        Route("/oauth2/v3/certs", certs),
        Route("/.well-known/oauth-authorization-server", metadata),
        Route("/.well-known/openid-configuration", metadata),
    ]


def _json(body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    own = {name.lower(): value for name, value in (headers or {}).items() if name.lower() != "content-type"}
    return JSONResponse(dict(body), status, {**own, **_NO_STORE})


def _pairs(encoded: bytes) -> Parameters:
    try:
        return parse_qsl(encoded.decode("ascii"), errors="strict", max_num_fields=64)
    except (UnicodeDecodeError, ValueError):
        raise FormError("The parameters are not a form in UTF-8 of at most 64 fields.") from None
