"""What commands work on: the data dir of a server on this machine, or any server's API."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.commands.times import DAY
from tunesmith.config import Settings

if TYPE_CHECKING:
    from tunesmith.app import Parts
    from tunesmith.client import Client

LOCAL = "http://127.0.0.1:8080"


def open_parts(data_dir: Path | None) -> "Parts":
    """Return the parts of a data dir; None: of the one in the settings."""
    from tunesmith.app import Parts

    return Parts.open(Settings.load(data_dir=data_dir))


@contextmanager
def administering(data_dir: Path | None, action: str, resource: str, detail: str = "") -> "Iterator[Parts]":
    """The parts of a data dir, for a change that goes on record; see `Audit.change`."""
    from tunesmith.store.audit import administrator

    parts = open_parts(data_dir)
    with parts.audit.change(administrator(), action, resource, detail):
        yield parts


def client_of(url: str | None, token: str | None, settings: Settings) -> "Client":
    """Return a client with the credential given, that of a sign-in, or one that the data dir here grants.

    Raises:
        ClientError: There is none; the message says how to get one.
    """
    from tunesmith import login as sign_in
    from tunesmith.auth.tokens import DEFAULT_SCOPES
    from tunesmith.client import Client, ClientError
    from tunesmith.store.audit import administrator

    found = sign_in.find(url)
    url = url or (found.url if found else LOCAL)
    ca_file = found.ca_file if found else None
    if token is None and "TUNESMITH_API_KEY" in os.environ:
        return Client(url, api_key=os.environ["TUNESMITH_API_KEY"], ca_file=ca_file)
    if token is None and found is not None:
        return Client(url, found.token(), ca_file=ca_file, refresh=found.refresh)
    if token is None:
        if not settings.data_dir.exists():
            raise ClientError(
                f"No credential: sign in with tunesmith login --url {url}, pass --token, set TUNESMITH_TOKEN or "
                f"TUNESMITH_API_KEY. ({settings.data_dir} does not exist, so none can be made here.)"
            )
        parts = open_parts(settings.data_dir)
        account = next((account.email for account in parts.accounts.list() if not account.disabled), None)
        if account is None:
            raise ClientError(f"{settings.data_dir} has no account. Make one: tunesmith accounts create EMAIL")
        with parts.audit.change(administrator(), "IssueToken", f"accounts/{account}"):
            token = parts.tokens.create(account, DEFAULT_SCOPES, seconds=DAY)
    return Client(url, token, ca_file=ca_file)
