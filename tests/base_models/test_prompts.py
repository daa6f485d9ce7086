"""Prompts: what training saw is what serving makes."""

import pytest

from tiny import tiny_tokenizer
from tunesmith.base_models.prompts import FORMATS, PromptFormat, Turn

TOKENIZER = tiny_tokenizer()
TOKENIZER.encode_special_tokens = True  # as Weights.tokenizer() sets it
SYSTEM, HELLO, THERE, AGAIN = (
    Turn("system", "be brief"),
    Turn("user", "hello"),
    Turn("model", "the one"),
    Turn("user", "and on"),
)


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> PromptFormat:
    return FORMATS[request.param]


def test_an_answer_in_a_later_prompt_is_the_tokens_that_the_model_wrote(form: PromptFormat) -> None:
    first = form.prompt(TOKENIZER, [SYSTEM, HELLO])
    wrote = form.output(TOKENIZER, THERE.text)
    later, answers = form.conversation(TOKENIZER, [SYSTEM, HELLO, THERE, AGAIN])
    assert later[: len(first) + len(wrote)] == first + wrote
    assert answers == [(len(first), len(first) + len(wrote))]


def test_a_system_instruction_comes_before_the_first_input(form: PromptFormat) -> None:
    with_it, without = (form.prompt(TOKENIZER, [*turns, HELLO]) for turns in ([SYSTEM], []))
    text, rest = TOKENIZER.decode(with_it), TOKENIZER.decode(without)
    assert text.index("be brief") < text.index("hello")
    assert text.endswith(rest.split("\n")[-1])
    opening = form.opening(TOKENIZER, SYSTEM.text)
    assert with_it[: len(opening)] == opening
    assert form.opening(TOKENIZER) == without[: len(form.opening(TOKENIZER))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labelled", "be brief\nInput: hello\nOutput: the one\nInput: and on\nOutput:"),
        ("plain", "be brief\n\nhellothe one\nand on"),
        (
            "chatml",
            "system\nbe brief\nuser\nhello\nassistant\nthe one\nuser\nand on\nassistant\n",
        ),
    ],
)
def test_how_a_conversation_reads(name: str, text: str) -> None:
    tokens = FORMATS[name].prompt(TOKENIZER, [SYSTEM, HELLO, THERE, AGAIN])
    assert TOKENIZER.decode(tokens) == text  # control tokens are not shown


def test_a_passage_is_the_text_after_what_opens_a_prompt(form: PromptFormat) -> None:
    tokens, first = form.passage(TOKENIZER, "hello")
    assert TOKENIZER.decode(tokens[first:]) == "hello"
    assert first == len(form.start)


def test_text_never_becomes_a_control_token(form: PromptFormat) -> None:
    for turn in (Turn("system", "<eos>"), Turn("user", "<|im_end|>"), Turn("model", "<bos>")):
        text = [SYSTEM, HELLO, THERE, AGAIN]
        text[["system", "user", "model"].index(turn.role)] = turn
        specials = [TOKENIZER.id_to_token(token) for token in form.prompt(TOKENIZER, text)].count
        plain = [TOKENIZER.id_to_token(token) for token in form.prompt(TOKENIZER, [SYSTEM, HELLO, THERE, AGAIN])]
        for special in ("<eos>", "<|im_end|>", "<bos>"):
            assert specials(special) == plain.count(special)
