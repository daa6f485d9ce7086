"""The rows of a run as docs/compatibility.md."""

from collections.abc import Sequence
from dataclasses import dataclass

from environments import ROOT

from clients import Client

TABLE = ROOT / "docs" / "compatibility.md"

_HEAD = """\
# Compatibility

Made by `make test-clients`, which drives each client, unmodified, with a live server. Do not edit: run it again.

✓ works as with Google's service · – the client itself does not do this, whatever the server · ✗ fails
"""
_MARKS = {True: "✓", False: "✗", None: "–"}


@dataclass(frozen=True)
class Row:
    """One call of one client; `ok` is None for what the client itself does not do."""

    client: Client
    call: str
    ok: bool | None
    note: str


def markdown(clients: Sequence[Client], rows: Sequence[Row]) -> str:
    """Return the page: a line a client, then a table a client."""
    lines = [_HEAD, "| client | calls that work | not in the client | fail |", "|---|--:|--:|--:|"]
    for client in clients:
        counts = [sum(row.ok is ok for row in rows if row.client == client) for ok in (True, None, False)]
        lines.append(f"| [{client.title}](#{_anchor(client.title)}) | {' | '.join(map(str, counts))} |")
    for client in clients:
        lines += ["", f"## {client.title}", "", "| | call | |", "|---|---|---|"]
        lines += [
            f"| {_MARKS[row.ok]} | `{_cell(row.call)}` | {_cell(row.note)} |"
            for row in rows
            if row.client == client
        ]
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    """Return the anchor that Git hosts give a heading."""
    kept = [letter for letter in title.lower() if letter.isalnum() or letter in " -_"]
    return "".join(kept).replace(" ", "-")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
