"""The single place where prompts are built, for training and serving alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from tokenizers import Tokenizer


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; a tuning input is one user turn, a system instruction the first turn."""

    role: Literal["system", "user", "model"]
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
        before_system, after_system: Around a system instruction, which comes before the first input.
        before, after: Around a user's turn; the model writes after `after`.
        answer: Text that opens an answer and is not part of it, such as the space after a colon: with it the
            answer's first word is the token that it is in running text.
        end: What the model ends its answer with.
        between: Between an answer and the next user turn.
        stops: Tokens that end generation.
    """

    start: tuple[Piece, ...]
    before_system: tuple[Piece, ...]
    after_system: tuple[Piece, ...]
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    answer: str
    end: Special
    between: tuple[Piece, ...]
    stops: tuple[Special, ...]

    def prompt(self, tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
        """Return the token ids that the model continues with its answer."""
        return self.conversation(tokenizer, turns)[0]

    def conversation(self, tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a prompt's token ids, and where in them its answers begin and end.

        Each answer is encoded apart from what surrounds it: so it is the tokens that the model wrote.
        """
        tokens: list[int] = []
        answers: list[tuple[int, int]] = []
        pieces = [*self.start]
        for turn in turns:
            if turn.role == "system":
                pieces += [*self.before_system, turn.text, *self.after_system]
            elif turn.role == "user":
                pieces += [*self.before, turn.text, *self.after]
            else:
                tokens += _encode(tokenizer, pieces)
                start = len(tokens)
                tokens += self.output(tokenizer, turn.text)
                answers.append((start, len(tokens)))
                pieces = [*self.between]
        tokens += _encode(tokenizer, pieces)
        return tokens, answers

    def opening(self, tokenizer: Tokenizer, system: str | None = None) -> list[int]:
        """Return the token ids before a first user turn's text."""
        instruction = () if system is None else (*self.before_system, system, *self.after_system)
        return list(_encode(tokenizer, [*self.start, *instruction, *self.before]))

    def passage(self, tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
        """Return the token ids of a text that nobody is asked to answer, and where in them it begins."""
        start = list(_encode(tokenizer, self.start))
        return [*start, *_encode(tokenizer, [text])], len(start)

    def output(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Return the token ids of an answer with its end."""
        return list(_encode(tokenizer, [self.answer + text, self.end]))

    def stop_tokens(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the ids that end generation."""
        return frozenset(_token(tokenizer, stop) for stop in self.stops)


FORMATS: dict[str, PromptFormat] = {
    # For models that only continue text. Of ten formats tried on the tutorial's rows this one generalised
    # best and came out right with every seed. Nor does a system instruction, which none of those rows had,
    # keep the model from its job, with a label or, as here, without one.
    "labelled": PromptFormat(
        start=(Special("<bos>"),),
        before_system=(),
        after_system=("\n",),
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
        before_system=(),
        after_system=("\n\n",),
        before=(),
        after=(),
        answer="",
        end=Special("<eos>"),
        between=("\n",),
        stops=(Special("<eos>"), Special("<end_of_turn>")),
    ),
    "chatml": PromptFormat(
        start=(),
        before_system=(Special("<|im_start|>"), "system\n"),
        after_system=(Special("<|im_end|>"), "\n"),
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
