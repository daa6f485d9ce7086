"""Which examples are held out: as many as wanted, the same ones again, no input on both sides."""

from collections.abc import Sequence

import pytest

from training.training_data import conversation, conversations, pairs
from tunesmith import protos
from tunesmith.training import split
from tunesmith.training.hyperparameters import Options


def asking(inputs: Sequence[str]) -> protos.TuningExamples:
    return pairs(*((text, f"output {number}") for number, text in enumerate(inputs)))


def numbered(count: int) -> protos.TuningExamples:
    return asking([f"input {number}" for number in range(count)])


@pytest.mark.parametrize(
    ("examples", "fraction", "expected"),
    [
        (49, None, 0),
        (50, None, 5),
        (400, None, 40),
        (10_000, None, 200),
        (10, 0.0, 0),
        (500, 0.0, 0),
        (10, 0.2, 2),
        (4, 0.1, 1),
        (10_000, 0.25, 2500),
        (2, 0.5, 1),
        (1, 0.5, 0),
    ],
)
def test_as_many_as_wanted(examples: int, fraction: float | None, expected: int) -> None:
    held = split.held_out(numbered(examples), Options(validation_fraction=fraction), seed=0)
    assert len(held) == len(set(held)) == expected
    assert held == sorted(held)
    assert all(0 <= number < examples for number in held)


def test_the_seed_and_the_inputs_alone_decide() -> None:
    inputs = [f"input {number}" for number in range(100)]
    held = split.held_out(asking(inputs), Options(), seed=0)
    assert held == split.held_out(asking(inputs), Options(), seed=0)
    assert held != split.held_out(asking(inputs), Options(), seed=1)
    backwards = split.held_out(asking(inputs[::-1]), Options(), seed=0)
    assert {inputs[::-1][number] for number in backwards} == {inputs[number] for number in held}


def test_one_input_is_on_one_side_however_it_is_written() -> None:
    inputs = [f"{text} {number // 4}" for number, text in enumerate(["Café", " café ", "CAFÉ", "Cafe\u0301"] * 25)]
    held = split.held_out(asking(inputs), Options(), seed=0)
    assert len(held) == 8  # of ten wanted, two whole inputs
    assert {split.normal(inputs[number]) for number in held}.isdisjoint(
        split.normal(text) for number, text in enumerate(inputs) if number not in held
    )


def test_an_input_with_too_many_examples_is_not_held_out() -> None:
    assert split.held_out(asking(["yes", "no"] * 50), Options(), seed=0) == []
    held = split.held_out(asking(["same"] * 95 + list("abcde")), Options(), seed=0)
    assert held == [95, 96, 97, 98, 99]


def test_a_conversation_is_with_those_that_go_on_from_it() -> None:
    """One that is the beginning of another teaches an answer of it."""
    rows = []
    for number in range(30):
        turns = ["hello", "hello, what is it?", f"question {number}", f"answer {number}", "and?", "that is all"]
        rows += [conversation(turns[:4]), conversation(turns)]
    for seed in range(5):
        held = split.held_out(conversations(rows), Options(), seed)
        assert len(held) == 6
        assert {number // 2 for number in held[::2]} == {number // 2 for number in held[1::2]}


def test_conversations_that_begin_alike_need_not_be_together() -> None:
    rows = [conversation(["hello", "yes?", f"question {number}", "answer"]) for number in range(50)]
    assert len(split.held_out(conversations(rows), Options(), 0)) == 5


def test_a_system_instruction_makes_another_input() -> None:
    turns = ["same question", "answer"]
    rows = [conversation(turns, f"be {number}") for number in range(50)]
    assert len(split.held_out(conversations(rows), Options(), 0)) == 5
    rows = [conversation(turns, "be brief")] * 50
    assert split.held_out(conversations(rows), Options(), 0) == []


@pytest.mark.parametrize(
    ("options", "examples", "field"),
    [
        (Options(validation_fraction=0.6), 100, "validation_fraction"),
        (Options(validation_fraction=-0.1), 100, "validation_fraction"),
        (Options(validation_fraction=float("nan")), 100, "validation_fraction"),
        (Options(patience=-1), 100, "patience"),
        (Options(patience=2, validation_fraction=0), 100, "patience"),
        (Options(patience=2), 49, "patience"),
    ],
)
def test_impossible_options_are_named(options: Options, examples: int, field: str) -> None:
    assert [name for name, _ in split.violations(options, examples)] == [field]


def test_possible_options() -> None:
    for options in (Options(), Options(0.5, 3, "last"), Options(0), Options(patience=1)):
        assert [*split.violations(options, 50)] == []
