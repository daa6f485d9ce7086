"""What a runner asks of a base model: the passes over tokens of many requests, each with its adapter or none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tunesmith.engines.lora import Adapter
from tunesmith.engines.scores import Scores


class Slot(Protocol):
    """The keys and values of one request."""

    @property
    def length(self) -> int:
        """Tokens that they are of."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one request.

    Attributes:
        slot: What it has seen.
        tokens: Ids, at least one.
        adapter: None for the base model itself.
        wanted: Of how many of the last tokens the hidden states are wanted.
        guessed: How many of the last tokens may be taken back.
    """

    slot: Any
    tokens: Sequence[int]
    adapter: Adapter | None
    wanted: int = 1
    guessed: int = 0


class Network(Protocol):
    """A base model in memory. All but `prepare` is called on one thread.

    Attributes:
        longest: Tokens that it can hold of one request.
        linears: Path of each linear layer that an adapter may change, with its numbers of inputs and outputs.
        step: A pass takes as long for so many tokens as for one, and a token is the same to the last bit whether
            it comes alone or with others; 1 where that is not so.
        recalls: A slot recalls what others have seen of prompts longer than this; 0 where none ever does.
    """

    longest: int
    step: int
    recalls: int
    linears: dict[str, tuple[int, int]]

    def prepare(self, adapter: Adapter) -> Adapter:
        """Bring an adapter into the layout that passes read; on the thread of whoever loads it.

        Returns:
            What is to be kept of it, and named in pieces.
        """

    def open(self, most: int) -> Slot | None:
        """Return an empty slot for up to `most` tokens; None while others hold the memory."""

    def close(self, slot: Any) -> None:
        """Give a slot's memory back."""

    def recall(self, slot: Any, prompt: Sequence[int], adapter: Adapter | None, caller: str) -> None:
        """Let an empty slot have seen what is known of a prompt's beginning; the last token never is.

        What it sees from then on becomes known, and stays so for as long as there is room; to its caller alone, as
        others could tell by the time it takes what they ask.
        """

    def take_back(self, slot: Any, count: int) -> None:
        """Let a slot not have seen the last of the tokens that were guessed in the last pass."""

    def blocks(self) -> tuple[int, int]:
        """Return how many blocks hold keys and values, and how many there are; 0 where memory has none."""

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run new tokens of different slots, which then have seen them.

        Returns:
            The wanted last hidden states, (tokens, size), in the pieces' order.
        """

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of all words, float32 (rows, words), of hidden states (rows, size)."""

    def scored(self, hidden: Tensor, *, whole: bool) -> Scores:
        """Return the scores of hidden states (rows, size); `whole` if all of a row will be asked for."""
