"""Files of examples, as people keep them."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

INPUTS = ("text_input", "textInput", "input", "prompt")
OUTPUTS = ("output", "completion")
CONVERSATIONS = ("contents", "messages")
"""A column with a conversation: in the Gemini API's form, or as chat completions have it."""
_ROLES = {"assistant": "model", "developer": "system"}
_NUMBERED = re.compile(r"(?:multiturn_)?examples\[(\d+)\]")


@dataclass(frozen=True)
class Examples:
    """The examples of a file.

    Attributes:
        kind: The field of TuningExamples that they go into.
        rows: The examples as the API takes them.
        places: Where in the file each one begins, from 1.
        unit: What is counted there.
    """

    kind: Literal["examples", "multiturnExamples"]
    rows: Sequence[dict[str, Any]]
    places: Sequence[int]
    unit: Literal["line", "item"]

    def located(self, text: str) -> str:
        """Return the server's words with places in the file for examples' numbers, and options for fields."""

        def place(number: re.Match[str]) -> str:
            row = int(number[1])
            return f"{self.unit} {self.places[row]}" if row < len(self.places) else number[0]

        return _NUMBERED.sub(place, text).replace("validation_fraction", "--validation")


def counted_from_one(text: str) -> str:
    """Return what the server says of examples with their numbers from 1, where the file is not at hand."""
    return _NUMBERED.sub(lambda number: f"example {int(number[1]) + 1}", text)


def read_examples(file: Path) -> Examples:
    """Return a file's examples; the server says what is wrong with their texts.

    Raises:
        ValueError: The file is not what its name says, or lacks the columns.
    """
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not in UTF-8 ({error}). Save it as UTF-8.") from None
    suffix = file.suffix.lower()
    readers = {".csv": _csv, ".jsonl": _lines, ".json": _items}
    if suffix not in readers:
        raise ValueError(f"{file}: name it .csv, .jsonl or .json, as what it is")
    unit: Literal["line", "item"] = "item" if suffix == ".json" else "line"
    found = []
    for place, row in readers[suffix](text, file):
        try:
            found.append((place, *_example(row)))
        except ValueError as error:
            raise ValueError(f"{file}, {unit} {place}: {error}") from None
    if not found:
        raise ValueError(f"{file}: has no examples")
    kind = found[0][1]
    if other := next((place for place, of_it, _ in found if of_it != kind), None):
        raise ValueError(
            f"{file}, {unit} {other}: the rows before it are of another kind; give one kind in a file"
        )
    return Examples(kind, [row for *_, row in found], [place for place, *_ in found], unit)


def _csv(text: str, _file: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        cells = [cell for cell in row.values() if isinstance(cell, str)]
        # `line_num` is where a row ends; cells in quotation marks may have line breaks.
        yield reader.line_num - sum(len(cell.splitlines()) - 1 for cell in cells if cell), row


def _lines(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: is not JSON ({error})") from None


def _items(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file}: must be a list of examples")
    yield from enumerate(rows, 1)


def _example(row: Any) -> tuple[Literal["examples", "multiturnExamples"], dict[str, Any]]:
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with text_input and output, not {json.dumps(row)[:40]}")
    if "contents" in row:
        given = ("systemInstruction", "system_instruction", "contents")
        return "multiturnExamples", {field: row[field] for field in given if field in row}
    if "messages" in row:
        return "multiturnExamples", _conversation(row["messages"])
    if None in row:  # where csv puts cells that no heading is above
        raise ValueError("has more cells than the heading: put text that has commas into quotation marks")
    pair = [next((row[name] for name in names if row.get(name) is not None), None) for names in (INPUTS, OUTPUTS)]
    if None in pair:
        has = ", ".join(name for name, cell in row.items() if cell is not None)
        raise ValueError(f"needs text_input and output, has {has or 'nothing'}")
    return "examples", {"text_input": _text(pair[0]), "output": _text(pair[1])}


def _text(cell: Any) -> str:
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)


def _conversation(messages: Any) -> dict[str, Any]:
    """Return a conversation of chat completions' form in the Gemini API's."""
    if not isinstance(messages, list) or not all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    ):
        raise ValueError("messages must be a list of objects with role and content, both text")
    turns = [(_ROLES.get(one["role"], one["role"]), {"parts": [{"text": one["content"]}]}) for one in messages]
    system = [content for role, content in turns if role == "system"]
    example: dict[str, Any] = {
        "contents": [{"role": role, **content} for role, content in turns if role != "system"]
    }
    if system:
        example["systemInstruction"] = {"parts": [part for content in system for part in content["parts"]]}
    return example
