"""What commands print to: a terminal, or the pipe or file in its place."""

import os

from rich.console import Console

PIPE_COLUMNS = 200
"""Where there is no terminal: rows of tables stay lines, for grep and awk."""


def _console() -> Console:
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_COLUMNS)


console = _console()


def say(line: str) -> None:
    """Print a line as it is: not wrapped, so that what is to be typed can be copied."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
