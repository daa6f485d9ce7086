"""Known vulnerabilities of the pinned dependencies.

pip-audit asks PyPI. Where PyPI does not answer (behind a mirror, without a network), the database of the package
safety-db is asked, or a newer copy of it, and its date is said: it knows nothing of what was found later.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
TIMEOUT = 50.0  # seconds


def main() -> None:
    """Print what is known, and exit with 1 when a pin is vulnerable."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", type=Path, help="a newer insecure.json of safety-db")
    database = parser.parse_args().database
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text("utf-8"), re.MULTILINE))
    first = dict([next(iter(pins.items()))])
    # One is asked about before all are, so that a machine that gets no answers makes one request.
    found = None if database or ask_pypi(first) is None else ask_pypi(pins)
    if found is None:
        found = ask_safety_db(pins, database)
    print("\n".join(f"  {one}" for one in found) or "  none is known to be vulnerable")
    sys.exit(1 if found else 0)


def ask_pypi(pins: dict[str, str]) -> list[str] | None:
    """Return the vulnerable pins as PyPI knows them today; None when it does not answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(f"{name}=={version}" for name, version in pins.items()))
        requirements.flush()
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner=off"]
        command += ["--format=json", "--requirement", requirements.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            audited = json.loads(done.stdout)["dependencies"]
        except (subprocess.TimeoutExpired, ValueError, KeyError):
            return None
    answered = [one for one in audited if "skip_reason" not in one]
    if not answered:
        return None
    if len(pins) > 1:
        of_all = f"{len(answered)} of {len(pins)}"
        print(f"{of_all} pinned dependencies, as PyPI knows them on {time.strftime('%Y-%m-%d')}:")
    return [
        f"{one['name']} {one['version']}: {', '.join(known['id'] for known in one['vulns'])}"
        for one in answered
        if one["vulns"]
    ]


def ask_safety_db(pins: dict[str, str], newer: Path | None) -> list[str]:
    """Return the vulnerable pins as a copy of safety-db knows them."""
    # Not imported: that package looks for its file in the current directory.
    file = newer or Path(str(distribution("safety-db").locate_file("safety_db/insecure.json")))
    database: dict[str, Any] = json.loads(file.read_text("utf-8"))
    date = time.strftime("%Y-%m-%d", time.gmtime(database.pop("$meta")["timestamp"]))
    why = "" if newer else " (PyPI does not say what it knows)"
    print(f"{len(pins)} pinned dependencies, as safety-db knew them on {date}{why}:")
    insecure = {canonicalize_name(name): ranges for name, ranges in database.items()}
    return [*_matches(pins, insecure)]


def _matches(pins: dict[str, str], insecure: dict[str, list[str]]) -> Iterator[str]:
    for name, version in pins.items():
        for versions in insecure.get(canonicalize_name(name), []):
            if SpecifierSet(versions).contains(version, prereleases=True):
                yield f"{name} {version}: {versions} is vulnerable"


if __name__ == "__main__":
    main()
