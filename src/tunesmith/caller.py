"""Who makes a request, and whether they still wait for the answer."""

import threading
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Caller:
    """An authenticated caller, made anew for each request.

    Attributes:
        account: The e-mail address of the account that the credential belongs to.
        scopes: The OAuth scopes of the credential; empty for an API key, which may do all its account may.
        project: The value of `x-goog-user-project`, a label that callers choose; None when not sent.
        gone: Set when the client has left; work done only for it should stop.
    """

    account: str
    scopes: frozenset[str] = frozenset()
    project: str | None = None
    gone: threading.Event = field(default_factory=threading.Event, compare=False)
