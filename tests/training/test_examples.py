"""Conversations as rows: every answer is learnt, and long ones lose their oldest part."""

from collections.abc import Sequence

import pytest
import torch

from tiny import tiny_tokenizer
from training.training_data import conversation, conversations
from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.training.batches import collate
from tunesmith.training.examples import Row, tokenize

TOKENIZER = tiny_tokenizer()
TEXTS = ["one", "two", "three", "four", "five", "six"]


def examples(texts: Sequence[str], system: str | None = None) -> protos.TuningExamples:
    example = conversation(texts, system)
    for content in example.contents:  # a turn may come in several parts
        text = content.parts.pop().text
        half = len(text) // 2
        content.parts.extend(protos.TuningPart(text=part) for part in (text[:half], text[half:]))
    return conversations([example])


def row(name: str, texts: list[str], system: str | None = None, limit: int = 1000) -> Row:
    (found,) = tokenize(examples(texts, system), FORMATS[name], TOKENIZER, limit)
    return found


def learnt(one: Row) -> list[str]:
    tokens = one.prompt + one.output
    return [TOKENIZER.decode(tokens[start:end]).strip() for start, end in one.answers]


@pytest.mark.parametrize("name", ["labelled", "chatml"])
@pytest.mark.parametrize("system", [None, "count on"])
def test_every_answer_is_learnt_and_nothing_else(name: str, system: str | None) -> None:
    one = row(name, TEXTS, system)
    assert learnt(one) == ["two", "four", "six"]
    assert one.learnt == sum(len(FORMATS[name].output(TOKENIZER, text)) for text in TEXTS[1::2])
    batch = collate([one, Row([5, 6, 7], [8, 9])], torch.device("cpu"))
    assert batch.targets[: batch.learnt].tolist() == [
        *(token for start, end in one.answers for token in (one.prompt + one.output)[start:end]),
        8,
        9,
    ]
    assert torch.equal(batch.tokens[batch.places[: batch.learnt] + 1], batch.targets[: batch.learnt])


@pytest.mark.parametrize("name", ["labelled", "chatml"])
def test_a_conversation_of_one_exchange_is_a_pair(name: str) -> None:
    pair = protos.TuningExamples(examples=[protos.TuningExample(text_input="one", output="two")])
    assert tokenize(pair, FORMATS[name], TOKENIZER, 1000) == [row(name, ["one", "two"])]


@pytest.mark.parametrize("name", ["labelled", "chatml"])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_long_conversation_loses_its_oldest_exchanges(name: str, kept: int) -> None:
    short = row(name, TEXTS[-2 * kept :], "count on")
    for limit in (len(short), len(short) + 3):
        one = row(name, TEXTS, "count on", limit)
        assert len(one) <= limit
        assert one == short


def test_every_limit_gives_a_row_that_fits_and_ends_with_its_answer() -> None:
    form = FORMATS["chatml"]
    texts = [text * 5 for text in TEXTS]
    whole = len(row("chatml", texts, "count on and on"))
    for limit in range(40, whole + 2):
        one = row("chatml", texts, "count on and on", limit)
        assert len(one) <= limit
        assert all(0 < start < end <= len(one) for start, end in one.answers)
        assert one.output == form.output(TOKENIZER, texts[-1])[: len(one.output)]
        assert learnt(one)[:-1] == texts[1:-1:2][3 - len(one.answers) :]


def test_a_system_instruction_stays_while_there_is_room() -> None:
    form = FORMATS["labelled"]
    opening = form.opening(TOKENIZER, "be brief")
    long = row("labelled", ["x" * 300 + " end", "two"], "be brief", 100)
    assert long.prompt[: len(opening)] == opening
    assert TOKENIZER.decode(long.prompt).endswith(" end\nOutput:")
    longer = row("labelled", ["x", "two"], "y" * 300, 100)
    assert len(longer) == 100
    assert TOKENIZER.decode(longer.prompt).endswith("Input: x\nOutput:")


def test_what_serving_makes_is_what_training_saw() -> None:
    one = row("labelled", TEXTS[:4], "count on")
    turns = [Turn("system", "count on"), Turn("user", "one"), Turn("model", "two"), Turn("user", "three")]
    assert one.prompt == FORMATS["labelled"].prompt(TOKENIZER, turns)
