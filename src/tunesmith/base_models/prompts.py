"""The single place where prompts are built, for training and serving alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; a tuning input is one user turn."""

    role: Literal["user", "model"]
    text: str


@dataclass(frozen=True)
class Special:
    """A control token. Text never becomes one, whatever it spells."""

    token: str


Piece = str | Special


@dataclass(frozen=True)
class PromptFormat:
    """How turns become tokens.

    Attributes:
        start: What opens every prompt.
        before, after: Around a user's turn; the model writes after `after`.
        answer: Text that opens an answer and is not part of it, such as the space after a colon: with it the
            answer's first word is the token that it is in running text.
        end: What the model ends its answer with.
        between: Between an answer and the next user turn.
        stops: Tokens that end generation.
    """

    start: tuple[Piece, ...]
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    answer: str
    end: Special
    between: tuple[Piece, ...]
    stops: tuple[Special, ...]

    def prompt(self, tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
        """Return the token ids that the model continues with its answer."""
        pieces = [*self.start]
        for turn in turns:
            if turn.role == "user":
                pieces += [*self.before, turn.text, *self.after]
            else:
                pieces += [self.answer + turn.text, self.end, *self.between]
        return list(_encode(tokenizer, pieces))

    def opening(self, tokenizer: Tokenizer) -> list[int]:
        """Return the token ids before a first user turn's text."""
        return list(_encode(tokenizer, [*self.start, *self.before]))

    def output(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Return the token ids of an answer with its end."""
        return list(_encode(tokenizer, [self.answer + text, self.end]))

    def stop_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids that end generation."""
        return frozenset(_token(tokenizer, stop) for stop in self.stops)


FORMATS: dict[str, PromptFormat] = {
    # For models that only continue text. Of ten formats tried on the tutorial's rows this one generalised
    # best and came out right with every seed.
    "labelled": PromptFormat(
        start=(Special("<bos>"),),
        before=("Input: ",),
        after=("\nOutput:",),
        answer=" ",
        end=Special("<eos>"),
        between=("\n",),
        stops=(Special("<eos>"), Special("<end_of_turn>")),
    ),
    # For such a model untuned: it goes on where the text ends.
    "plain": PromptFormat(
        start=(Special("<bos>"),),
        before=(),
        after=(),
        answer="",
        end=Special("<eos>"),
        between=("\n",),
        stops=(Special("<eos>"), Special("<end_of_turn>")),
    ),
    "chatml": PromptFormat(
        start=(),
        before=(Special("<|im_start|>"), "user\n"),
        after=(Special("<|im_end|>"), "\n", Special("<|im_start|>"), "assistant\n"),
        answer="",
        end=Special("<|im_end|>"),
        between=("\n",),
        stops=(Special("<|im_end|>"), Special("<|endoftext|>")),
    ),
}
"""By the name that an adapter's manifest records. A format never changes: a changed one gets a new name."""


def _encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Iterator[int]:
    """Yield the ids; neighbouring texts are joined first, as tokens may span them."""
    for is_text, run in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            yield from tokenizer.encode("".join(map(str, run)), add_special_tokens=False).ids
        else:
            yield from (_token(tokenizer, piece) for piece in run if isinstance(piece, Special))


def _token(tokenizer: Tokenizer, special: Special) -> int:
    token_id = tokenizer.token_to_id(special.token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {special.token}: the model needs another prompt_format")
    return int(token_id)
