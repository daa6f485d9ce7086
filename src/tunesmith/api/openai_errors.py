"""Errors in OpenAI's words: the shape that its clients read, and the status that they look at first."""

import json
import math
from collections.abc import Mapping
from http import HTTPStatus

from tunesmith import protos
from tunesmith.api.exchange import Headers
from tunesmith.api.openai_requests import parameter, violations
from tunesmith.caller import Credentials
from tunesmith.errors import (
    ApiError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unimplemented,
)

_KEY_REASONS = {"API_KEY_INVALID"}


def http_status(error: ApiError, credentials: Credentials) -> int:
    """Return the status: Google's, but for keys that are missing or not good, where OpenAI has 401."""
    if _is_no_key(error, credentials):
        return HTTPStatus.UNAUTHORIZED
    return int(error.http)


def error_body(error: ApiError, names: Mapping[str, str], credentials: Credentials) -> bytes:
    """Return an error as JSON.

    Args:
        error: What went wrong.
        names: OpenAI's names of Google's fields, as far as they differ.
        credentials: What the caller brought.
    """
    wrong = [(parameter(one.field, names), one.description) for one in violations(error) if one.field]
    message = "\n".join(f"{name}: {text}" for name, text in wrong) or error.message
    kind, code = _kind(error, credentials)
    place = wrong[0][0] if wrong else "model" if isinstance(error, NotFound) else None
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": place, "code": code}}, ensure_ascii=False
    ).encode()


def error_headers(error: ApiError) -> Headers:
    """Return the headers that go with an error, beside its content type."""
    if error.retry_seconds is None:
        return ()
    return ((b"retry-after", str(math.ceil(error.retry_seconds)).encode()),)


def _is_no_key(error: ApiError, credentials: Credentials) -> bool:
    if isinstance(error, PermissionDenied):
        return credentials.bearer is None and credentials.api_key is None
    reasons = {detail.reason for detail in error.details if isinstance(detail, protos.ErrorInfo)}
    return isinstance(error, Unauthenticated) or bool(reasons & _KEY_REASONS)


def _kind(error: ApiError, credentials: Credentials) -> tuple[str, str | None]:
    """Return OpenAI's type and code for an error."""
    if _is_no_key(error, credentials):
        return "authentication_error", "invalid_api_key"
    kinds: dict[type[ApiError], tuple[str, str | None]] = {
        InvalidArgument: ("invalid_request_error", None),
        PermissionDenied: ("permission_error", "permission_denied"),
        NotFound: ("invalid_request_error", "model_not_found"),
        ResourceExhausted: ("rate_limit_error", "rate_limit_exceeded"),
        Unimplemented: ("invalid_request_error", "unimplemented"),
    }
    for kind, words in kinds.items():
        if isinstance(error, kind):
            return words
    return ("server_error" if error.http >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"), (
        error.status.lower()
    )
