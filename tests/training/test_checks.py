"""What is said about training data as a whole: each warning has its rows and what to do; sound data has none."""

import pytest

from tiny import tiny_tokenizer
from training.training_data import conversation, conversations, pairs
from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.errors import FailedPrecondition
from tunesmith.training import checks, split
from tunesmith.training.checks import MOST_ROWS, DataWarning
from tunesmith.training.examples import tokenize
from tunesmith.training.hyperparameters import Options

TOKENIZER = tiny_tokenizer()
FORM = FORMATS["labelled"]
LIMIT = 60


def only(warnings: list[DataWarning]) -> DataWarning:
    (warning,) = warnings
    return warning


def of_rows(examples: protos.TuningExamples, held_out: tuple[int, ...] = ()) -> list[DataWarning]:
    rows = tokenize(examples, FORM, TOKENIZER, LIMIT)
    return checks.of_rows(rows, FORM, TOKENIZER, LIMIT, held_out)


TUTORIAL = pairs(("1", "2"), ("-3", "-2"), ("twenty two", "twenty three"), ("1,000", "1,001"), ("seven", "eight"))
LABELS = pairs(*((f"text {number}", ["good", "bad", "neither"][number % 3]) for number in range(60)))
SUMMARIES = pairs(*((f"text {number}\n\twith <b>tags</b>", f"summary {number}") for number in range(60)))


@pytest.mark.parametrize("examples", [TUTORIAL, LABELS, SUMMARIES])
def test_sound_data_has_no_warnings(examples: protos.TuningExamples) -> None:
    held = split.held_out(examples, Options(), 0)
    assert checks.of_examples(examples, held, Options()) == []
    assert of_rows(examples, tuple(held)) == []


def test_repetitions() -> None:
    warning = only(checks.of_examples(pairs(("a", "1"), ("b", "2"), ("a ", "1"), ("a", "1"))))
    assert (warning.kind, warning.rows) == ("duplicate", (2, 3))
    assert warning.message.startswith("examples[2] and examples[3] say the same as an earlier one")
    assert "Remove" in warning.message


def test_contradictions() -> None:
    warning = only(checks.of_examples(pairs(("a", "1"), ("b", "2"), ("a", "3"))))
    assert (warning.kind, warning.rows) == ("contradiction", (0, 2))
    assert "examples[0] '1' and examples[2] '3'" in warning.message


def test_conversations_repeat_and_contradict_only_as_a_whole() -> None:
    rows = [
        conversation(["hello", "hi", "how are you?", "well"]),
        conversation(["hello", "oh", "how are you?", "not well"]),  # something else was said before
        conversation(["hello", "hi", "how are you?", "not well"]),
    ]
    warning = only(checks.of_examples(conversations(rows)))
    assert (warning.kind, warning.rows) == ("contradiction", (0, 2))
    rows = [conversation(["a", "b"], "one"), conversation(["a", "c"], "two")]
    assert checks.of_examples(conversations(rows)) == []


@pytest.mark.parametrize(
    ("kind", "text", "output"),
    [
        ("blank_output", "a", " \n"),
        ("stray_space", "a", "b\n"),
        ("stray_space", "a", " b"),
        ("control_text", "a", "b<eos>"),
        ("control_text", "<|im_start|>user a", "b"),
        ("control_text", "[INST] a [/INST]", "b"),
        ("control_text", "a", "b</s>"),
        ("broken_text", "caf\ufffd", "b"),
        ("broken_text", "a", "b\x00"),
    ],
)
def test_odd_texts(kind: str, text: str, output: str) -> None:
    warning = only(checks.of_examples(pairs(("x", "y"), (text, output))))
    assert (warning.kind, warning.rows) == (kind, (1,))
    assert warning.message.startswith("examples[1] has ")


def test_an_odd_earlier_turn_counts() -> None:
    rows = [conversation(["a", "b", "c", "d"]), conversation(["a", "<end_of_turn>", "c", "d"])]
    warning = only(checks.of_examples(conversations(rows)))
    assert (warning.kind, warning.rows) == ("control_text", (1,))


