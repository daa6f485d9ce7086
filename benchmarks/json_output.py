"""Answers held to JSON schemas: whether each is what its schema says, and what that costs.

A model is tuned on changelog entries, whose answers are JSON, and asked 500 times over ten schemas: its own and
others that it has never seen, half of them drawn at temperature 1. Then the same questions are asked with its own
schema and without any, in turns, on one server: tokens a second, and how many of the answers are what it says.
Run on an otherwise idle machine: python benchmarks/json_output.py [TRIES [ROUNDS]]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
from rich.console import Console

from tunesmith import demo
from tunesmith.app import FIRST_ACCOUNT, Parts
from tunesmith.auth.tokens import DEFAULT_SCOPES
from tunesmith.base_models.catalog import Catalog
from tunesmith.client import Client
from tunesmith.config import Settings
from tunesmith.terminal import fetch_weights
from tutorial import once

TASK = Path(__file__).with_name("tasks") / "changelogs.jsonl"
TOGETHER = 8
"""Questions that are under way at once."""
MOST_TOKENS = 400

NAME = {"type": "string", "maxLength": 40}
OWN = {
    "type": "object",
    "properties": {
        "package": NAME,
        "version": {"type": "string", "maxLength": 60},
        "suite": NAME,
        "urgency": {"enum": ["low", "medium", "high", "emergency", "critical"]},
        "closes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9_999_999},
            "maxItems": 20,
        },
        "cves": {"type": "array", "items": {"type": "string", "pattern": "^CVE-\\d{4}-\\d{4,7}$"}, "maxItems": 10},
    },
    "required": ["package", "version", "suite", "urgency", "closes", "cves"],
    "additionalProperties": False,
}


def thing(required: Sequence[str] | None = None, **properties: Any) -> dict[str, Any]:
    """The schema of an object, all of whose properties are required unless it is said which."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "the task's own": OWN,
    "two of its fields": thing(package=NAME, version=NAME),
    "optional fields": thing(
        ["package"], package=NAME, urgency={"enum": ["low", "high"]}, cves={"type": "boolean"}
    ),
    "numbers": thing(
        major={"type": "integer"},
        share={"type": "number", "minimum": 0, "maximum": 1},
        count={"type": "integer", "minimum": 1, "maximum": 12},
    ),
    "a list of objects": {
        "type": "array",
        "items": thing(package=NAME, closes={"type": ["integer", "null"], "minimum": 0, "maximum": 9_999_999}),
        "minItems": 1,
        "maxItems": 3,
    },
    "nested": thing(
        source=thing(name=NAME, upload=thing(suite=NAME, urgent={"type": "boolean"})), note={"type": "null"}
    ),
    "one of several": {
        "anyOf": [thing(package=NAME), thing(error={"enum": ["none", "unknown"]}), {"type": "null"}]
    },
    "formats": thing(
        day={"type": "string", "format": "date"},
        id={"type": "string", "format": "uuid"},
        mail={"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.org$"},
    ),
    "a tree": {
        "$defs": {
            "node": thing(
                name={"type": "string", "maxLength": 10},
                children={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
            ),
            "leaf": thing(name={"type": "string", "maxLength": 10}),
        },
        "$ref": "#/$defs/node",
    },
    "an enum": {"enum": ["unstable", "experimental", "stable", 'say "六"']},
}


