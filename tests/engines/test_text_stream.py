import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tunesmith.engines.text_stream import TextStream

TOKENIZER = tiny.tiny_tokenizer()


def pieces(text: str, opening: str = "", stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, opening, stops)
    tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
    return [*(stream.push(token) for token in tokens), stream.flush()], stream


def test_characters_of_several_tokens_come_whole():
    found, _ = pieces("é六🙂x")
    assert found == ["", "é", "六", "", "", "", "🙂", "x", ""]


def test_an_unfinished_character_is_flushed_as_what_it_decodes_to():
    stream = TextStream(TOKENIZER, "", ())
    first, _ = TOKENIZER.encode("é", add_special_tokens=False).ids
    assert [stream.push(first), stream.flush()] == ["", "\ufffd"]


def test_bytes_that_are_no_text_neither_raise_nor_stall():
    stream = TextStream(TOKENIZER, "", ())
    byte = [TOKENIZER.token_to_id(f"<0x{number:02X}>") for number in (0x41, 0xFF, 0xFE, 0xFF, 0xFE, 0x41)]
    letters = TOKENIZER.encode("abc", add_special_tokens=False).ids
    found = [stream.push(token) for token in [*byte, *letters]]
    assert "".join(found).endswith("abc")
    assert found[-1] == "c"


def test_control_tokens_are_no_text():
    stream = TextStream(TOKENIZER, "", ())
    tokens = [TOKENIZER.token_to_id(token) for token in ("a", "<bos>", "<end_of_turn>", "b")]
    assert [stream.push(token) for token in tokens] == ["a", "", "", "b"]


@pytest.mark.parametrize(
    ("text", "expected"), [(" yes", "yes"), ("  yes", " yes"), ("yes", "yes"), (" ", ""), ("", "")]
)
def test_the_opening_is_stripped_once_when_it_is_there(text: str, expected: str):
    assert "".join(pieces(text, opening=" ")[0]) == expected


def test_an_opening_that_is_only_begun_is_text():
    assert "".join(pieces("->", opening="->>")[0]) == "->"
    assert "".join(pieces("->>x", opening="->>")[0]) == "x"


def test_a_stop_sequence_across_tokens():
    found, stream = pieces("one STOP two", stops=("STOP",))
    assert "".join(found) == "one "
    assert stream.stopped


def test_what_could_begin_a_stop_sequence_is_held_back_and_no_more():
    found, stream = pieces("xSTx", stops=("STOP",))
    assert found == ["x", "", "", "STx", ""]
    assert not stream.stopped


def test_what_was_held_back_is_flushed():
    assert pieces("xST", stops=("STOP",))[0] == ["x", "", "", "ST"]


def test_the_stop_sequence_that_is_whole_first_wins():
    assert "".join(pieces("a b c d", stops=("c", "b c d", ""))[0]) == "a b "
    assert "".join(pieces("a b c d", stops=("c", "b c"))[0]) == "a "


def test_a_stop_sequence_is_looked_for_in_the_text_that_the_caller_sees():
    assert "".join(pieces(" yes", opening=" ", stops=(" y",))[0]) == "yes"


@settings(deadline=None, max_examples=200)
@given(st.text("ab é六🙂", max_size=30), st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop_sequence(text: str, stops: list[str]):
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert "".join(pieces(text, "", tuple(stops))[0]) == (text[: min(found)[1]] if found else text)
