"""JSON text as people write it: strict, or with trailing commas, single quotes, bare keys and comments."""

import json
import re
from typing import Any, NoReturn

import pyjson5

from tunesmith.errors import InvalidArgument

MAX_DEPTH = 200
_EXCERPT = 60  # characters of the bad line to show before the caret
_NEAR = re.compile(r" (?:starting )?near (\d+)")
_CODE_POINT = re.compile(r"U\+([0-9a-f]{4,6})")
_GRAMMAR = {
    "b'colon'": "':'",
    "b'comma'": "','",
    "b'JSON5Value'": "a value",
    "b'IdentifierStart'": "a name",
    "b'NumericLiteral'": "number",
    "b'object'": "object",
    "b'array'": "array",
    "b'string'": "string",
    "b'comment'": "comment",
}


def parse(body: bytes) -> Any:
    """Return the value that `body` spells; an empty body is an empty object.

    Raises:
        InvalidArgument: The body is not JSON, however leniently read; says where.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(f"The body is not UTF-8: byte {error.start} is {error.reason}.")
    if not text or text.isspace():
        return {}
    try:
        return _STRICT.decode(text)
    except RecursionError:
        _refuse("Nested too deeply.")
    except ValueError:
        return _parse_leniently(text)


def _parse_leniently(text: str) -> Any:
    try:
        return pyjson5.decode(text, MAX_DEPTH)
    except pyjson5.Json5NestingTooDeep:
        _refuse("Nested too deeply.")
    except pyjson5.Json5DecoderException as error:
        _refuse(_explain(str(error.args[0]), text, error.args[2]))
    except ValueError as error:  # a number of thousands of digits
        _refuse(f"{error}.")


def _no_constant(name: str) -> NoReturn:
    # The lenient parser reads NaN too; the message reader then names the field.
    raise ValueError(name)


_STRICT = json.JSONDecoder(parse_constant=_no_constant)


def _refuse(reason: str) -> NoReturn:
    message = f"Invalid JSON payload received. {reason}"
    raise InvalidArgument.at([("", message)], message) from None


def _explain(reason: str, text: str, found: str | None) -> str:
    """Turn the parser's offset into line, column and a caret under the place."""
    for symbol, words in _GRAMMAR.items():
        reason = reason.replace(symbol, words)
    reason = _CODE_POINT.sub(lambda match: repr(chr(int(match[1], 16))), reason)
    near = _NEAR.search(reason)
    if near is None:
        return f"{reason}."
    offset = min(max(int(near[1]) - 1, 0), len(text))
    if found is not None:  # the parser may point a few blanks before the character
        offset = max(text.find(found, offset), offset)
    start = text.rfind("\n", 0, offset) + 1
    line, column = text.count("\n", 0, offset) + 1, offset - start + 1
    shown = text[max(start, offset - _EXCERPT) : offset + _EXCERPT].partition("\n")[0]
    caret = " " * min(offset - start, _EXCERPT) + "^"
    reason = _NEAR.sub(f" at line {line}, column {column}", reason)
    return f"{reason}.\n{shown}\n{caret}"
