"""What can go wrong, in google.rpc's words: one class per canonical code that we use.

    ApiError
    ├── InvalidArgument      400   ├── AlreadyExists       409
    ├── FailedPrecondition   400   ├── ResourceExhausted   429
    ├── Unauthenticated      401   ├── Cancelled           499
    ├── PermissionDenied     403   ├── Internal            500
    ├── NotFound             404   ├── Unimplemented       501
    ├── Aborted              409   ├── Unavailable         503
    └── DeadlineExceeded     504

Domain code raises them and never sees a transport; `api/` turns them into a response in one place.
"""

import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import ClassVar, Self

from google.protobuf.message import Message

from tunesmith import protos

SERVICE = "generativelanguage.googleapis.com"
"""The service name that Google's error details carry; clients match on it."""


class ApiError(Exception):
    """Base of all errors that a caller of the API may see.

    Args:
        message: What went wrong and what to do about it, for a person.
        details: google.rpc error details (`BadRequest`, `ErrorInfo`, …).
    """

    code: ClassVar[int]
    http: ClassVar[int]
    status: ClassVar[str]

    def __init__(self, message: str, details: Iterable[Message] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)

    @property
    def retry_seconds(self) -> float | None:
        """After how many seconds another try may succeed; None when nothing is known of that."""
        delays = [detail.retry_delay for detail in self.details if isinstance(detail, protos.RetryInfo)]
        return delays[0].ToMilliseconds() / 1000 if delays else None

    def to_status(self) -> protos.Status:
        """Return the error as a google.rpc.Status, as an operation's `error` field holds it."""
        status = protos.Status(code=self.code, message=self.message)
        for detail in self.details:
            status.details.add().Pack(detail)
        return status


class Cancelled(ApiError):
    code, http, status = 1, 499, "CANCELLED"


class InvalidArgument(ApiError):
    code, http, status = 3, HTTPStatus.BAD_REQUEST, "INVALID_ARGUMENT"

    @classmethod
    def at(cls, violations: Iterable[tuple[str, str]], message: str | None = None) -> Self:
        """Name every bad field.

        Args:
            violations: (field path, description) pairs; the path in snake_case from the request message.
            message: The message; by default one `* path: description` line a violation, as Google's
                semantic errors read.
        """
        pairs = list(violations)
        request = protos.BadRequest()
        for field, description in pairs:
            request.field_violations.add(field=field, description=description)
        return cls(message or "\n".join(f"* {field}: {text}" for field, text in pairs), [request])


class DeadlineExceeded(ApiError):
    code, http, status = 4, HTTPStatus.GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"


class NotFound(ApiError):
    code, http, status = 5, HTTPStatus.NOT_FOUND, "NOT_FOUND"


class AlreadyExists(ApiError):
    code, http, status = 6, HTTPStatus.CONFLICT, "ALREADY_EXISTS"


class PermissionDenied(ApiError):
    code, http, status = 7, HTTPStatus.FORBIDDEN, "PERMISSION_DENIED"


class ResourceExhausted(ApiError):
    code, http, status = 8, HTTPStatus.TOO_MANY_REQUESTS, "RESOURCE_EXHAUSTED"

    @classmethod
    def over(cls, setting: str, most: int, account: str, what: str, seconds: float) -> Self:
        """Say that an account is over a limit, with the details that Google's clients look for.

        Args:
            setting: The limit's name in `config.py`.
            most: Its value.
            account: Who is over it.
            what: What there is too much of, as a sentence.
            seconds: When another try may succeed.
        """
        seconds = math.ceil(seconds * 1000) / 1000
        message = (
            f"{what} The limit for each account is {most:,}, which the operator of this server sets as {setting}. "
            f"Try again in {math.ceil(seconds)} second{'s' if seconds > 1 else ''}."
        )
        failure, retry = protos.QuotaFailure(), protos.RetryInfo()
        failure.violations.add(
            subject=f"account:{account}",
            description=what,
            quota_metric=f"{SERVICE}/{setting}",
            quota_id=setting,
            quota_dimensions={"account": account},
            quota_value=most,
        )
        retry.retry_delay.FromMilliseconds(round(seconds * 1000))
        return cls(message, [failure, retry])


class FailedPrecondition(ApiError):
    code, http, status = 9, HTTPStatus.BAD_REQUEST, "FAILED_PRECONDITION"


class Aborted(ApiError):
    code, http, status = 10, HTTPStatus.CONFLICT, "ABORTED"


class Unimplemented(ApiError):
    code, http, status = 12, HTTPStatus.NOT_IMPLEMENTED, "UNIMPLEMENTED"


class Internal(ApiError):
    code, http, status = 13, HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL"


class Unavailable(ApiError):
    code, http, status = 14, HTTPStatus.SERVICE_UNAVAILABLE, "UNAVAILABLE"


class Unauthenticated(ApiError):
    code, http, status = 16, HTTPStatus.UNAUTHORIZED, "UNAUTHENTICATED"


def error_info(reason: str, **metadata: str) -> protos.ErrorInfo:
    """Return Google's machine-readable reason for a credential error."""
    return protos.ErrorInfo(reason=reason, domain="googleapis.com", metadata={"service": SERVICE, **metadata})
