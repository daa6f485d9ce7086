"""A tuning report as a page of text."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.commands.examples import counted_from_one
from tunesmith.progress import span, warning
from tunesmith.terminal import loss_curve

MOST_VALIDATIONS = 20
"""Validations that are shown, evenly spread: there is one for each epoch."""
MOST_TEXT = 80
"""Characters of a sample's texts that are shown; `--json` has all."""
_STATES = {
    "QUEUED": "waits for a worker",
    "RUNNING": "is being tuned",
    "PAUSING": "is about to pause",
    "PAUSED": "is paused",
}


def show_report(console: Console, model: dict[str, Any], report: dict[str, Any]) -> None:
    """Print a report.

    Args:
        console: Where to.
        model: The TunedModel, as the API gives it.
        report: Its TuningReport.
    """
    console.print(Text.assemble((report["name"], "bold"), "  ", _state(model, report)), soft_wrap=True)
    if reason := report.get("reason"):
        console.print(Text(counted_from_one(reason)))
    console.print()
    console.print(_facts(model, report), highlight=False)
    if warnings := report.get("warnings"):
        _heading(console, "Training data", "examples are counted from 1, without a heading")
        for one in warnings:
            console.print(warning(one, counted_from_one), soft_wrap=not console.is_terminal)
    if steps := report.get("steps"):
        _heading(console, "Loss")
        console.print(
            loss_curve([step.get("meanLoss", 0.0) for step in steps], steps[-1]["step"]), highlight=False
        )
    if validations := report.get("validations"):
        _heading(console, "Validation", "on the examples that were held out")
        console.print(_validations(validations, report.get("finalValidation")), highlight=False)
    if samples := report.get("samples"):
        _heading(console, "Answers", _shares(samples))
        console.print(_samples(samples), highlight=False)


def _heading(console: Console, title: str, remark: str = "") -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), (f"  {remark}" if remark else "", "dim")))


def _state(model: dict[str, Any], report: dict[str, Any]) -> str:
    status = report["status"]
    if status["state"] == "DONE":
        return str(model["state"])
    parts = [_STATES[status["state"]], f"step {status.get('completedSteps', 0)} of {status.get('totalSteps', 0)}"]
    if status.get("position"):
        parts.append(f"place {status['position']} in the queue")
    if status.get("etaSeconds"):
        what = "left" if status["state"] == "RUNNING" else "until it begins"
        parts.append(f"{span(status['etaSeconds'])} {what}")
    return ", ".join(parts)


def _facts(model: dict[str, Any], report: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in _each_fact(model, report):
        if fact:
            table.add_row(name, Text(fact))
    return table


def _each_fact(model: dict[str, Any], report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, timings = report.get("recipe", {}), report.get("timings", {})
    given = recipe.get("hyperparameters") or model["tuningTask"].get("hyperparameters", {})
    yield "called", model.get("displayName", "")
    base = recipe.get("baseModel") or model.get("baseModel", "")
    yield (
        "base model",
        f"{base}  (weights {recipe['weightsSha256'][:12]})" if recipe.get("weightsSha256") else base,
    )
    if recipe.get("trainingRows"):
        held_out = len(recipe.get("heldOutRows", []))
        yield "examples", f"{recipe['trainingRows']:,} learnt, {held_out:,} held out"
    yield (
        "training",
        f"{given.get('epochCount', 0)} epochs, batch size {given.get('batchSize', 0)}, "
        f"learning rate {given.get('learningRate', 0.0):g}{_options(report.get('options', {}))}",
    )
    if recipe:
        others = "".join(f", {name} {value}" for name, value in sorted(recipe.get("others", {}).items()))
        yield (
            "recipe",
            f"rank {recipe.get('rank', 0)}, alpha {recipe.get('alpha', 0.0):g}, seed {recipe.get('seed', 0)}, "
            f"prompt format {recipe.get('promptFormat', '')}{others}",
        )
        yield "layers", ", ".join(recipe.get("layers", []))
    if timings.get("attempts"):
        yield "timings", _timings(timings)
    if final := report.get("finalValidation"):
        yield "validation", f"{_scores(final)}, after epoch {final.get('epoch', 0)}, whose weights were kept"


def _options(options: dict[str, Any]) -> str:
    found = []
    if options.get("validationFraction") is not None:
        found.append(f"{options['validationFraction']:.0%} held out")
    if options.get("patience"):
        found.append(f"patience {options['patience']}")
    if options.get("keep"):
        found.append(f"keep {options['keep'].lower()}")
    return "".join(f", {one}" for one in found)


def _timings(timings: dict[str, Any]) -> str:
    parts = [
        f"{timings.get('queuedSeconds', 0.0):.1f} s in the queue",
        f"{timings.get('trainingSeconds', 0.0):.1f} s of steps",
        f"{timings.get('tokensPerSecond', 0.0):,.0f} tokens/s",
    ]
    if timings.get("totalSeconds"):
        parts.append(f"{timings['totalSeconds']:.1f} s in all")
    if interruptions := timings.get("interruptions"):
        parts.append(f"interrupted {'once' if interruptions == 1 else f'{interruptions} times'}")
    return ", ".join(parts)


def _scores(validation: dict[str, Any]) -> str:
    tokens, answers = validation.get("tokenAccuracy", 0.0), validation.get("exactMatch", 0.0)
    return f"loss {validation.get('loss', 0.0):.3f}, {tokens:.0%} of tokens and {answers:.0%} of answers right"


def _validations(validations: Sequence[dict[str, Any]], final: dict[str, Any] | None) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("EPOCH", "STEP", "LOSS", "TOKENS RIGHT", "ANSWERS RIGHT"):
        table.add_column(column, justify="right")
    table.add_column("")
    every = -(-len(validations) // MOST_VALIDATIONS)
    kept = final["step"] if final else None
    for number, one in enumerate(validations, 1):
        if number % every == 0 or one["step"] == kept:
            table.add_row(
                str(one.get("epoch", 0)),
                str(one["step"]),
                f"{one.get('loss', 0.0):.3f}",
                f"{one.get('tokenAccuracy', 0.0):.0%}",
                f"{one.get('exactMatch', 0.0):.0%}",
                "← kept" if one["step"] == kept else "",
            )
    return table


def _samples(samples: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("EXAMPLE")
    for column in ("INPUT", "EXPECTED", "BEFORE", "TUNED"):
        table.add_column(column, overflow="fold")
    table.add_column("")
    for sample in samples:
        mark = Text("✓", "green") if _right(sample) else Text("✗", "red")
        where = f"{sample.get('row', 0) + 1} {'held out' if sample.get('heldOut') else 'learnt'}"
        texts = (_short(sample.get(name, "")) for name in ("input", "expected", "baseAnswer", "tunedAnswer"))
        table.add_row(where, *map(Text, texts), mark)
    return table


def _shares(samples: Sequence[dict[str, Any]]) -> str:
    """Return how many of the answers are the examples' own."""
    parts = []
    for held_out, what in ((True, "held out"), (False, "learnt")):
        asked = [sample for sample in samples if sample.get("heldOut", False) is held_out]
        if asked:
            parts.append(f"{sum(map(_right, asked))} of {len(asked)} {what}")
    return f"right to the letter: {', '.join(parts)}"


def _right(sample: dict[str, Any]) -> bool:
    return bool(sample.get("tunedAnswer", "").strip() == sample.get("expected", "").strip())


def _short(text: str) -> str:
    short = text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
    # A model may write what steers terminals.
    return "".join(letter if letter.isprintable() else "↵" if letter == "\n" else "�" for letter in short)