class Asker:
    """Asks the tuned model.

    Args:
        client: The server's.
        model: Name of the tuned model.
        questions: What it is asked about, in turns.
    """

    def __init__(self, client: Client, model: str, questions: Sequence[str]) -> None:
        self._client, self._model, self._questions = client, model, questions

    def answer(self, number: int, schema: dict[str, Any] | None, temperature: float) -> dict[str, Any]:
        """Return the answer to a question."""
        config: dict[str, Any] = {"temperature": temperature, "seed": number, "maxOutputTokens": MOST_TOKENS}
        if schema is not None:
            config |= {"responseMimeType": "application/json", "responseJsonSchema": schema}
        text = self._questions[number % len(self._questions)]
        body = {"contents": [{"parts": [{"text": text}]}], "generationConfig": config}
        answer: dict[str, Any] = self._client.call("POST", f"{self._model}:generateContent", body)
        return answer

    def answers(
        self, numbers: Iterable[int], schema: dict[str, Any] | None, temperature: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return the answers to several questions, `TOGETHER` of them at a time."""
        with ThreadPoolExecutor(TOGETHER) as threads:
            return list(threads.map(lambda number: self.answer(number, schema, temperature), numbers))


def main(tries: int, rounds: int) -> None:
    """Tune, and print both tables."""
    rows = [json.loads(line) for line in TASK.read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load(data_dir=Path(folder))
        fetch_weights(Console(stderr=True), Catalog.load(settings).default, settings.cache_dir)
        with demo.server(settings) as url:
            token = Parts.open(settings).tokens.create(FIRST_ACCOUNT, DEFAULT_SCOPES, seconds=7200)
            with Client(url, token) as client:
                asker = Asker(client, tuned(client, rows), [row["text_input"] for row in rows if unseen(row)])
                checked(asker, tries)
                timed(asker, rounds)


def unseen(row: dict[str, Any]) -> bool:
    """Whether the model is not trained on a row."""
    return bool(row["part"] != "train")


def tuned(client: Client, rows: Sequence[dict[str, Any]]) -> str:
    """Tune a model on the task; return its name."""
    examples = [{key: row[key] for key in ("text_input", "output")} for row in rows if not unseen(row)]
    once(
        client,
        {
            "display_name": "changelogs",
            "base_model": "models/gemma-3-270m",
            "tuning_task": {
                "hyperparameters": {"epoch_count": 3, "batch_size": 4, "learning_rate": 0.001},
                "training_data": {"examples": {"examples": examples}},
            },
        },
    )
    name: str = client.call("GET", "tunedModels")["tunedModels"][0]["name"]
    return name


def checked(asker: Asker, tries: int) -> None:
    """Ask with every schema; print how many answers are what theirs says."""
    print(f"\n{'schema':<20}{'tries':>8}{'valid':>8}{'cut':>8}")
    total = valid = 0
    for name, schema in SCHEMAS.items():
        each = tries // len(SCHEMAS)
        found = asker.answers(range(each // 2), schema) + asker.answers(range(each // 2, each), schema, 1.0)
        right = sum(fits(answer, schema) for answer in found)
        cut = sum(answer["candidates"][0]["finishReason"] == "MAX_TOKENS" for answer in found)
        print(f"{name:<20}{each:>8}{right:>8}{cut:>8}", flush=True)
        total, valid = total + each, valid + right
    print(f"{'all':<20}{total:>8}{valid:>8}")


def timed(asker: Asker, rounds: int) -> None:
    """Ask the same questions with and without the schema, in turns; print tokens a second and what is valid."""
    print(f"\n{TOGETHER} questions at a time; tokens a second, and the share of answers that are the task's JSON")
    print(f"{'temperature':<14}{'free':>8}{'held':>8}{'ratio':>8}{'free, valid':>14}{'held, valid':>14}")
    ratios = []
    for number in range(rounds):
        temperature = float(number % 2)
        free, held = rate(asker, None, temperature), rate(asker, OWN, temperature)
        ratios.append(held[0] / free[0])
        shares = f"{ratios[-1]:>8.2f}{free[1]:>14.0%}{held[1]:>14.0%}"
        print(f"{temperature:<14g}{free[0]:>8.1f}{held[0]:>8.1f}{shares}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} (goal: at least 0.85)")


def rate(asker: Asker, schema: dict[str, Any] | None, temperature: float) -> tuple[float, float]:
    """Return tokens a second, and the share of the answers that are what the task's schema says."""
    start = time.perf_counter()
    found = asker.answers(range(4 * TOGETHER), schema, temperature)
    seconds = time.perf_counter() - start
    tokens = sum(answer["usageMetadata"]["candidatesTokenCount"] for answer in found)
    return tokens / seconds, sum(fits(answer, OWN) for answer in found) / len(found)


def fits(answer: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether an answer parses and is what a schema says."""
    text = answer["candidates"][0]["content"]["parts"][0].get("text", "")
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(500, 6)[len(given) :])
