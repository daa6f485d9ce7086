"""What the service asks of an engine."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import Turn


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most probable token each time.
        top_p: Keep the smallest set of tokens whose probability sum is at least this.
        top_k: Keep this many most probable tokens.
        max_output_tokens: End with MAX_TOKENS after this many.
        seed: Same seed, same text, whatever else the engine serves meanwhile, up to the rounding of the
            weights' number format; None draws one. Each further candidate takes the next higher one.
        stop_sequences: Texts that end the answer and are not part of it.
        candidates: How many answers are made.
    """

    temperature: float
    top_p: float
    top_k: int
    max_output_tokens: int
    seed: int | None = None
    stop_sequences: tuple[str, ...] = ()
    candidates: int = 1


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer, as soon as its text is certain.

    Attributes:
        text: The text to append; may be empty in the last chunk.
        prompt_tokens: Length of the prompt.
        output_tokens: Tokens generated so far, the one that ended the answer not counted.
        finish_reason: `Candidate.FinishReason` on the candidate's last chunk, 0 before.
        index: The candidate that it belongs to, from 0.
    """

    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: int = 0
    index: int = 0


class Engine(Protocol):
    """Runs base models, with or without an adapter."""

    def generate(
        self,
        model: BaseModel,
        adapter: str | None,
        turns: Sequence[Turn],
        sampling: Sampling,
        gone: threading.Event,
        caller: str = "",
    ) -> Iterator[Chunk]:
        """Yield an answer's chunks; those of several candidates as they come, each candidate's in order.

        Args:
            model: The base model.
            adapter: Path of a published adapter in the artifact store; None for the base model itself.
            turns: The conversation, ending with a user's turn; a system instruction comes first.
            sampling: How tokens are chosen.
            gone: Set when nobody waits for the answer any more; closing the iterator says the same.
            caller: The account that asks; when more ask than fit, accounts take turns.

        Raises:
            InvalidArgument: The prompt is longer than the model takes.
            FailedPrecondition: The weights are not on this machine, or the adapter belongs to other weights.
            Internal: The adapter does not answer as it did when it was trained.
            Cancelled: `gone` was set.
            Unavailable: The engine is closing.
        """

    def count_tokens(self, model: BaseModel, adapter: str | None, turns: Sequence[Turn]) -> int:
        """Return the length of the prompt that `generate` would make."""

    def embed(
        self, model: BaseModel, texts: Sequence[str], gone: threading.Event, caller: str = ""
    ) -> list[list[float]]:
        """Return a vector of length 1 for each text: the mean of the model's last hidden states.

        Raises:
            InvalidArgument: A text is longer than the model takes.
            FailedPrecondition: The weights are not on this machine.
            Cancelled: `gone` was set.
            Unavailable: The engine is closing.
        """

    def preload(self, model: BaseModel) -> None:
        """Load a base model before the first request asks for it."""

    def close(self) -> None:
        """Stop; requests that are under way end with Unavailable."""
