"""What an answer must be: JSON of a schema, or one of some texts, kept token by token."""

import json
import re
import threading
from collections import OrderedDict
from pathlib import Path

import llguidance
import numpy as np
from numpy.typing import NDArray

from tunesmith.engines.base import Constraint
from tunesmith.errors import InvalidArgument

LONGEST = 65_536
"""Characters of a schema: more than people write, and compiled in some 20 ms."""

COMPILED = 64
"""Compiled constraints that are kept, least recently used out first."""

WHITESPACE = r" |\n[ \t]{0,16}"
"""Between JSON's tokens, at most once: models of this size that may write more, write it until they are cut."""

ANY_LINES = {"whitespace_pattern": WHITESPACE}
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_LIMITS = llguidance.LLParserLimits(step_lexer_fuel=50_000)
"""A pattern that would explode ends the answer after some milliseconds, and does not stall the batch."""


class Matcher:
    """Follows one answer; for one thread at a time.

    Args:
        matcher: llguidance's, at the beginning of an answer.
        vocabulary: How many tokens it knows; a model may have more, which are of no use.
        constraint: What the answer must be.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int, constraint: Constraint) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._constraint = constraint

    def allows(self, token: int) -> bool:
        """Return whether a token may come next: a microsecond, where a mask may take a millisecond."""
        # llguidance never comes back from a token that it does not know.
        return token < self._vocabulary and self._matcher.validate_tokens([token]) == 1

    def allowed(self, bits: NDArray[np.int32]) -> None:
        """Write which tokens of a vocabulary may come next, a bit each; all, once it has failed."""
        words = (self._vocabulary + 31) // 32
        # A tokenizer may have more tokens than the model has scores, and the matcher writes all of them.
        mask = bits if len(bits) >= words else np.empty(words, np.int32)
        mask[words:] = 0
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, words * mask.itemsize)
        if mask is not bits:
            bits[:] = mask[: len(bits)]
        if self._matcher.is_error():
            bits[:] = -1

    def take(self, token: int) -> None:
        """Go on by a token of the answer that is allowed."""
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether the answer is whole and nothing can follow it."""
        return self._matcher.is_stopped()

    @property
    def failed(self) -> InvalidArgument | None:
        """Why the answer cannot go on: the constraint became too complex on the way."""
        if not self._matcher.is_error():
            return None
        reason = f"is too complex to follow: {_in_short(self._matcher.get_error())} Simplify its patterns."
        return InvalidArgument.at([(self._constraint.field, reason)])


class Constraints:
    """Compiles constraints, and keeps what it has compiled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._vocabularies: dict[tuple[Path, frozenset[int]], llguidance.LLTokenizer] = {}
        self._compiled: OrderedDict[tuple[Path, frozenset[int], str], llguidance.LLMatcher] = OrderedDict()

    def matcher(
        self, constraint: Constraint, opening: str, tokenizer: Path, stop_tokens: frozenset[int]
    ) -> Matcher:
        """Return what follows an answer from its beginning.

        Args:
            constraint: What the answer must be.
            opening: Text that opens every answer of the model.
            tokenizer: The model's tokenizer.json. The first time it takes seconds.
            stop_tokens: Ids that end an answer.

        Raises:
            InvalidArgument: No answer can be held to it; names the constraint's field.
        """
        grammar = grammar_of(constraint, opening)
        key = (tokenizer, stop_tokens, grammar)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._compiled.move_to_end(key)
        vocabulary = self._vocabulary(tokenizer, stop_tokens)
        if compiled is None:
            compiled = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
            if compiled.is_error():
                raise InvalidArgument.at([(constraint.field, _reason(compiled.get_error()))])
            with self._lock:
                self._compiled[key] = compiled
                while len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), vocabulary.vocab_size, constraint)

    def _vocabulary(self, tokenizer: Path, stop_tokens: frozenset[int]) -> llguidance.LLTokenizer:
        with self._building:
            key = tokenizer, stop_tokens
            if key not in self._vocabularies:
                self._vocabularies[key] = llguidance.LLTokenizer(
                    str(tokenizer),
                    eos_token=sorted(stop_tokens),
                    slices=llguidance.LLTokenizer.json_slices(),
                )
            return self._vocabularies[key]


def grammar_of(constraint: Constraint, opening: str, *, one_line: bool = False) -> str:
    """Return a constraint in llguidance's language.

    Args:
        constraint: What the answer must be.
        opening: Text that opens every answer.
        one_line: Leave no choice of white space: older versions let it repeat.
    """
    if constraint.choices:
        return "start: " + " | ".join(json.dumps(opening + choice) for choice in constraint.choices)
    schema = json.dumps({**(constraint.schema or {}), "x-guidance": ONE_LINE if one_line else ANY_LINES})
    if len(schema) > LONGEST:
        reason = f"must be at most {LONGEST:,} characters long as JSON, not {len(schema):,}"
        raise InvalidArgument.at([(constraint.field, reason)])
    begin = f"{json.dumps(opening)} " if opening else ""
    return f"start: {begin}json\njson: %json {schema}"


def _reason(error: str) -> str:
    """Return llguidance's words for what is wrong with a schema, with what to do about it."""
    text = _in_short(error)
    if "oneOf constraints" in text:
        return "oneOf is only supported where no value can match two of its schemas; use anyOf."
    if text.startswith("Unimplemented keys: "):
        keys = text.removeprefix("Unimplemented keys: ")
        return f"has keywords that answers cannot be held to: {keys}. Leave them out."
    return f"cannot be used: {text}"


def _in_short(error: str) -> str:
    """Return an error without its place in the grammar, which the caller has not written."""
    text = re.split(r"<state>|\n *1 \| st", error)[0]
    text = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: ", "", text)
    return " ".join(text.split())[:400]
