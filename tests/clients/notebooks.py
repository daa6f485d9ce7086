"""Run the notebooks and scripts of examples/ against a live server on the real base model.

    python tests/clients/notebooks.py [--check]

Each notebook runs from a clean kernel in an environment of its own and is kept with its outputs; with --check
nothing is written. Either way both answers of the tutorial must come out of every one of them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from environments import ROOT, environment
from stage import Server

from clients import HERE
from tunesmith.base_models.catalog import Catalog
from tunesmith.config import Settings
from tunesmith.terminal import fetch_weights

EXAMPLES = ROOT / "examples"
ANSWERS = ("LXIV", "七")  # to LXIII and 六, of which the examples have none
LARGEST = 100_000  # bytes of a notebook with its outputs
KINDS = (".ipynb", ".mjs", ".sh")

console = Console(highlight=False, soft_wrap=True)


def main(check: bool) -> int:
    """Run every example; return 0 when each gives the tutorial's answers."""
    settings = Settings.load()
    fetch_weights(Console(stderr=True), Catalog.load(settings).default, settings.cache_dir)
    paths = sorted(path for path in EXAMPLES.iterdir() if path.suffix in KINDS)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "data", {}) as server:
        token = server.run("token", "admin@localhost").strip()
        given = {"base_url": server.url, "access_token": token, "project_id": "my-project-id"}
        for path in paths:
            trouble = run(path, given, Path(folder), check)
            failed += bool(trouble)
            console.print(f"  [red]✗[/] {path.name}: {trouble}" if trouble else f"  [green]✓[/] {path.name}")
    console.print(f"\n{len(paths) - failed} passed, {failed} failed")
    return 1 if failed or not paths else 0


def run(path: Path, given: dict[str, str], folder: Path, check: bool) -> str:
    """Run one example; return what is wrong with it, or ""."""
    command = [{".sh": "bash", ".mjs": "node"}.get(path.suffix, ""), str(path)]
    if path.suffix == ".ipynb":
        python = environment("notebooks.txt", console.print) / "bin" / "python"
        command = [str(python), str(HERE / "drivers" / "execute_notebook.py"), str(path)]
    variables = {**os.environ, **given, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"code {done.returncode}\n{done.stderr[-1500:]}"
    shown = outputs(json.loads(done.stdout)) if path.suffix == ".ipynb" else done.stdout
    if missing := [text for text in ANSWERS if text not in shown]:
        return f"its output lacks {missing}: {shown[-500:]}"
    if path.suffix == ".ipynb" and "image/png" not in shown:
        return "it shows no loss curve"
    if len(done.stdout) > LARGEST:
        return f"with its outputs it is {len(done.stdout):,} bytes"
    if path.suffix == ".ipynb" and not check:
        path.write_text(done.stdout, "utf-8")
    return ""


def outputs(notebook: dict[str, Any]) -> str:
    """Return what the cells of a notebook show, as text."""
    cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    return json.dumps([cell["outputs"] for cell in cells], ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
