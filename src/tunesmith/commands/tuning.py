"""Tuning jobs: made, watched, paused, ended, reported on."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.commands.options import DataDir, Model, Token, Url, full_name
from tunesmith.commands.reach import client_of
from tunesmith.commands.screen import console, say
from tunesmith.config import Settings

if TYPE_CHECKING:
    from tunesmith.client import Client, ClientError
    from tunesmith.commands.examples import Examples
    from tunesmith.progress import Job

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""
FIELDS = {
    "hyperparameters.epoch_count": "--epochs",
    "hyperparameters.batch_size": "--batch-size",
    "hyperparameters.learning_rate": "--learning-rate",
    "options.validation_fraction": "--validation",
    "options.patience": "--patience",
    "options.seed": "--seed",
    "tuned_model.display_name": "--name",
    "tuned_model.base_model": "--base",
    "tuned_model_id": "--id",
}
"""Fields of a request by the ends of their paths, and the options that fill them."""


class Keep(StrEnum):
    """Which weights a tuned model gets."""

    BEST = "best"
    LAST = "last"


def tune(
    file: Annotated[
        Path,
        typer.Argument(
            help=".csv, .jsonl or .json with text_input and output; of the latter two also conversations.",
            exists=True,
            dir_okay=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="Display name.")] = "",
    base: Annotated[str, typer.Option(help="Base model, or tunedModels/… to go on from.")] = "gemma-3-270m",
    model_id: Annotated[str, typer.Option("--id", help="Id of the tuned model; left out, one is made.")] = "",
    epochs: Annotated[int | None, typer.Option(help="Epochs; default 5.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Batch size; default 4, from 1,000 rows on 16.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate; default 0.001, from 1,000 rows on 0.0002.")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            help="Share of the examples to hold out and validate with, at most 0.5; 0: none. Default: a tenth of "
            "50 or more."
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="End after so many epochs without a lower validation loss; default: never."),
    ] = None,
    keep: Annotated[
        Keep | None, typer.Option(help="The weights with the lowest validation loss (default), or the last.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same model; default: the server's.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running; tunesmith watch shows it.")] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Tune a model on the examples of a file."""
    from tunesmith.client import ClientError
    from tunesmith.commands.examples import read_examples

    examples = read_examples(file)
    hyperparameters = {"epoch_count": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    options = {
        "validation_fraction": validation,
        "patience": patience,
        "keep": keep.name if keep else None,
        "seed": seed,
    }
    model = {
        "display_name": name or file.stem[:40],
        "base_model": base if "/" in base else f"models/{base}",
        "tuning_task": {
            "hyperparameters": _given(hyperparameters),
            "training_data": {"examples": {examples.kind: examples.rows}},
        },
    }
    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        try:
            operation = client.tune(model, model_id or None, _given(options))
        except ClientError as error:
            raise _in_the_files_words(error, file, examples) from error
        tuned = operation["metadata"]["tunedModel"]
        what = f"{len(examples.rows):,} examples" if len(examples.rows) > 1 else "1 example"
        say(f"Tuning {tuned} on {what} of {file.name}")
        if detach:
            say(f"See it:  tunesmith watch {tuned}")
            return
        job = _follow(client, tuned, examples)
        ended = client.call("GET", operation["name"])
    if "error" in ended:
        raise ClientError(examples.located(ended["error"]["message"]))
    _conclude(job, tuned, best_kept=keep is not Keep.LAST)


def watch(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Its events, a JSON object a line.")] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Show a tuning job from its beginning on until it is done; exit with 1 when it failed."""
    tuned = full_name(model)
    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        if as_json:
            finished: dict[str, Any] = {}
            with _going_on_without_us(tuned):
                for event in client.events(tuned):
                    if event:
                        print(json.dumps(event, ensure_ascii=False), flush=True)
                        finished = event.get("finished", {})
            if finished.get("state") == "FAILED":
                raise typer.Exit(1)
            return
        job = _follow(client, tuned)
    _conclude(job, tuned)


def report(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="As the API gives it.")] = False,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Say what is known of a model's training: data, loss, recipe, timings, answers before and after."""
    from tunesmith.commands.report_page import show_report

    tuned = full_name(model)
    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        if as_json:
            print(json.dumps(client.call("GET", f"{tuned}:report"), indent=2, ensure_ascii=False))
            return
        about = client.call("GET", tuned)
        with console.status("Reading; the first time, both models answer some of the examples…"):
            found = client.call("GET", f"{tuned}:report")
    show_report(console, about, found)


def pause(model: Model, url: Url = None, token: Token = None, data_dir: DataDir = None) -> None:
    """Let a job rest and free its worker; it keeps its steps, or its place in the queue."""
    tuned = full_name(model)
    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        status = client.call("POST", f"{tuned}:pause", {})
    after = f"after step {status.get('completedSteps', 0)} of {status.get('totalSteps', 0)}"
    if status["state"] == "PAUSING":
        say(f"{tuned} pauses: its worker finishes a step and makes a checkpoint.")
    else:
        say(f"{tuned} is paused {after}.")
    say(f"Go on:  tunesmith resume {tuned}")


def resume(model: Model, url: Url = None, token: Token = None, data_dir: DataDir = None) -> None:
    """Put a paused job back into the queue; it goes on where it was."""
    tuned = full_name(model)
    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        status = client.call("POST", f"{tuned}:resume", {})
    if status["state"] == "QUEUED":
        say(f"{tuned} is in the queue, place {status.get('position', 1)}.")
    else:
        say(f"{tuned} goes on at step {status.get('completedSteps', 0)} of {status.get('totalSteps', 0)}.")
    say(f"See it:  tunesmith watch {tuned}")


def cancel(model: Model, url: Url = None, token: Token = None, data_dir: DataDir = None) -> None:
    """End a job for good; a model that has finished a step keeps what it learnt."""
    tuned = full_name(model)
    with client_of(url, token, Settings.load(data_dir=data_dir)) as client:
        if (state := client.call("GET", tuned)["state"]) != "CREATING":
            say(f"{tuned} is {state} already: there is nothing to cancel.")
            return
        client.call("POST", f"{tuned}:cancel", {})
        status = client.call("GET", f"{tuned}:report")["status"]
    if status["state"] == "DONE":
        say(f"Cancelled {tuned}.")
    else:
        say(f"{tuned} ends after the step that it is at, with the weights that it has then.")


def _follow(client: "Client", tuned: str, examples: "Examples | None" = None) -> "Job":
    """Show a job until it is done."""
    from tunesmith.commands.examples import counted_from_one
    from tunesmith.progress import show_tuning

    located = examples.located if examples else counted_from_one
    with _going_on_without_us(tuned):
        return show_tuning(console, client.events(tuned), tuned, located)


@contextmanager
def _going_on_without_us(tuned: str) -> Iterator[None]:
    """Say, when Ctrl-C ends the block, that the job goes on."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"{tuned} goes on without you.")
        for what, verb in (("See it", "watch"), ("Let it rest", "pause"), ("End it", "cancel")):
            say(f"{what + ':':<13}tunesmith {verb} {tuned}")
        raise typer.Exit(INTERRUPTED) from None


def _conclude(job: "Job", tuned: str, *, best_kept: bool = False) -> None:
    """Print how a job ended, and what to do next.

    Args:
        job: What its events said.
        tuned: The tuned model's name.
        best_kept: Whether it is known that it has its best weights, and not its last ones.

    Raises:
        ClientError: It failed.
    """
    from tunesmith.client import ClientError
    from tunesmith.terminal import loss_curve

    if job.losses:
        console.print(loss_curve([*job.losses.values()]), highlight=False)
    state, reason = job.finished.get("state"), job.finished.get("reason", "")
    if state == "FAILED":
        raise ClientError(f"{tuned} is FAILED: {reason}")
    if reason:
        say(reason)
    if best_kept and job.best:
        say(f"It has the weights after epoch {job.best.get('epoch', 0)}, with the lowest validation loss.")
    if state == "ACTIVE":
        say(f"{tuned} is ACTIVE. Ask it:  tunesmith generate {tuned} TEXT")
    say(f"All about it:  tunesmith report {tuned}")


def _in_the_files_words(error: "ClientError", file: Path, examples: "Examples") -> Exception:
    """Return the server's refusal with lines of the file for examples, and options for fields."""
    from tunesmith.client import ClientError

    if not error.violations:
        return ClientError(examples.located(str(error)))
    lines = []
    for path, reason in error.violations:
        option = next((option for end, option in FIELDS.items() if path.endswith(end)), None)
        in_file = re.search(r"(?:multiturn_)?examples\[\d+\].*", path)
        where = examples.located(in_file[0]).replace(".", ", ", 1) if in_file else option or path
        lines.append(f"  {where}: {examples.located(reason)}")
    return ClientError("\n".join([f"{file} cannot be tuned on as it was asked:", *lines]))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
