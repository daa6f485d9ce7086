"""The record of who did what."""

import sys
from typing import Annotated

import typer

from tunesmith.commands.options import DataDir
from tunesmith.commands.reach import open_parts
from tunesmith.commands.screen import console
from tunesmith.commands.times import moment

audit = typer.Typer(help="What was done by whom.")


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

    parts, start = open_parts(data_dir), moment(since, "--since") if since else None
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

    count = open_parts(data_dir).audit.prune(administrator(), moment(before, "--before"))
    print(f"Removed {count} record{'' if count == 1 else 's'}.")
