"""One call, from credentials to answer, in the order of its steps; every transport ends here."""

import logging
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from threading import Event
from typing import Any, Protocol

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from tunesmith import protos
from tunesmith.api.validation import Validator, without_input_only
from tunesmith.caller import Caller, Credentials
from tunesmith.errors import ApiError, Cancelled, Internal, Unimplemented

log = logging.getLogger(__name__)


class Verifier(Protocol):
    """Turns credentials into a caller."""

    def verify(self, credentials: Credentials) -> Caller:
        """Return the caller, or raise Unauthenticated, PermissionDenied or InvalidArgument."""
        ...


class Dispatcher:
    """Runs RPCs on plain service objects.

    Args:
        services: Each service by its full name. Its method for an RPC has the RPC's name in snake_case and
            takes the request and the caller; it returns the response, or an iterator if the RPC streams.
        verifier: Says who is calling.
    """

    def __init__(self, services: Mapping[str, object], verifier: Verifier) -> None:
        self._verifier = verifier
        self._methods: dict[str, Callable[[Any, Caller], Any]] = {}
        self._validators: dict[str, Validator] = {}
        for name, service in services.items():
            for rpc in protos.SERVICES[name].methods:
                self._validators[rpc.full_name] = Validator(rpc)
                method = getattr(service, _snake_case(rpc.name), None)
                if method is not None:
                    self._methods[rpc.full_name] = method

    def summaries(self) -> dict[str, str]:
        """Return a sentence on each RPC that is implemented, by the RPC's full name."""
        return {name: (method.__doc__ or "").partition("\n")[0] for name, method in self._methods.items()}

    def call(
        self, rpc: MethodDescriptor, request: Message, credentials: Credentials, gone: Event | None = None
    ) -> Message:
        """Run an RPC that answers once.

        Args:
            rpc: The RPC, from `protos.SERVICES`.
            request: Its request; OUTPUT_ONLY fields are cleared in place.
            credentials: What the transport found.
            gone: Set by the transport when the client leaves.

        Raises:
            ApiError: Whatever went wrong; nothing else is raised.
        """
        try:
            caller = self._authenticate(rpc, credentials, gone)
            method = self._find(rpc)
            self._validators[rpc.full_name].check(request)
            response: Message = method(request, caller)
            return without_input_only(response)
        except ApiError:
            raise
        except Exception as error:
            raise internal(error, rpc.full_name) from error

    def stream(
        self, rpc: MethodDescriptor, request: Message, credentials: Credentials, gone: Event | None = None
    ) -> Generator[Message]:
        """Run an RPC that answers with a stream; arguments and errors as for `call`.

        Nothing runs before the first response is asked for. Closing the generator closes the service's.
        """
        try:
            caller = self._authenticate(rpc, credentials, gone)
            method = self._find(rpc)
            self._validators[rpc.full_name].check(request)
            responses = method(request, caller)
            try:
                for response in responses:
                    yield without_input_only(response)
            finally:
                close = getattr(responses, "close", None)
                if close is not None:
                    close()
        except ApiError:
            raise
        except Exception as error:
            raise internal(error, rpc.full_name) from error

    def _authenticate(self, rpc: MethodDescriptor, credentials: Credentials, gone: Event | None) -> Caller:
        if gone is not None and gone.is_set():
            raise Cancelled("The client left before the call began.")
        caller = self._verifier.verify(credentials)
        if caller.project:
            log.info("%s by %s for project %r", rpc.full_name, caller.account, caller.project)
        return caller if gone is None else replace(caller, gone=gone)

    def _find(self, rpc: MethodDescriptor) -> Callable[[Any, Caller], Any]:
        try:
            return self._methods[rpc.full_name]
        except KeyError:
            raise Unimplemented(f"{rpc.full_name} is not implemented by this server.") from None


def internal(error: Exception, doing: str) -> Internal:
    """Log an error that is our own fault, and return what a caller may know of it."""
    log.error("%s failed", doing, exc_info=error)
    return Internal("An internal error has occurred. Please retry; the server's log says what happened.")


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
