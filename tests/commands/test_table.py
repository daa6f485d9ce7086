"""The table of commands, and its twin in the README."""

from pathlib import Path

from tunesmith.cli import COMMANDS

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_every_command() -> None:
    rows = "\n".join(line for line in README.read_text("utf-8").splitlines() if line.startswith("| `tunesmith "))
    names = [name for group in COMMANDS.values() for name in group]
    assert [name for name in names if f"`{name}" not in rows.replace("`tunesmith ", "`")] == []
