"""The commands. Heavy imports happen inside a command, so that help and errors come at once."""

import csv
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.config import Settings
from tunesmith.errors import ApiError

if TYPE_CHECKING:
    from tunesmith.app import Parts
    from tunesmith.client import Client
    from tunesmith.store.tables import ApiKey

app = typer.Typer(
    help="A self-hosted tuning service that speaks the Gemini API's tunedModels protocol.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
accounts = typer.Typer(help="The people who may call the API.", no_args_is_help=True)
api_key = typer.Typer(help="API keys, shown once when they are made.", no_args_is_help=True)
groups = typer.Typer(help="People with whom tuned models are shared at once.", no_args_is_help=True)
projects = typer.Typer(help="Projects, which may read the tuned models that list them.", no_args_is_help=True)
clients = typer.Typer(help="The programs that people sign in with.", no_args_is_help=True)
service_account = typer.Typer(help="Programs that sign in with a key of their own.", no_args_is_help=True)
audit = typer.Typer(help="What was done by whom.")
keys = typer.Typer(help="The keys with which the server signs identity tokens.", no_args_is_help=True)
app.add_typer(accounts, name="accounts")
app.add_typer(groups, name="groups")
app.add_typer(projects, name="projects")
app.add_typer(api_key, name="api-key")
app.add_typer(clients, name="clients")
app.add_typer(service_account, name="service-account")
app.add_typer(keys, name="keys")
app.add_typer(audit, name="audit")

console = Console()


def _option(field: str, *names: str) -> Any:
    """An option that stands for a setting: help, environment variable and default come from the setting."""
    setting = Settings.model_fields[field]
    default = setting.get_default(call_default_factory=True, validated_data={})
    return typer.Option(
        *(names or (f"--{field.replace('_', '-')}",)),
        help=setting.description,
        envvar=f"TUNESMITH_{field.upper()}",
        show_default=str(default),
    )


DataDir = Annotated[Path | None, _option("data_dir")]
CacheDir = Annotated[Path | None, _option("cache_dir")]
Device = Annotated[str | None, _option("device")]
Threads = Annotated[int | None, _option("threads")]
LogLevel = Annotated[str | None, _option("log_level")]
Url = Annotated[
    str | None,
    typer.Option(
        envvar="TUNESMITH_URL",
        help="The server; left out, the one this machine signed in to last, or http://127.0.0.1:8080.",
    ),
]
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
CaFile = Annotated[
    Path | None,
    typer.Option(
        help="The authority that signed the server's certificate, in PEM, when this machine does not trust it.",
        exists=True,
        dir_okay=False,
        resolve_path=True,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="TUNESMITH_TOKEN",
        help="An access token; left out, that of tunesmith login, or one made from the server's data dir.",
    ),
]
GroupEmail = Annotated[str, typer.Argument(metavar="GROUP", help="Its e-mail address, such as team@example.com.")]
ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="Its id or its number.")]
Members = Annotated[list[str], typer.Argument(metavar="EMAIL...", help="The accounts.")]
LOCAL = "http://127.0.0.1:8080"
DAY = 86_400  # seconds


@app.command()
def serve(
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    grpc_port: Annotated[int | None, _option("grpc_port")] = None,
    ssl_certfile: Annotated[Path | None, _option("ssl_certfile")] = None,
    ssl_keyfile: Annotated[Path | None, _option("ssl_keyfile")] = None,
    insecure: Annotated[bool | None, _option("insecure", "--insecure")] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    workers: Annotated[int | None, _option("workers")] = None,
    device: Device = None,
    threads: Threads = None,
    log_level: LogLevel = None,
    stop_with_stdin: Annotated[bool, typer.Option("--stop-with-stdin", hidden=True)] = False,
) -> None:
    """Serve the API, with a worker process that tunes."""
    settings = Settings.load(
        host=host,
        port=port,
        grpc_port=grpc_port,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        insecure=insecure,
        data_dir=data_dir,
        cache_dir=cache_dir,
        workers=workers,
        device=device,
        threads=threads,
        log_level=log_level,
    )
    _log(settings)
    from tunesmith import app as server
    from tunesmith.base_models.catalog import Catalog
    from tunesmith.terminal import fetch_weights

    fetch_weights(Console(stderr=True), Catalog.load(settings).default, settings.cache_dir)
    server.serve(settings, stop_with_stdin)