def test_examples_that_were_read_as_one() -> None:
    rows = [(f"question {number}", f"answer {number}") for number in range(30)]
    rows[7] = ("".join(f"question {number},answer {number}\n" for number in range(200)), "answer")
    warning = only(checks.of_examples(pairs(*rows)))
    assert (warning.kind, warning.rows) == ("long", (7,))


def test_one_label_for_nearly_all() -> None:
    rows = [(f"text {number}", "good" if number % 10 else "bad") for number in range(30)]
    warning = only(checks.of_examples(pairs(*rows)))
    assert (warning.kind, warning.rows) == ("one_output", (0, 10, 20))
    assert warning.message.startswith("90% of the examples have the output 'good'")
    assert only(checks.of_examples(pairs(*((text, "ok") for text, _ in rows)))).rows == ()
    assert checks.of_examples(pairs(*rows[:19])) == []  # so few say little


def test_a_warning_lists_some_rows_and_counts_all() -> None:
    rows = [(f"text {number}", f"output {number}") for number in range(1500)]
    warning = only(checks.of_examples(pairs(*rows, *rows)))
    assert len(warning.rows) == MOST_ROWS
    assert warning.message.startswith("1,500 examples (examples[1500], examples[1501], ")


def test_outputs_that_are_learnt_and_validated() -> None:
    rows = [(f"text {number}", f"summary {number % 55}") for number in range(60)]
    warning = only(checks.of_examples(pairs(*rows), held_out=[3, 20, 30]))
    assert (warning.kind, warning.rows) == ("leak", (3,))


def test_too_few_inputs_to_hold_some_out() -> None:
    examples = pairs(*((f"input {number % 2}", f"output {number}") for number in range(60)))
    held = split.held_out(examples, Options(), 0)
    kinds = {warning.kind for warning in checks.of_examples(examples, held, Options())}
    assert kinds == {"contradiction", "nothing_held_out"}
    without = checks.of_examples(examples, held, Options(validation_fraction=0))
    assert {warning.kind for warning in without} == {"contradiction"}


def test_cut_inputs_say_how_much_is_lost() -> None:
    examples = pairs(("short", "one"), ("x" * 70, "two"), ("y" * 80, "three"))
    warning = only(of_rows(examples))
    assert (warning.kind, warning.rows) == ("input_cut", (1, 2))
    whole = tokenize(examples, FORM, TOKENIZER, 1000)
    assert f"examples[2] loses most, {len(whole[2]) - LIMIT} tokens" in warning.message
    assert "60 tokens" in warning.message


def test_a_conversation_that_loses_turns_is_cut() -> None:
    rows = [conversation(["one", "two"]), conversation(["one", "two"] * 10)]
    warning = only(of_rows(conversations(rows)))
    assert (warning.kind, warning.rows) == ("input_cut", (1,))


def test_what_is_alike_once_cut_leaks() -> None:
    examples = pairs(("a" + "x" * 80, "one"), ("b" + "x" * 80, "two"), ("short", "one"))
    cut, leak = of_rows(examples, held_out=(1, 2))
    assert (cut.kind, leak.kind, leak.rows) == ("input_cut", "leak", (1,))
    assert [warning.kind for warning in of_rows(examples, held_out=(2,))] == ["input_cut"]


def test_an_output_that_leaves_no_room_for_its_input_is_refused() -> None:
    almost = LIMIT - len(FORM.prompt(TOKENIZER, [Turn("user", "x")])) - len(FORM.output(TOKENIZER, ""))
    assert of_rows(pairs(("x", "z" * almost))) == []
    with pytest.raises(FailedPrecondition, match=r"examples\[1\] leaves no room .* 60\. Shorten the output"):
        of_rows(pairs(("a", "b"), ("x", "z" * (almost + 1))))
    with pytest.raises(FailedPrecondition, match=r"examples\[1\] and examples\[2\] .* has 202 tokens"):
        of_rows(pairs(("a", "b"), ("x", "z" * 200), ("y", "z" * 300)))
