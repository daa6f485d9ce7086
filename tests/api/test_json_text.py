import pytest

from tunesmith.api.json_text import parse
from tunesmith.errors import InvalidArgument


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"", {}),
        (b" \n", {}),
        (b'{"a": [1, 2.5, null, true, "\\u516d"]}', {"a": [1, 2.5, None, True, "六"]}),
        ('{"a": "六"}'.encode(), {"a": "六"}),
        (b"\xef\xbb\xbf{}", {}),
        (b'{"a": 1,}', {"a": 1}),
        (b"[1, 2,]", [1, 2]),
        (b"{'a': 'it\\'s \"x\"'}", {"a": 'it\'s "x"'}),
        (b"{a: 1, b_c: 2}", {"a": 1, "b_c": 2}),
        (b"// why\n{/* here */ a: 1}", {"a": 1}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b"{a: 1, a: 2}", {"a": 2}),
    ],
)
def test_reads_json_as_people_write_it(body: bytes, value: object):
    assert parse(body) == value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{not json", "Expected ':' at line 1, column 6, found 'j'.\n{not json\n     ^"),
        (b'{\n  "a": 1\n  "b": 2\n}', 'at line 3, column 3, found \'"\'.\n  "b": 2\n  ^'),
        (b'{"a":', "Unclosed object at line 1, column 1."),
        (b'{"a": "x\ny"}', "Unclosed string at line 1, column 7."),
        (b"{} x", "Extra data 'x' at line 1, column 4.\n{} x\n   ^"),
        (b'{"a": "\xff"}', "The body is not UTF-8: byte 7 is invalid start byte."),
        (b"[" * 100_000, "Nested too deeply."),
        (b"{a:" * 300 + b"1" + b"}" * 300, "Nested too deeply."),
        (b'{"a": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_says_what_is_wrong_and_where(body: bytes, reason: str):
    with pytest.raises(InvalidArgument) as raised:
        parse(body)
    assert raised.value.message.startswith("Invalid JSON payload received. ")
    assert reason in raised.value.message
    (violation,) = raised.value.details[0].field_violations
    assert (violation.field, violation.description) == ("", raised.value.message)


def test_shows_a_long_line_around_the_fault():
    with pytest.raises(InvalidArgument) as raised:
        parse(b'{"a": "' + b"x" * 10_000 + b'" "b": 1}')
    _, shown, caret = raised.value.message.split("\n")
    assert len(shown) < 200
    assert shown[len(caret) - 1 :] == '"b": 1}'
