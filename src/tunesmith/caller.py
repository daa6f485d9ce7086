"""Who makes a request, and whether they still wait for the answer."""

import threading
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Caller:
    """An authenticated caller, made anew for each request.

    Attributes:
        account: The e-mail address of the account that the credential belongs to.
        scopes: The OAuth scopes of the credential; None for an API key that may do all its account may.
        project: The value of `x-goog-user-project`, a label that callers choose; None when not sent.
        credential: The kind of the credential, with the id when it is a key: for the audit record.
        address: The network address that the request comes from.
        groups: The groups that an external issuer says the caller is in, beside those known here.
        gone: Set when the client has left; work done only for it should stop.
    """

    account: str
    scopes: frozenset[str] | None = None
    project: str | None = None
    credential: str = ""
    address: str = ""
    groups: frozenset[str] = frozenset()
    gone: threading.Event = field(default_factory=threading.Event, compare=False)


@dataclass(frozen=True)
class Credentials:
    """What a request brings to prove who its caller is, as sent and not yet looked at.

    Attributes:
        bearer: An OAuth access token; it wins over a key, because clients send dummy keys beside it.
        api_key: An API key.
        project: The value of `x-goog-user-project`.
    """

    bearer: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    project: str | None = None
