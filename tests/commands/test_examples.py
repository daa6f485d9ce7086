"""Files of examples: what they may be, and where in them things are."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.commands.examples import Examples, read_examples


def written(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / name
    file.write_text(text, "utf-8")
    return file


def test_a_csv_files_places_are_lines(tmp_path: Path) -> None:
    text = '\ufefftext_input,output\r\n1,2\r\n\r\n"two\r\nlines","a\r\nb"\r\n5,6\r\n'
    found = read_examples(written(tmp_path, "a.csv", text))
    assert [row["output"] for row in found.rows] == ["2", "a\nb", "6"]
    assert (found.unit, list(found.places)) == ("line", [2, 4, 7])
    assert found.located("examples[1] and examples[2] are alike") == "line 4 and line 7 are alike"
    assert found.located("examples[9] is not ours") == "examples[9] is not ours"


def test_a_jsonl_files_places_are_lines_and_a_json_files_are_items(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "completion": 2}, {"input": "x", "output": {"größe": [1, True]}}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    found = read_examples(written(tmp_path, "a.jsonl", lines))
    assert found.rows == [
        {"text_input": "1", "output": "2"},
        {"text_input": "x", "output": '{"größe": [1, true]}'},
    ]
    assert list(found.places) == [1, 3]
    items = read_examples(written(tmp_path, "a.json", json.dumps(rows)))
    assert items.rows == found.rows
    assert items.located("examples[0] to examples[1]") == "item 1 to item 2"


def test_conversations_in_either_form(tmp_path: Path) -> None:
    chat = {
        "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
        ]
    }
    turns = [{"role": "user", "parts": [{"text": "1"}]}, {"role": "model", "parts": [{"text": "2"}]}]
    own = {"systemInstruction": {"parts": [{"text": "Count."}]}, "contents": turns}
    text = "\n".join(map(json.dumps, (chat, own)))
    found = read_examples(written(tmp_path, "a.jsonl", text))
    assert found.kind == "multiturnExamples"
    assert found.rows == [own, own]
    assert found.located("multiturn_examples[1].contents") == "line 2.contents"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "1,2", "name it .csv, .jsonl or .json"),
        ("a.csv", "text_input,output\n", "has no examples"),
        ("a.csv", "text_input,output\n1,2\n1,000,1,001\n", "line 3: has more cells than the heading: put text"),
        ("a.csv", "text_input,output\n1\n", "line 2: needs text_input and output, has text_input"),
        ("a.jsonl", '{"input": "1", "output": "2"}\n{"input":', "line 2: is not JSON"),
        ("a.jsonl", '["1", "2"]', "line 1: must be an object with text_input and output"),
        ("a.json", '{"text_input": "1"}', "must be a list of examples"),
        (
            "a.json",
            '[{"input": "1", "output": "2"}, {"contents": []}]',
            "item 2: the rows before it are of another",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user"}]}',
            "line 1: messages must be a list of objects with role and",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)) as raised:
        read_examples(written(tmp_path, name, text))
    assert message in str(raised.value)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("text_input,output\ngrößer,kleiner\n".encode("latin-1"))
    with pytest.raises(ValueError, match="Save it as UTF-8"):
        read_examples(file)


def test_options_are_named_as_they_are_typed() -> None:
    nothing: list[Any] = []
    assert Examples("examples", nothing, nothing, "line").located("set validation_fraction to 0") == (
        "set --validation to 0"
    )
