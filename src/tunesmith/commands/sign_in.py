"""Signing this machine in to a server, and out."""

from typing import Annotated, Any

import typer

from tunesmith.commands.options import CaFile, Url
from tunesmith.commands.reach import LOCAL


def login(
    url: Annotated[str, typer.Option(envvar="TUNESMITH_URL", help="The server.")] = LOCAL,
    device: Annotated[
        bool, typer.Option("--device", help="Sign in in a browser on another machine, with a code.")
    ] = False,
    ca_file: CaFile = None,
) -> None:
    """Sign this machine in to a server; the other commands then use that."""
    from tunesmith import login as sign_in

    trusted = str(ca_file) if ca_file else None
    if device:
        sign_in.with_device_code(url, trusted, _show_device_code)
    else:
        sign_in.in_browser(url, trusted, _open_browser)
    print(f"Signed in to {url}. Kept in {sign_in.credentials_file()}")


def logout(url: Url = None) -> None:
    """Sign this machine out, here and at the server."""
    from tunesmith import login as sign_in

    found = sign_in.find(url)
    if found is None:
        raise ValueError(f"not signed in to {url or 'any server'}")
    sign_in.forget(found)
    print(f"Signed out of {found.url}.")


def _open_browser(address: str) -> None:
    import webbrowser

    print(f"Sign in in the browser. If none opens, open this address on this machine:\n\n  {address}\n")
    webbrowser.open(address)


def _show_device_code(asked: dict[str, Any]) -> None:
    print(
        f"In any browser open\n\n  {asked['verification_uri']}\n\nand type\n\n  {asked['user_code']}\n", flush=True
    )
