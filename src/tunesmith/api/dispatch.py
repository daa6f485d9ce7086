"""One call, from credentials to answer, in the order of its steps; every transport ends here."""

import logging
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from functools import wraps
from threading import Event
from typing import Any, Protocol

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from tunesmith import protos
from tunesmith.api.http_rules import rules_of
from tunesmith.api.limits import Limits
from tunesmith.api.validation import Validator, without_input_only
from tunesmith.auth import scopes
from tunesmith.caller import Caller, Credentials
from tunesmith.errors import ApiError, Cancelled, Internal, PermissionDenied, Unimplemented
from tunesmith.store.audit import Audit

log = logging.getLogger(__name__)

Method = Callable[[Any, Caller], Any]

_KEY = "API key "
_GENERATES = re.compile(r"(Batch)?Embed|(Stream|Bidi)?Generate")
"""How the names of RPCs begin that take the engine's time."""
_READS = re.compile(r"(Batch)?Get|List|Wait|Watch|Count|Export")
"""How the names of the others begin that change nothing; all the rest are recorded."""


WAITS: Mapping[str, int] = {
    "google.longrunning.Operations.WaitOperation": 40,
    "tunesmith.v1beta.TuningService.WatchTuning": 256,
    "tunesmith.v1beta.TuningService.ExportTunedModel": 16,
}
"""RPCs that last as long as their caller likes: transports give them so many threads of their own."""


GENERATING = (
    "google.ai.generativelanguage.v1beta.GenerativeService",
    "google.ai.generativelanguage.v1beta.TextService",
)
"""Services whose calls wait for the engine: transports give them as many threads as it lets wait."""


class Verifier(Protocol):
    """Turns credentials into a caller."""

    def verify(self, credentials: Credentials) -> Caller:
        """Return the caller, or raise Unauthenticated, PermissionDenied or InvalidArgument."""
        ...


