"""The commands. Heavy imports happen inside a command, so that help and errors come at once."""

import csv
import io
import json
import logging
import os
import re
import sys
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
app.add_typer(accounts, name="accounts")
app.add_typer(groups, name="groups")
app.add_typer(projects, name="projects")
app.add_typer(api_key, name="api-key")

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
Url = Annotated[str, typer.Option(envvar="TUNESMITH_URL", help="The server.")]
Token = Annotated[
    str | None,
    typer.Option(
        envvar="TUNESMITH_TOKEN",
        help="An access token; left out, one is made when this machine has the server's data dir.",
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
        str, typer.Option(help="OAuth scopes, separated by commas; default: what the tutorial asks for.")
    ] = "",
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 30m, 1h, 7d.")] = "1h",
    data_dir: DataDir = None,
) -> None:
    """Print an access token for an account."""
    from tunesmith.auth.tokens import DEFAULT_SCOPES

    parts = _parts(data_dir)
    asked = [scope.strip() for scope in scopes.split(",") if scope.strip()] or DEFAULT_SCOPES
    print(parts.tokens.create(email, asked, _seconds(ttl)))


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
    _parts(data_dir).accounts.create(email, password)
    print(f"Made the account {email}. A token for it: tunesmith token {email}")


@accounts.command("list")
def list_accounts(data_dir: DataDir = None) -> None:
    """List the accounts."""
    for account in _parts(data_dir).accounts.list():
        print(f"{account.email}{'  disabled' if account.disabled else ''}")


@accounts.command("disable")
def disable_account(email: str, data_dir: DataDir = None) -> None:
    """Refuse an account's tokens and keys from now on; its models stay."""
    _parts(data_dir).accounts.disable(email)
    print(f"Disabled {email}.")


@groups.command("create")
def create_group(group: GroupEmail, data_dir: DataDir = None) -> None:
    """Make a group."""
    _parts(data_dir).groups.create(group)
    print(f"Made the group {group}. Put people in it: tunesmith groups add {group} EMAIL")


@groups.command("list")
def list_groups(data_dir: DataDir = None) -> None:
    """List the groups, each with its members."""
    for group, members in _parts(data_dir).groups.list().items():
        print(f"{group}  {', '.join(members) or 'nobody'}")


@groups.command("add")
def add_to_group(group: GroupEmail, accounts: Members, data_dir: DataDir = None) -> None:
    """Put accounts into a group."""
    _parts(data_dir).groups.add(group, accounts)
    print(f"{', '.join(accounts)} may now do what {group} may.")


@groups.command("remove")
def remove_from_group(group: GroupEmail, accounts: Members, data_dir: DataDir = None) -> None:
    """Take accounts out of a group."""
    _parts(data_dir).groups.remove(group, accounts)
    print(f"Took {', '.join(accounts)} out of {group}.")


@groups.command("delete")
def delete_group(group: GroupEmail, data_dir: DataDir = None) -> None:
    """Delete a group, and what is shared with it."""
    _parts(data_dir).groups.delete(group)
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
    print(_parts(data_dir).projects.create(project, number))
    print(f"Made the project {project}. Put people in it: tunesmith projects add {project} EMAIL", file=sys.stderr)


@projects.command("list")
def list_projects(data_dir: DataDir = None) -> None:
    """List the projects, each with its number and its members."""
    for project, members in _parts(data_dir).projects.list():
        print(f"{project.id}  {project.number}  {', '.join(members) or 'nobody'}")


@projects.command("add")
def add_to_project(project: ProjectName, accounts: Members, data_dir: DataDir = None) -> None:
    """Put accounts into a project."""
    _parts(data_dir).projects.add(project, accounts)
    print(f"{', '.join(accounts)} may read what {project} may, with the header x-goog-user-project: {project}")


@projects.command("remove")
def remove_from_project(project: ProjectName, accounts: Members, data_dir: DataDir = None) -> None:
    """Take accounts out of a project."""
    _parts(data_dir).projects.remove(project, accounts)
    print(f"Took {', '.join(accounts)} out of {project}.")


@api_key.command("create")
def create_key(email: str, data_dir: DataDir = None) -> None:
    """Make an API key and print it, this once."""
    key_id, key = _parts(data_dir).keys.create(email)
    print(key)
    print(f"Key {key_id} of {email}; it is not shown again.", file=sys.stderr)


@api_key.command("list")
def list_keys(email: str, data_dir: DataDir = None) -> None:
    """List an account's keys, by id."""
    for key in _parts(data_dir).keys.list(email):
        print(f"{key.id}{'  revoked' if key.revoked else ''}")


@api_key.command("revoke")
def revoke_key(key_id: str, data_dir: DataDir = None) -> None:
    """Refuse a key from now on."""
    _parts(data_dir).keys.revoke(key_id)
    print(f"Revoked {key_id}.")


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
    url: Url = LOCAL,
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
def models(url: Url = LOCAL, token: Token = None, data_dir: DataDir = None) -> None:
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
    url: Url = LOCAL,
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


def _client(url: str, token: str | None, settings: Settings) -> "Client":
    """Return a client with the credential given, or one that the data dir on this machine grants."""
    from tunesmith.auth.tokens import DEFAULT_SCOPES
    from tunesmith.client import Client, ClientError

    if token is None and "TUNESMITH_API_KEY" in os.environ:
        return Client(url, api_key=os.environ["TUNESMITH_API_KEY"])
    if token is None:
        if not settings.data_dir.exists():
            raise ClientError(
                f"No credential: pass --token, or set TUNESMITH_TOKEN or TUNESMITH_API_KEY. ({settings.data_dir} "
                "does not exist, so none can be made here.)"
            )
        parts = _parts(settings.data_dir)
        account = next((account.email for account in parts.accounts.list() if not account.disabled), None)
        if account is None:
            raise ClientError(f"{settings.data_dir} has no account. Make one: tunesmith accounts create EMAIL")
        token = parts.tokens.create(account, DEFAULT_SCOPES, seconds=DAY)
    return Client(url, token)


def _seconds(ttl: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", ttl)
    if not match:
        raise ValueError(f"--ttl {ttl}: give a number and s, m, h or d, such as 1h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": DAY}[match[2]]


def _log(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
