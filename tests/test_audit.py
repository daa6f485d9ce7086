"""`make check` finds a pinned dependency that is known to be vulnerable."""

import json
import subprocess
import sys
from pathlib import Path

AUDIT = Path(__file__).parents[1] / "scripts" / "audit.py"


def audit(file: Path, insecure: dict[str, list[str]]) -> tuple[int, str]:
    file.write_text(json.dumps({"$meta": {"timestamp": 1775023247}, **insecure}))
    command = [sys.executable, AUDIT, "--database", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_date_is_said_and_a_vulnerable_pin_fails(tmp_path: Path) -> None:
    code, told = audit(tmp_path / "fine.json", {"sqlalchemy": ["<1.0"], "unknown": [">=0"]})
    assert code == 0
    assert "safety-db knew them on 2026-04-01" in told
    code, told = audit(tmp_path / "bad.json", {"sqlalchemy": ["<1.0", ">=2,<99"]})
    assert code == 1
    assert "SQLAlchemy 2" in told
    assert ">=2,<99 is vulnerable" in told
