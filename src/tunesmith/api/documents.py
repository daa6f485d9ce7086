"""The routes that describe the API: discovery, OpenAPI and the page for people."""

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tunesmith.api.body_formats import JSON_FORMATS
from tunesmith.api.discovery import BATCH_PATH, NAME, Discovery
from tunesmith.api.docs_page import docs_page
from tunesmith.api.openapi import DEFAULT_VERSION, openapi_document
from tunesmith.api.surface import methods
from tunesmith.errors import ApiError, Unimplemented

_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


def document_routes(summaries: Mapping[str, str]) -> list[BaseRoute]:
    """Return the routes.

    Args:
        summaries: A sentence on each RPC that is implemented, by the RPC's full name.
    """
    offered, release = tuple(methods(summaries)), version("tunesmith")
    discovery = Discovery(offered, release)

    @lru_cache(maxsize=16)  # by address; callers choose the Host header
    def openapi(root: str) -> dict[str, object]:
        return openapi_document(offered, release, root)

    def rest(request: Request) -> Response:
        name = request.path_params.get("version") or request.query_params.get("version") or DEFAULT_VERSION
        try:
            return JSONResponse(discovery.document(name, root_url(request)))
        except ApiError as error:
            return _refusal(error)

    def batch(_request: Request) -> Response:
        return _refusal(Unimplemented("Batched HTTP requests are not implemented by this server."))

    def openapi_json(request: Request) -> Response:
        return JSONResponse(openapi(root_url(request)))

    def docs(request: Request) -> Response:
        root = root_url(request)
        return HTMLResponse(docs_page(openapi(root), root), headers={"content-security-policy": _POLICY})

    return [
        Route("/$discovery/rest", rest),
        Route(f"/discovery/v1/apis/{NAME}/{{version}}/rest", rest),
        Route("/openapi.json", openapi_json),
        Route("/docs", docs),
        Route(f"/{BATCH_PATH}", batch, methods=["POST"]),
    ]


def _refusal(error: ApiError) -> Response:
    body = JSON_FORMATS[True, False]
    return Response(body.error(error), int(error.http), {"content-type": body.content_type.decode()})


def root_url(request: Request) -> str:
    """Return this server's address as the caller sees it, with a slash at its end."""
    scheme = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    if scheme not in ("http", "https"):
        scheme = request.url.scheme
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        address = request.scope.get("server") or ("localhost", None)
        host = f"{address[0]}:{address[1]}" if address[1] else address[0]
    return f"{scheme}://{host}/"
