"""Tokens in, text out as soon as it is certain."""

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"
"""What bytes decode to that are not, or not yet, a character."""

LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character, and so the most tokens that one is spread over."""


class TextStream:
    """The text of one answer.

    Text is held back while later tokens could change what becomes of it: the first bytes of a character, the
    first letters of the opening that is stripped, the first letters of a stop sequence.

    Args:
        tokenizer: The model's.
        opening: Text that opens an answer and is not part of it; stripped once, when it is there.
        stop_sequences: Texts that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, opening: str, stop_sequences: Sequence[str]) -> None:
        self._characters = _Characters(tokenizer)
        self._opening = opening
        self._stops = [stop for stop in stop_sequences if stop]
        self._held = ""
        self.stopped = False
        """Whether a stop sequence has been found; what follows it is of no use."""

    def push(self, token: int) -> str:
        """Take a token and return the text that has become certain, often none."""
        return self._certain(self._characters.push(token))

    def flush(self) -> str:
        """Return what was held back, at the end of the tokens."""
        text = self._certain(self._characters.flush()) + self._held
        self._held = ""
        return text

    def _certain(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        if self._opening:
            if len(self._held) < len(self._opening) and self._opening.startswith(self._held):
                return ""
            self._held = self._held.removeprefix(self._opening)
            self._opening = ""
        # The one that is whole first: what comes after it must not matter, wherever the tokens' borders are.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        certain = min(found)[1] if found else len(self._held) - self._stop_begun()
        text, self._held = self._held[:certain], "" if found else self._held[certain:]
        return text

    def _stop_begun(self) -> int:
        """Return how many characters at the end could begin a stop sequence."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class _Characters:
    """Whole characters out of tokens.

    Not tokenizers' DecodeStream: it raises on bytes that are no UTF-8, which models do write, and what it
    holds back at the end is lost.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        """The tokens of the newest text that was returned: a token's text depends on those before it."""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        self._pending.append(token)
        unfinished = self._decode([*self._shown, *self._pending]).endswith(UNFINISHED)
        return "" if unfinished and len(self._pending) < LONGEST_CHARACTER else self.flush()

    def flush(self) -> str:
        before = self._decode(self._shown)
        text = self._decode([*self._shown, *self._pending])
        # Of a run of bytes that is no UTF-8, the decoder changes even the valid part that has been returned.
        new = text[len(before) :] if text.startswith(before) else self._decode(self._pending)
        if new:
            self._shown, self._pending = self._pending, []
        return new

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
