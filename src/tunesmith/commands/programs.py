"""The programs that people sign in with, and those that sign in themselves."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.commands.options import DataDir
from tunesmith.commands.reach import administering, open_parts
from tunesmith.config import Settings

clients = typer.Typer(help="The programs that people sign in with.", no_args_is_help=True)
service_account = typer.Typer(help="Programs that sign in with a key of their own.", no_args_is_help=True)
keys = typer.Typer(help="The keys with which the server signs identity tokens.", no_args_is_help=True)

OwnUrl = Annotated[
    str | None,
    typer.Option(
        "--url", help="The server's address as its clients have it, such as https://tunesmith.example.com."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The file to write, readable for you only; left out, it is printed."),
]
ProjectLabel = Annotated[str, typer.Option("--project", help="A project id; any label will do.")]


def client_secret(
    name: Annotated[
        str, typer.Option(help="What people are told wants to use their account.")
    ] = "Google Cloud CLI",
    url: OwnUrl = None,
    out: Out = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="As Google's files are; gcloud then needs auth/token_host.")
    ] = False,
    project: ProjectLabel = "my-project-id",
    data_dir: DataDir = None,
) -> None:
    """Issue the client_secret.json with which gcloud and google-auth-oauthlib sign people in."""
    from tunesmith.auth.clients import client_secret_file

    with administering(data_dir, "CreateClient", "clients", name) as parts:
        root = _own_address(url, parts.settings)
        client_id, secret = parts.clients.create(name)
    _write_secret(out, client_secret_file(client_id, secret, root, project, plain=plain))
    print(f"Client {client_id} for {root}. To refuse it: tunesmith clients revoke {client_id}", file=sys.stderr)
    if root.startswith("http:"):
        text = "gcloud signs in over https only; over http it needs OAUTHLIB_INSECURE_TRANSPORT=1."
        print(text, file=sys.stderr)


@clients.command("list")
def list_clients(data_dir: DataDir = None) -> None:
    """List the clients."""
    for client in open_parts(data_dir).clients.list():
        print(f"{client.id}  {client.name}")


@clients.command("import")
def import_client(
    file: Annotated[Path, typer.Argument(help="A client_secret.json of Google's.", exists=True, dir_okay=False)],
    name: Annotated[
        str, typer.Option(help="What people are told wants to use their account.")
    ] = "Google Cloud CLI",
    data_dir: DataDir = None,
) -> None:
    """Take a client over from Google, so that its file goes on to work where Google's addresses lead here."""
    try:
        installed = json.loads(file.read_text("utf-8"))["installed"]
        client_id, secret = str(installed["client_id"]), str(installed["client_secret"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: needs installed.client_id and installed.client_secret") from None
    with administering(data_dir, "ImportClient", f"clients/{client_id}") as parts:
        parts.clients.create(name, client_id, secret)
    print(f"Took over {client_id}.")


@clients.command("revoke")
def revoke_client(client_id: str, data_dir: DataDir = None) -> None:
    """Refuse a client from now on, and end all that people allowed it."""
    with administering(data_dir, "RevokeClient", f"clients/{client_id}") as parts:
        parts.clients.revoke(client_id)
    print(f"Revoked {client_id}.")


@service_account.command("create")
def create_service_account(
    email: Annotated[str, typer.Argument(help="Its address, such as nightly@my-project-id.example.")],
    url: OwnUrl = None,
    out: Out = None,
    project: ProjectLabel = "my-project-id",
    data_dir: DataDir = None,
) -> None:
    """Make a service account, or one more key of it, and write its key file; only the public half is kept."""
    from tunesmith.auth.service_accounts import key_file

    with administering(data_dir, "CreateServiceAccountKey", f"accounts/{email}") as parts:
        root = _own_address(url, parts.settings)
        key_id, private_key = parts.service_accounts.create(email)
    _write_secret(out, key_file(email.strip().lower(), key_id, private_key, root, project))
    print(f"Key {key_id} of {email}; it is not shown again.", file=sys.stderr)


@service_account.command("list")
def list_service_accounts(data_dir: DataDir = None) -> None:
    """List the service accounts, each with the ids of its keys."""
    for account, held in open_parts(data_dir).service_accounts.list():
        print(f"{account.email}  {', '.join(key.id for key in held)}")


@service_account.command("delete")
def delete_service_account(email: str, data_dir: DataDir = None) -> None:
    """Refuse a service account, its keys and its tokens from now on; its models stay."""
    with administering(data_dir, "DeleteServiceAccount", f"accounts/{email}") as parts:
        parts.service_accounts.delete(email)
    print(f"Deleted {email}.")


@keys.command("rotate")
def rotate_keys(data_dir: DataDir = None) -> None:
    """Sign with a new key from now on; this happens by itself every 90 days."""
    with administering(data_dir, "RotateSigningKeys", "signingKeys") as parts:
        print(f"New key {parts.signing_keys.rotate().id}.")


def _own_address(url: str | None, settings: Settings) -> str:
    """Return where clients reach the server of a data dir."""
    if given := url or settings.public_url:
        return Settings.load(public_url=given).public_url
    if settings.host in ("0.0.0.0", "::"):  # noqa: S104 — that is what is asked about
        raise ValueError("pass --url, the server's address as its clients have it")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.ssl_certfile else 'http'}://{host}:{settings.port}"


def _write_secret(out: Path | None, document: dict[str, Any]) -> None:
    """Write JSON that nobody else is to read; print it when there is no file."""
    text = json.dumps(document, indent=2)
    if out is None:
        print(text)
        return
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
    print(f"Wrote {out}.", file=sys.stderr)
