"""Drive every client with a live server: a row a client and call, and the table in docs/compatibility.md.

    python tests/clients/run.py [--check] [NAME …]

--check fails when the table is not what this run gives. With names, only the clients whose title has one of them
are driven, and the table is left alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

sys.path.insert(0, str(Path(__file__).parent))

from environments import ROOT, environment
from stage import Stage, stage
from table import TABLE, Row, markdown

from clients import CLIENTS, GRPC, HERE, Client

LONGEST_RUN = 240  # seconds, of one client
LAST_WORDS = 1500  # characters of what a driver that broke has written

console = Console(highlight=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    """Run the clients; return 0 when every call is as it should be and the table is fresh."""
    check = "--check" in arguments
    names = [argument for argument in arguments if argument != "--check"]
    wanted = [client for client in CLIENTS if not names or any(name in client.title for name in names)]
    environments = {client.pins: environment(client.pins, console.print) for client in wanted if client.pins}
    rows: list[Row] = []
    tls = any(client.transport == GRPC for client in wanted)
    with tempfile.TemporaryDirectory() as folder, stage(Path(folder), tls) as live:
        for client in wanted:
            rows += drive(client, live, environments.get(client.pins))
    failed = [row for row in rows if row.ok is False]
    stale = False if names else refresh(wanted, rows, check and not failed)
    console.print(f"\n{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or stale else 0


def refresh(clients: list[Client], rows: list[Row], check: bool) -> bool:
    """Write the table, or with `check` only compare; return whether it is stale."""
    text = markdown(clients, rows)
    if not check:
        TABLE.write_text(text, "utf-8")
        return False
    stale = not TABLE.exists() or TABLE.read_text("utf-8") != text
    if stale:
        where = TABLE.relative_to(ROOT)
        console.print(f"[red]{where} is stale: run make test-clients and commit what it writes.[/]")
    return stale


def drive(client: Client, live: Stage, path: Path | None) -> list[Row]:
    """Make one client's calls; return their rows, and one more when its script did not reach its end."""
    console.print(f"\n[bold]{client.title}[/]")
    began = time.monotonic()
    told = live.for_client(client)
    rows = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            _command(client, path),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(told, live, path),
        )
        last = began
        for row in _rows(client, process):
            rows.append(row)
            _show(row, time.monotonic() - last)
            last = time.monotonic()
        errors.seek(0)
        last_words = errors.read()[-LAST_WORDS:]
    live.clear(told)
    if process.returncode != 0 or not rows:
        rows.append(Row(client, "the whole script", False, f"ended with code {process.returncode}"))
        _show(rows[-1], 0)
    if any(row.ok is False for row in rows):
        console.print(f"[dim]{escape(last_words)}[/]")
    console.print(f"[dim]{time.monotonic() - began:.1f} s[/]")
    return rows


def _rows(client: Client, process: subprocess.Popen[str]) -> Iterator[Row]:
    """Yield what a driver prints; a driver that takes too long is ended."""
    assert process.stdout is not None
    with process:
        timer = _end_after(LONGEST_RUN, process)
        for line in process.stdout:
            if line.startswith('{"client"'):
                row: dict[str, Any] = json.loads(line)
                yield Row(client, row["call"], row["ok"], row["note"])
        timer.cancel()


def _end_after(seconds: float, process: subprocess.Popen[str]) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _command(client: Client, path: Path | None) -> list[str]:
    driver = HERE / "drivers" / client.driver
    if driver.suffix == ".mjs":
        return ["node", str(driver)]
    return [str(path / "bin" / "python") if path else sys.executable, str(driver)]


def _environment(told: dict[str, Any], live: Stage, path: Path | None) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "STAGE": json.dumps(told),
        "ENVIRONMENT": str(path or ""),
        "PYTHONWARNINGS": "ignore",  # clients announce their end, or call tuning experimental
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or litellm fetches a price list when it is imported
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(live.authority),
        "PYTHONPATH": "",
    }


def _show(row: Row, seconds: float) -> None:
    mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}[row.ok]
    note = f"  [dim]{escape(row.note)}[/]" if row.note else ""
    console.print(f"  {mark} [dim]{seconds:5.1f} s[/]  {escape(row.call)}{note}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
