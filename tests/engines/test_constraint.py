"""Whatever a model's scores are, the answer is what its constraint says."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import tiny
from tunesmith.engines.base import Constraint, Sampling
from tunesmith.engines.choices import Choices
from tunesmith.engines.constraint import COMPILED, Constraints, Matcher
from tunesmith.engines.sampling import Chosen, Sampler
from tunesmith.engines.scores import WholeScores
from tunesmith.errors import InvalidArgument

TOKENIZER = tiny.tiny_tokenizer()
STOPS = frozenset(TOKENIZER.token_to_id(token) for token in ("<eos>", "<end_of_turn>"))
PADDED = TOKENIZER.get_vocab_size() + 40
"""Models have more scores than tokens, as their sizes are rounded up."""

SCHEMAS: dict[str, dict[str, Any]] = {
    "an object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog", "六"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
    "one of several": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": "x\n"}]},
    "a tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "a pattern": {"type": "string", "pattern": "^[A-C]{2}-\\d{3,5}$"},
    "a date": {"type": "string", "format": "date"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return path


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints()


def choose(scores: torch.Tensor, samplers: list[Sampler]) -> list[Chosen]:
    return Choices(WholeScores(scores), samplers).of(range(len(samplers)))


def answer(matcher: Matcher, seed: int, temperature: float = 1.0, top_k: int = 0, most: int = 400) -> str:
    """What comes of random scores."""
    noise = torch.Generator().manual_seed(seed)
    sampler = Sampler(Sampling(temperature, 1.0, top_k, most, seed=seed), matcher)
    tokens: list[int] = []
    while not sampler.finished and len(tokens) < most:
        (chosen,) = choose(torch.randn(1, PADDED, generator=noise) * 3, [sampler])
        assert sampler.failed is None
        if chosen.token in STOPS:
            break
        sampler.take(chosen.token)
        tokens.append(chosen.token)
    text: str = TOKENIZER.decode(tokens)
    return text


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("opening", ["", " "])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 5}], ids=["greedy", "drawn", "top_k"])
def test_any_scores_make_json_of_the_schema(
    constraints: Constraints, tokenizer: Path, name: str, opening: str, options: dict[str, Any]
):
    constraint = Constraint("schema", SCHEMAS[name])
    found = set()
    for seed in range(12):
        text = answer(constraints.matcher(constraint, opening, tokenizer, STOPS), seed, **options)
        assert text.startswith(opening)
        jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
        found.add(text)
    assert len(found) > 2


def test_choices(constraints: Constraints, tokenizer: Path):
    choices = ("cat", "catfish", 'say "no"\n', "七\\d", "<eos>")
    constraint = Constraint("schema", choices=choices)
    found = {
        answer(constraints.matcher(constraint, " ", tokenizer, STOPS), seed, temperature)
        for temperature in (0.0, 1.0)
        for seed in range(60)
    }
    assert found == {f" {choice}" for choice in choices}


def test_rows_with_and_without_a_constraint_share_a_batch(constraints: Constraints, tokenizer: Path):
    matcher = constraints.matcher(Constraint("schema", choices=("b",)), "", tokenizer, STOPS)
    scores = torch.zeros(4, PADDED)
    scores[:, TOKENIZER.token_to_id("a")] = 50
    free, held = Sampling(0.0, 1.0, 0, 1), Sampling(1.0, 0.9, 0, 1)
    rows = [Sampler(free), Sampler(free, matcher), Sampler(held), Sampler(held, matcher)]
    found = [TOKENIZER.id_to_token(chosen.token) for chosen in choose(scores, rows)]
    assert found == ["a", "b", "a", "b"]


def test_rows_that_draw_stand_before_those_that_do_not(constraints: Constraints, tokenizer: Path):
    first, second = (
        constraints.matcher(Constraint("schema", choices=(choice,)), "", tokenizer, STOPS) for choice in "bc"
    )
    scores = torch.zeros(2, PADDED)
    scores[:, TOKENIZER.token_to_id("a")] = 50
    rows = [Sampler(Sampling(1.0, 1.0, 5, 1), first), Sampler(Sampling(0.0, 1.0, 0, 1), second)]
    assert [TOKENIZER.id_to_token(chosen.token) for chosen in choose(scores, rows)] == ["b", "c"]


def test_a_model_with_fewer_scores_than_its_tokenizer_has_tokens(constraints: Constraints, tokenizer: Path):
    matcher = constraints.matcher(Constraint("schema", choices=("b",)), "", tokenizer, STOPS)
    whole = np.zeros(-(-PADDED // 32), np.int32)
    matcher.allowed(whole)
    memory = np.full(len(whole), 7, np.int32)
    matcher.allowed(memory[:2])
    assert memory[:2].tolist() == whole[:2].tolist()
    assert set(memory[2:].tolist()) == {7}  # nothing is written behind what was given


def test_whitespace_does_not_go_on_for_ever(constraints: Constraints, tokenizer: Path):
    matcher = constraints.matcher(Constraint("schema", {}), "", tokenizer, STOPS)
    space = TOKENIZER.token_to_id("▁")
    for token in TOKENIZER.encode('{"a":', add_special_tokens=False).ids:
        assert matcher.allows(token)
        matcher.take(token)
    assert matcher.allows(space)
    matcher.take(space)
    assert not matcher.allows(space)


def test_what_has_been_compiled_is_kept_and_only_so_much(constraints: Constraints, tokenizer: Path):
    for number in range(COMPILED + 3):
        constraints.matcher(Constraint("schema", {"const": number}), "", tokenizer, STOPS)
    assert len(constraints._compiled) == COMPILED
    newest = next(reversed(constraints._compiled.values()))
    constraints.matcher(Constraint("other", {"const": number}), "", tokenizer, STOPS)
    assert next(reversed(constraints._compiled.values())) is newest


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, 'keywords that answers cannot be held to: ["uniqueItems"]'),
        ({"not": {"type": "string"}}, '["not"]'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "use anyOf"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "person"}, "Invalid type: person"),
        ({"enum": ["x" * 70_000]}, "must be at most 65,536 characters long"),
    ],
)
def test_schemas_that_no_answer_can_be_held_to(
    constraints: Constraints, tokenizer: Path, schema: dict[str, Any], reason: str
):
    with pytest.raises(InvalidArgument) as error:
        constraints.matcher(Constraint("where.it.stands", schema), "", tokenizer, STOPS)
    assert error.value.message.startswith("* where.it.stands: ")
    assert reason in error.value.message


def test_a_pattern_that_explodes_ends_the_answer(constraints: Constraints, tokenizer: Path):
    schema = {"type": "string", "pattern": "^" + "".join(f"(.*{letter}.{{40}}|.*)" for letter in "abcdefgh") * 4}
    matcher = constraints.matcher(Constraint("schema", schema), "", tokenizer, STOPS)
    sampler = Sampler(Sampling(1.0, 1.0, 0, 1), matcher)
    for token in TOKENIZER.encode('"' + "abcdefgh" * 40, add_special_tokens=False).ids:
        choose(torch.zeros(1, PADDED), [sampler])
        if sampler.failed:
            break
        sampler.take(token)
    assert sampler.failed is not None
    assert "too complex" in sampler.failed.message
    choose(torch.zeros(1, PADDED), [sampler])  # the others in its batch go on