class Dispatcher:
    """Runs RPCs on plain service objects.

    Args:
        services: Each service by its full name. Its method for an RPC has the RPC's name in snake_case and
            takes the request and the caller; it returns the response, or an iterator if the RPC streams. That
            one may yield None: there is nothing new, and it goes on.
        verifier: Says who is calling.
        limits: What each account may ask for; by default, anything.
        audit: Where changes are recorded; by default, nowhere.
    """

    def __init__(
        self,
        services: Mapping[str, object],
        verifier: Verifier,
        limits: Limits | None = None,
        audit: Audit | None = None,
    ) -> None:
        self._verifier, self._audit = verifier, audit
        self._limits = limits or Limits()
        self._methods: dict[str, Method] = {}
        self._validators: dict[str, Validator] = {}
        for name, service in services.items():
            for rpc in protos.SERVICES[name].methods:
                self._validators[rpc.full_name] = Validator(rpc)
                method = getattr(service, _snake_case(rpc.name), None)
                if method is not None:
                    self._methods[rpc.full_name] = self._watched(rpc, method)

    def summaries(self) -> dict[str, str]:
        """Return a sentence on each RPC that is implemented, by the RPC's full name."""
        return {name: (method.__doc__ or "").partition("\n")[0] for name, method in self._methods.items()}

    def call(
        self,
        rpc: MethodDescriptor,
        request: Message,
        credentials: Credentials,
        gone: Event | None = None,
        address: str = "",
    ) -> Message:
        """Run an RPC that answers once.

        Args:
            rpc: The RPC, from `protos.SERVICES`.
            request: Its request; OUTPUT_ONLY fields are cleared in place.
            credentials: What the transport found.
            gone: Set by the transport when the client leaves.
            address: The network address of the client.

        Raises:
            ApiError: Whatever went wrong; nothing else is raised.
        """
        try:
            caller = self._authenticate(rpc, credentials, gone, address)
            method = self._find(rpc)
            self._validators[rpc.full_name].check(request)
            response: Message = method(request, caller)
            return without_input_only(response)
        except ApiError:
            raise
        except Exception as error:
            raise internal(error, rpc.full_name) from error

    def stream(
        self,
        rpc: MethodDescriptor,
        request: Message,
        credentials: Credentials,
        gone: Event | None = None,
        address: str = "",
    ) -> Generator[Message | None]:
        """Run an RPC that answers with a stream; arguments and errors as for `call`.

        None among the responses says that there is nothing new yet. Nothing runs before the first response is
        asked for. Closing the generator closes the service's.
        """
        try:
            caller = self._authenticate(rpc, credentials, gone, address)
            method = self._find(rpc)
            self._validators[rpc.full_name].check(request)
            responses = method(request, caller)
            try:
                for response in responses:
                    yield None if response is None else without_input_only(response)
            finally:
                close = getattr(responses, "close", None)
                if close is not None:
                    close()
        except ApiError:
            raise
        except Exception as error:
            raise internal(error, rpc.full_name) from error

    def _authenticate(
        self, rpc: MethodDescriptor, credentials: Credentials, gone: Event | None, address: str
    ) -> Caller:
        if gone is not None and gone.is_set():
            raise Cancelled("The client left before the call began.")
        caller = self._verifier.verify(credentials)
        caller = replace(caller, gone=caller.gone if gone is None else gone, address=address)
        self._limits.request(caller.account)
        if rpc.full_name in self._methods:  # what is not implemented says so
            self._check_scopes(rpc, caller)
        if caller.project:
            log.info("%s by %s for project %r", rpc.full_name, caller.account, caller.project)
        if self._audit and caller.credential.startswith(_KEY):
            self._audit.used(caller)
        return caller

    def _check_scopes(self, rpc: MethodDescriptor, caller: Caller) -> None:
        try:
            scopes.check(rpc.full_name, caller)
        except PermissionDenied as denied:
            if self._audit and _changes(rpc):
                self._audit.record(caller, rpc.name, outcome=denied.status)
            raise

    def _watched(self, rpc: MethodDescriptor, method: Method) -> Method:
        """Return a service's method, within its caller's limits and on record when it changes something."""
        if _GENERATES.match(rpc.name):
            return _generating(self._limits, method, streams=rpc.server_streaming)
        return _recorded(self._audit, rpc, method) if self._audit and _changes(rpc) else method

    def _find(self, rpc: MethodDescriptor) -> Method:
        try:
            return self._methods[rpc.full_name]
        except KeyError:
            raise Unimplemented(f"{rpc.full_name} is not implemented by this server.") from None


def _changes(rpc: MethodDescriptor) -> bool:
    return not (_GENERATES.match(rpc.name) or _READS.match(rpc.name))


def _generating(limits: Limits, method: Method, *, streams: bool) -> Method:
    """Return a method whose answers count as under way until they are whole, or nobody reads on."""

    @wraps(method)
    def answer(request: Any, caller: Caller) -> Any:
        with limits.generation(caller.account):
            return method(request, caller)

    @wraps(method)
    def stream(request: Any, caller: Caller) -> Iterator[Any]:
        with limits.generation(caller.account):
            yield from method(request, caller)

    return stream if streams else answer


def _recorded(audit: Audit, rpc: MethodDescriptor, method: Method) -> Method:
    """Return a method that leaves a record of what it did, or was asked to do and refused."""
    named = next((path.split(".") for rule in rules_of(rpc) for path, *_ in rule.variables), [])

    @wraps(method)
    def run(request: Any, caller: Caller) -> Any:
        resource = request
        for field in named:
            resource = getattr(resource, field)
        with audit.change(caller, rpc.name, resource if named else ""):
            return method(request, caller)

    return run


def internal(error: Exception, doing: str) -> Internal:
    """Log an error that is our own fault, and return what a caller may know of it."""
    log.error("%s failed", doing, exc_info=error)
    return Internal("An internal error has occurred. Please retry; the server's log says what happened.")


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