@app.command()
def worker(
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    threads: Threads = None,
    log_level: LogLevel = None,
    name: Annotated[str, typer.Option(help="What the job queue calls it; must be unique.")] = "",
    stop_with_stdin: Annotated[bool, typer.Option("--stop-with-stdin", hidden=True)] = False,
) -> None:
    """Run one more worker process on a server's data dir."""
    settings = Settings.load(
        data_dir=data_dir, cache_dir=cache_dir, device=device, threads=threads, log_level=log_level
    )
    _log(settings)
    import socket

    from tunesmith import app as server

    server.work(settings, name or f"{socket.gethostname()}-{os.getpid()}", stop_with_stdin)


@app.command()
def certificate(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Host names and addresses that clients will use; localhost is always there."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; left out, `tls` in the data dir.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a certificate to try TLS out, and a local authority that clients are told to trust."""
    from tunesmith.certificates import issue

    folder = (folder or Settings.load(data_dir=data_dir).data_dir / "tls").absolute()
    made = issue(folder, list(dict.fromkeys([*(names or []), "localhost", "127.0.0.1", "::1"])))
    print(f"Made {made.certificate}, good until {made.expires:%-d %B %Y}. Serve with it:\n")
    print(f"  tunesmith serve --ssl-certfile {made.certificate} --ssl-keyfile {made.key}\n")
    print(f"Clients must trust {made.authority}. Copy it to them (only it: the .key files are secret), and:\n")
    for client, trust in (
        ("curl", f"curl --cacert {made.authority}"),
        ("gcloud", f"gcloud config set core/custom_ca_certs_file {made.authority}"),
        ("Python, REST", f"export REQUESTS_CA_BUNDLE={made.authority} SSL_CERT_FILE={made.authority}"),
        ("gRPC", f"export GRPC_DEFAULT_SSL_ROOTS_FILE_PATH={made.authority}"),
        ("Node.js", f"export NODE_EXTRA_CA_CERTS={made.authority}"),
    ):
        print(f"  {client:<14}{trust}")


@app.command()
def demo(
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    url: Annotated[str | None, typer.Option(help="A server that runs; left out, one is started.")] = None,
    token: Token = None,
) -> None:
    """Run the tutorial: tune the "next number" model on real weights and ask it."""
    settings = Settings.load(data_dir=data_dir, cache_dir=cache_dir)
    from tunesmith import demo as tutorial
    from tunesmith.base_models.catalog import Catalog
    from tunesmith.terminal import fetch_weights

    if url:
        with _client(url, token, settings) as client:
            right = tutorial.run(console, client, url)
    else:
        fetch_weights(console, Catalog.load(settings).default, settings.cache_dir)
        console.print(f"[bold]Serving[/] on a free port, data in {settings.data_dir}")
        with tutorial.server(settings) as own, _client(own, None, settings) as client:
            right = tutorial.run(console, client, own)
    if not right:
        console.print("[red]An answer differs from the tutorial's.[/]")
        raise typer.Exit(1)
    tutorial.say_what_next(console, settings)


@app.command()
def token(
    email: Annotated[str, typer.Argument(help="The account.")],
    scopes: Annotated[
        str, typer.Option(help="Google's OAuth scopes, separated by commas; default: what the tutorial asks for.")
    ] = "",
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 30m, 1h, 7d.")] = "1h",
    data_dir: DataDir = None,
) -> None:
    """Print an access token for an account."""
    from tunesmith.auth.scopes import known_scope
    from tunesmith.auth.tokens import DEFAULT_SCOPES

    asked = [known_scope(scope) for scope in scopes.split(",") if scope.strip()] or DEFAULT_SCOPES
    seconds = _seconds(ttl)
    with _administering(data_dir, "IssueToken", f"accounts/{email}", f"good for {ttl}") as parts:
        print(parts.tokens.create(email, asked, seconds))


@accounts.command("create")
def create_account(
    email: str,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read a password for signing in from standard input.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Make an account."""
    password = sys.stdin.readline().rstrip("\n") if password_stdin else None
    with _administering(data_dir, "CreateAccount", f"accounts/{email}") as parts:
        parts.accounts.create(email, password)
    print(f"Made the account {email}. A token for it: tunesmith token {email}")


@accounts.command("list")
def list_accounts(data_dir: DataDir = None) -> None:
    """List the accounts."""
    for account in _parts(data_dir).accounts.list():
        print(f"{account.email}{'  disabled' if account.disabled else ''}")


@accounts.command("password")
def set_password(
    email: str,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read it from standard input instead of asking.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Give an account a new password; its browsers and programs must sign in again."""
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = typer.prompt("New password", hide_input=True, confirmation_prompt=True)
    with _administering(data_dir, "ChangePassword", f"accounts/{email}") as parts:
        parts.accounts.set_password(email, password)
    print(f"{email} has a new password. Access tokens of `tunesmith token` and API keys stay as they are.")


@accounts.command("disable")
def disable_account(email: str, data_dir: DataDir = None) -> None:
    """Refuse an account's tokens and keys from now on; its models stay."""
    with _administering(data_dir, "DisableAccount", f"accounts/{email}") as parts:
        parts.accounts.disable(email)
    print(f"Disabled {email}.")


@groups.command("create")
def create_group(group: GroupEmail, data_dir: DataDir = None) -> None:
    """Make a group."""
    with _administering(data_dir, "CreateGroup", f"groups/{group}") as parts:
        parts.groups.create(group)
    print(f"Made the group {group}. Put people in it: tunesmith groups add {group} EMAIL")


@groups.command("list")
def list_groups(data_dir: DataDir = None) -> None:
    """List the groups, each with its members."""
    for group, members in _parts(data_dir).groups.list().items():
        print(f"{group}  {', '.join(members) or 'nobody'}")


@groups.command("add")
def add_to_group(group: GroupEmail, accounts: Members, data_dir: DataDir = None) -> None:
    """Put accounts into a group."""
    with _administering(data_dir, "AddToGroup", f"groups/{group}", ", ".join(accounts)) as parts:
        parts.groups.add(group, accounts)
    print(f"{', '.join(accounts)} may now do what {group} may.")


@groups.command("remove")
def remove_from_group(group: GroupEmail, accounts: Members, data_dir: DataDir = None) -> None:
    """Take accounts out of a group."""
    with _administering(data_dir, "RemoveFromGroup", f"groups/{group}", ", ".join(accounts)) as parts:
        parts.groups.remove(group, accounts)
    print(f"Took {', '.join(accounts)} out of {group}.")


@groups.command("delete")
def delete_group(group: GroupEmail, data_dir: DataDir = None) -> None:
    """Delete a group, and what is shared with it."""
    with _administering(data_dir, "DeleteGroup", f"groups/{group}") as parts:
        parts.groups.delete(group)
    print(f"Deleted the group {group}.")


@projects.command("create")
def create_project(
    project: Annotated[str, typer.Argument(help="Its id, such as my-project-id.")],
    number: Annotated[
        int | None, typer.Option(help="Its number, if models name one already; left out, one is made.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a project and print its number, which goes into a tuned model's readerProjectNumbers."""
    with _administering(data_dir, "CreateProject", f"projects/{project}") as parts:
        print(parts.projects.create(project, number))
    print(f"Made the project {project}. Put people in it: tunesmith projects add {project} EMAIL", file=sys.stderr)


@projects.command("list")
def list_projects(data_dir: DataDir = None) -> None:
    """List the projects, each with its number and its members."""
    for project, members in _parts(data_dir).projects.list():
        print(f"{project.id}  {project.number}  {', '.join(members) or 'nobody'}")


@projects.command("add")
def add_to_project(project: ProjectName, accounts: Members, data_dir: DataDir = None) -> None:
    """Put accounts into a project."""
    with _administering(data_dir, "AddToProject", f"projects/{project}", ", ".join(accounts)) as parts:
        parts.projects.add(project, accounts)
    print(f"{', '.join(accounts)} may read what {project} may, with the header x-goog-user-project: {project}")


@projects.command("remove")
def remove_from_project(project: ProjectName, accounts: Members, data_dir: DataDir = None) -> None:
    """Take accounts out of a project."""
    with _administering(data_dir, "RemoveFromProject", f"projects/{project}", ", ".join(accounts)) as parts:
        parts.projects.remove(project, accounts)
    print(f"Took {', '.join(accounts)} out of {project}.")


@projects.command("delete")
def delete_project(project: ProjectName, data_dir: DataDir = None) -> None:
    """Delete a project; what it may read stays with those who may read it otherwise."""
    with _administering(data_dir, "DeleteProject", f"projects/{project}") as parts:
        parts.projects.delete(project)
    print(f"Deleted the project {project}.")


@api_key.command("create")
def create_key(
    email: str,
    name: Annotated[str, typer.Option(help="What to call it, such as the program that uses it.")] = "",
    expires: Annotated[
        str, typer.Option(help="How long it is good: 12h, 90d; left out, until it is revoked.")
    ] = "",
    scopes: Annotated[
        str,
        typer.Option(
            help="All that it may do, separated by commas, such as generative-language.tuning.readonly; left "
            "out, all that the account may."
        ),
    ] = "",
    data_dir: DataDir = None,
) -> None:
    """Make an API key and print it, this once."""
    seconds = _seconds(expires, "--expires") if expires else None
    asked = [scope for scope in scopes.split(",") if scope.strip()]
    with _administering(data_dir, "CreateApiKey", f"accounts/{email}") as parts:
        key_id, key = parts.keys.create(email, name, seconds, asked)
    print(key)
    print(f"Key {key_id} of {email}; it is not shown again.", file=sys.stderr)


@api_key.command("list")
def list_keys(email: str, data_dir: DataDir = None) -> None:
    """List an account's keys: id, name, when they were made and last used, when they end, what they may do."""
    for key in _parts(data_dir).keys.list(email):
        print(_described(key))


@api_key.command("revoke")
def revoke_key(key_id: str, data_dir: DataDir = None) -> None:
    """Refuse a key from now on."""
    with _administering(data_dir, "RevokeApiKey", f"apiKeys/{key_id}") as parts:
        parts.keys.revoke(key_id)
    print(f"Revoked {key_id}.")


@app.command("client-secret")
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

    with _administering(data_dir, "CreateClient", "clients", name) as parts:
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
    for client in _parts(data_dir).clients.list():
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
    with _administering(data_dir, "ImportClient", f"clients/{client_id}") as parts:
        parts.clients.create(name, client_id, secret)
    print(f"Took over {client_id}.")


@clients.command("revoke")
def revoke_client(client_id: str, data_dir: DataDir = None) -> None:
    """Refuse a client from now on, and end all that people allowed it."""
    with _administering(data_dir, "RevokeClient", f"clients/{client_id}") as parts:
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

    with _administering(data_dir, "CreateServiceAccountKey", f"accounts/{email}") as parts:
        root = _own_address(url, parts.settings)
        key_id, private_key = parts.service_accounts.create(email)
    _write_secret(out, key_file(email.strip().lower(), key_id, private_key, root, project))
    print(f"Key {key_id} of {email}; it is not shown again.", file=sys.stderr)


@service_account.command("list")
def list_service_accounts(data_dir: DataDir = None) -> None:
    """List the service accounts, each with the ids of its keys."""
    for account, held in _parts(data_dir).service_accounts.list():
        print(f"{account.email}  {', '.join(key.id for key in held)}")


@service_account.command("delete")
def delete_service_account(email: str, data_dir: DataDir = None) -> None:
    """Refuse a service account, its keys and its tokens from now on; its models stay."""
    with _administering(data_dir, "DeleteServiceAccount", f"accounts/{email}") as parts:
        parts.service_accounts.delete(email)
    print(f"Deleted {email}.")


@keys.command("rotate")
def rotate_keys(data_dir: DataDir = None) -> None:
    """Sign with a new key from now on; this happens by itself every 90 days."""
    with _administering(data_dir, "RotateSigningKeys", "signingKeys") as parts:
        print(f"New key {parts.signing_keys.rotate().id}.")


@audit.callback(invoke_without_command=True)
def show_audit(
    context: typer.Context,
    account: Annotated[str | None, typer.Option(help="Only what this account did.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Only what was done to this tuned model and its permissions.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Only from then on: 2026-01-31, 2026-01-31T12:00 or 24h.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="The newest so many; 0 for all.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Show the record of who did what, the newest last."""
    if context.invoked_subcommand:
        return
    from tunesmith.terminal import audit_line, audit_table

    parts, start = _parts(data_dir), _moment(since, "--since") if since else None
    records = parts.audit.newest(limit + 1 if limit else 0, account=account, model=model, since=start)
    shown = records[-limit:]
    if as_json:
        for record in shown:
            print(audit_line(record))
    else:
        console.print(audit_table(shown) if shown else "Nothing is on record that matches.")
    if len(shown) < len(records):
        print("There are older records: --limit shows more.", file=sys.stderr)


@audit.command("prune")
def prune_audit(
    before: Annotated[
        str, typer.Option(help="Remove what is older: 2026-01-31, 2026-01-31T12:00 or 365d for as long ago.")
    ],
    data_dir: DataDir = None,
) -> None:
    """Remove old records; that this was done stays on record."""
    from tunesmith.store.audit import administrator

    count = _parts(data_dir).audit.prune(administrator(), _moment(before, "--before"))
    print(f"Removed {count} record{'' if count == 1 else 's'}.")


@app.command()
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


@app.command()
def logout(url: Url = None) -> None:
    """Sign this machine out, here and at the server."""
    from tunesmith import login as sign_in

    found = sign_in.find(url)
    if found is None:
        raise ValueError(f"not signed in to {url or 'any server'}")
    sign_in.forget(found)
    print(f"Signed out of {found.url}.")


@app.command()
def tune(
    file: Annotated[
        Path,
        typer.Argument(help=".csv, .jsonl or .json with text_input and output.", exists=True, dir_okay=False),
    ],
    name: Annotated[str, typer.Option(help="Display name.")] = "",
    base: Annotated[str, typer.Option(help="Base model.")] = "gemma-3-270m",
    model_id: Annotated[str, typer.Option("--id", help="Id of the tuned model; left out, one is made.")] = "",
    epochs: Annotated[int | None, typer.Option(help="Epochs; default 5.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Batch size; default 4, from 1,000 rows on 16.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate; default 0.001, from 1,000 rows on 0.0002.")
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Tune a model on the examples of a file."""
    from tunesmith.terminal import loss_curve, show_tuning

    given = {"epoch_count": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    model = {
        "display_name": name or file.stem[:40],
        "base_model": base if "/" in base else f"models/{base}",
        "tuning_task": {
            "hyperparameters": {key: value for key, value in given.items() if value is not None},
            "training_data": {"examples": {"examples": read_examples(file)}},
        },
    }
    with _client(url, token, Settings.load(data_dir=data_dir)) as client:
        operation = show_tuning(console, client.watch(client.tune(model, model_id or None)))
    if "error" in operation:
        _fail(operation["error"]["message"])
    losses = [snapshot["meanLoss"] for snapshot in operation["metadata"]["snapshots"]]
    console.print(loss_curve(losses), highlight=False)
    tuned = operation["metadata"]["tunedModel"]
    console.print(f"{tuned} is ACTIVE. Ask it:  tunesmith generate {tuned} TEXT", highlight=False, soft_wrap=True)


@app.command()
def models(url: Url = None, token: Token = None, data_dir: DataDir = None) -> None:
    """List the tuned models that are yours or shared with you."""
    from tunesmith.terminal import tuned_models_table

    with _client(url, token, Settings.load(data_dir=data_dir)) as client:
        found = list(client.tuned_models())
    console.print(tuned_models_table(found) if found else "No tuned models yet. Make one: tunesmith tune FILE.csv")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="tunedModels/… or models/….")],
    text: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")],
    temperature: Annotated[float | None, typer.Option(help="0 is repeatable; default: the model's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="End the answer after so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Ask a model."""
    given = {"temperature": temperature, "maxOutputTokens": max_tokens, "seed": seed}
    config = {key: value for key, value in given.items() if value is not None}
    name = model if "/" in model else f"tunedModels/{model}"
    with _client(url, token, Settings.load(data_dir=data_dir)) as client:
        print(client.generate(name, sys.stdin.read() if text == "-" else text, config))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="tunedModels/….")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="gguf for llama.cpp, ollama, safetensors for transformers and vLLM, peft for the adapter alone.",
        ),
    ] = "gguf",
    quantization: Annotated[
        str, typer.Option(help="Of gguf and ollama: f16, which is the default, f32, bf16 or q8_0.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file or folder to write; default: here.")
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Fetch a tuned model as a file that other programs load."""
    from tunesmith.terminal import download_bar

    name = model if "/" in model else f"tunedModels/{model}"
    given = {"format": format_, **({"quantization": quantization} if quantization else {})}
    client = _client(url, token, Settings.load(data_dir=data_dir))
    with client, download_bar(console, "Fetching") as show:
        file = client.download(f"{name}:export", out, show, **given)
    console.print(f"{file} is written.", highlight=False, soft_wrap=True)


@app.command()
def doctor(
    fetch: Annotated[str | None, typer.Option(help="Fetch this base model's weights.")] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
) -> None:
    """Say what this machine can run, and what to do about each gap."""
    settings = Settings.load(data_dir=data_dir, cache_dir=cache_dir)
    from tunesmith import machine
    from tunesmith.base_models.catalog import Catalog
    from tunesmith.terminal import fetch_weights

    catalog = Catalog.load(settings)
    if fetch:
        fetch_weights(console, catalog.get(f"models/{fetch.removeprefix('models/')}"), settings.cache_dir)
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in ("mark", "what", "found"):
        table.add_column(overflow="fold")
    findings = list(machine.examine(settings, catalog))
    for finding in findings:
        mark = "[green]✓[/]" if finding.fine else "[yellow]![/]"
        table.add_row(mark, finding.what, finding.found + (f"\n→ {finding.remedy}" if finding.remedy else ""))
    console.print(table, highlight=False)
    if any(finding.blocks for finding in findings):
        raise typer.Exit(1)


def read_examples(file: Path) -> list[dict[str, str]]:
    """Return a file's examples as the API takes them; the server says what is wrong with a row.

    Raises:
        ValueError: The file is not what its name says, or lacks the columns.
    """
    text = file.read_text("utf-8-sig")
    if file.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
    elif file.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif file.suffix == ".json":
        rows = json.loads(text)
    else:
        raise ValueError(f"{file}: name it .csv, .jsonl or .json")
    names = (("text_input", "textInput", "input", "prompt"), ("output", "completion"))
    examples = []
    for number, row in enumerate(rows):
        found = [next((row[name] for name in group if name in row), None) for group in names]
        if None in found:
            raise ValueError(
                f"{file}, row {number}: needs text_input and output, has {', '.join(row) or 'nothing'}"
            )
        examples.append({"text_input": str(found[0]), "output": str(found[1])})
    return examples


def main() -> None:
    """Run a command; an expected error is a line, not a traceback."""
    from tunesmith.client import ClientError

    # Read by torch's OpenMP when it is loaded. By default its threads spin while they wait for each other, and
    # where another process wants a core too, a training step then takes fifty times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own progress bars; ours are shown
    try:
        app()
    except ApiError as error:
        _fail(error.message)
    except (ClientError, ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"tunesmith: {message}", file=sys.stderr)
    sys.exit(1)


def _parts(data_dir: Path | None) -> "Parts":
    from tunesmith.app import Parts

    return Parts.open(Settings.load(data_dir=data_dir))


@contextmanager
def _administering(data_dir: Path | None, action: str, resource: str, detail: str = "") -> "Iterator[Parts]":
    """The parts of a data dir, for a change that goes on record; see `Audit.change`."""
    from tunesmith.store.audit import administrator

    parts = _parts(data_dir)
    with parts.audit.change(administrator(), action, resource, detail):
        yield parts


def _client(url: str | None, token: str | None, settings: Settings) -> "Client":
    """Return a client with the credential given, that of a sign-in, or one that the data dir here grants."""
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
        parts = _parts(settings.data_dir)
        account = next((account.email for account in parts.accounts.list() if not account.disabled), None)
        if account is None:
            raise ClientError(f"{settings.data_dir} has no account. Make one: tunesmith accounts create EMAIL")
        with parts.audit.change(administrator(), "IssueToken", f"accounts/{account}"):
            token = parts.tokens.create(account, DEFAULT_SCOPES, seconds=DAY)
    return Client(url, token, ca_file=ca_file)


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


def _open_browser(address: str) -> None:
    import webbrowser

    print(f"Sign in in the browser. If none opens, open this address on this machine:\n\n  {address}\n")
    webbrowser.open(address)


def _show_device_code(asked: dict[str, Any]) -> None:
    print(
        f"In any browser open\n\n  {asked['verification_uri']}\n\nand type\n\n  {asked['user_code']}\n", flush=True
    )


def _described(key: "ApiKey") -> str:
    from tunesmith.auth.scopes import AUTH

    def moment(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))

    facts = [key.id, key.name or "-", f"made {moment(key.create_time)}"]
    facts.append(f"last used {moment(key.last_use_time)}" if key.last_use_time else "never used")
    if key.expire_time is not None:
        past = key.expire_time <= time.time()
        facts.append(f"{'expired' if past else 'expires'} {moment(key.expire_time)}")
    if key.scopes:
        facts.append(f"only {', '.join(scope.removeprefix(AUTH) for scope in key.scopes.split())}")
    if key.revoked:
        facts.append("revoked")
    return "  ".join(facts)


def _seconds(ttl: str, option: str = "--ttl") -> float:
    match = re.fullmatch(r"(\d+)([smhd])", ttl)
    if not match:
        raise ValueError(f"{option} {ttl}: give a number and s, m, h or d, such as 1h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": DAY}[match[2]]


def _moment(text: str, option: str) -> float:
    """Return a date, a time or how long ago it was, as seconds since 1970; a time without a zone is local."""
    if re.fullmatch(r"\d+[smhd]", text):
        return time.time() - _seconds(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(f"{option} {text}: give a date such as 2026-01-31, or how long ago as 24h") from None


def _log(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
