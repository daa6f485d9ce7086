"""The tutorial, end to end: tune the "next number" model, ask it for numerals that it was never shown."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunesmith.client import Client, ClientError
from tunesmith.config import Settings
from tunesmith.progress import show_tuning
from tunesmith.terminal import loss_curve

EXAMPLES = [
    ("1", "2"),
    ("3", "4"),
    ("-3", "-2"),
    ("twenty two", "twenty three"),
    ("two hundred", "two hundred one"),
    ("ninety nine", "one hundred"),
    ("8", "9"),
    ("-98", "-97"),
    ("1,000", "1,001"),
    ("10,100,000", "10,100,001"),
    ("thirteen", "fourteen"),
    ("eighty", "eighty one"),
    ("one", "two"),
    ("three", "four"),
    ("seven", "eight"),
]

TUNED_MODEL = {
    "display_name": "number generator",
    "base_model": "models/gemini-1.0-pro-001",
    "tuning_task": {
        "hyperparameters": {"batch_size": 4, "learning_rate": 0.001, "epoch_count": 5},
        "training_data": {
            "examples": {"examples": [{"text_input": text, "output": output} for text, output in EXAMPLES]}
        },
    },
}
"""The tutorial's Python body."""

TUTORIAL_ANSWERS = {"LXIII": "LXIV", "六": "七"}
"""What the tutorial shows: Roman and Japanese numerals, of which the examples have none."""

HELD_OUT = {
    **TUTORIAL_ANSWERS,
    "5": "6",
    "41": "42",
    "-20": "-19",
    "2,000": "2,001",
    "nine": "ten",
    "forty": "forty one",
    "sixty six": "sixty seven",
    "IV": "V",
    "XII": "XIII",
    "三": "四",
    "八": "九",
    "uno": "dos",
    "neun": "zehn",
    "quatre": "cinq",
}


def run(console: Console, client: Client, url: str) -> bool:
    """Tune and ask; return whether the tutorial's two answers came out."""
    console.print(
        f"[bold]Tuning[/]  POST {url}/v1beta/tunedModels, {len(EXAMPLES)} examples such as 3 → 4", soft_wrap=True
    )
    model = client.tune(TUNED_MODEL)["metadata"]["tunedModel"]
    job = show_tuning(console, client.events(model), model)
    if job.finished.get("state") != "ACTIVE":
        raise ClientError(job.finished.get("reason", f"{model} was not tuned."))
    console.print(loss_curve([*job.losses.values()]), highlight=False)
    answers = {text: client.generate(model, text) for text in HELD_OUT}
    console.print(f"\n[bold]Asking[/]  POST {url}/v1beta/{model}:generateContent", soft_wrap=True)
    console.print(_table(answers))
    right = sum(answers[text] == expected for text, expected in HELD_OUT.items())
    console.print(f"{right} of {len(HELD_OUT)} right. It saw digits and English words only; the tutorial's two:")
    for text in TUTORIAL_ANSWERS:
        console.print(f"{text} -> {answers[text]}", highlight=False)
    return all(answers[text] == expected for text, expected in TUTORIAL_ANSWERS.items())


def say_what_next(console: Console, settings: Settings) -> None:
    """Print where to go from here."""
    data_dir = "" if settings.data_dir == Settings.load().data_dir else f" --data-dir {settings.data_dir}"
    # After `make demo` the command is in .venv and not on the path: name it as it was run.
    program = "tunesmith" if shutil.which("tunesmith") else sys.argv[0]
    console.print(
        "\n[bold]Next[/]\n"
        f"  {program} serve{data_dir}                          the same server, to stay\n"
        f"  {program} models{data_dir}                         what has been tuned\n"
        f"  {program} tune FILE.csv --name NAME{data_dir}      your own examples: text_input,output\n"
        f"  {program} generate tunedModels/… TEXT{data_dir}    ask a tuned model\n"
        "  README.md has the same with curl and with Python.",
        highlight=False,
        soft_wrap=True,
    )


@contextlib.contextmanager
def server(settings: Settings) -> Iterator[str]:
    """A server of our own on a free port; yields its URL. It ends with the block, or with this process."""
    log = settings.data_dir / "demo.log"
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tunesmith", "serve", "--port", "0", "--grpc-port", "0", "--stop-with-stdin"]
    command += ["--data-dir", str(settings.data_dir), "--cache-dir", str(settings.cache_dir)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    with process:
        try:
            yield _url(process, log)
        finally:
            process.terminate()


def _url(process: subprocess.Popen[str], log: Path) -> str:
    """Return the URL that the server says it serves."""
    for line in process.stdout or ():
        if line.startswith("Tunesmith serves "):
            return line.split()[-1]
    raise ClientError(f"The server ended with code {process.wait()}: {log.read_text()[-2000:]}")


def _table(answers: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("INPUT", "ANSWER", "EXPECTED", ""):
        table.add_column(column)
    for text, expected in HELD_OUT.items():
        right = answers[text] == expected
        table.add_row(text, answers[text], expected, "[green]✓[/]" if right else "[red]✗[/]")
    return table
