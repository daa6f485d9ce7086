"""Servers, workers, and what this machine needs for them."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.commands.options import CacheDir, DataDir, Device, LogLevel, Threads, Token, setting
from tunesmith.commands.reach import client_of
from tunesmith.commands.screen import console
from tunesmith.config import Settings


def serve(
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port")] = None,
    grpc_port: Annotated[int | None, setting("grpc_port")] = None,
    ssl_certfile: Annotated[Path | None, setting("ssl_certfile")] = None,
    ssl_keyfile: Annotated[Path | None, setting("ssl_keyfile")] = None,
    insecure: Annotated[bool | None, setting("insecure", "--insecure")] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    workers: Annotated[int | None, setting("workers")] = None,
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
        with client_of(url, token, settings) as client:
            right = tutorial.run(console, client, url)
    else:
        fetch_weights(console, Catalog.load(settings).default, settings.cache_dir)
        console.print(f"[bold]Serving[/] on a free port, data in {settings.data_dir}")
        with tutorial.server(settings) as own, client_of(own, None, settings) as client:
            right = tutorial.run(console, client, own)
    if not right:
        console.print("[red]An answer differs from the tutorial's.[/]")
        raise typer.Exit(1)
    tutorial.say_what_next(console, settings)


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


def _log(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
