"""What the service asks of an engine."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import Turn


@dataclass(frozen=True)
class Constraint:
    """What an answer must be.

    Attributes:
        field: Where it stands in the request, for errors.
        schema: The JSON Schema of the JSON text that is the answer; an empty one is any JSON value.
        choices: Texts, one of which is the answer; none when a schema says what it is.
    """

    field: str
    schema: Mapping[str, Any] | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    A constraint and penalties change the scores before top_k, top_p and temperature are applied to them.

    Attributes:
        temperature: 0 takes the most probable token each time.
        top_p: Keep the smallest set of tokens whose probability sum is at least this.
        top_k: Keep this many most probable tokens.
        max_output_tokens: End with MAX_TOKENS after this many.
        seed: Same seed, same text, whatever else the engine serves meanwhile, up to the rounding of the
            weights' number format; None draws one. Each further candidate takes the next higher one.
        stop_sequences: Texts that end the answer and are not part of it.
        candidates: How many answers are made.
        presence_penalty: Subtracted from the scores of the tokens that the answer has already.
        frequency_penalty: Subtracted once for each time that the answer has a token.
        logprobs: How many of the most probable tokens are told at each place of the answer, beside the chosen
            one; None tells neither.
        constraint: What the answer must be; None leaves it free.
    """

    temperature: float
    top_p: float
    top_k: int
    max_output_tokens: int
    seed: int | None = None
    stop_sequences: tuple[str, ...] = ()
    candidates: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the logarithm of the probability that the model gave it.

    It is the model's own: at temperature 1, before penalties and without the constraint.
    """

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Place:
    """A place of an answer: the token that was chosen, and the most probable ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer, as soon as its text is certain.

    Attributes:
        text: The text to append; may be empty in the last chunk.
        prompt_tokens: Length of the prompt.
        output_tokens: Tokens generated so far; the model's own end of the answer is not counted.
        finish_reason: `Candidate.FinishReason` on the candidate's last chunk, 0 before.
        index: The candidate that it belongs to, from 0.
        places: The tokens since the candidate's last chunk, when they were asked for.
    """

    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: int = 0
    index: int = 0
    places: tuple[Place, ...] = ()


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
            InvalidArgument: The prompt is longer than the model takes, or no answer can be held to the constraint.
            FailedPrecondition: The weights are not on this machine, or the adapter belongs to other weights.
            Internal: The adapter does not answer as it did when it was trained.
            ResourceExhausted: Too many wait, or this one would for too long.
            Cancelled: `gone` was set.
            Unavailable: The engine is closing, or the answer's turn did not come in time.
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
            ResourceExhausted: Too many wait.
            Cancelled: `gone` was set.
            Unavailable: The engine is closing.
        """

    def preload(self, model: BaseModel) -> None:
        """Load a base model before the first request asks for it."""

    def close(self) -> None:
        """Stop; requests that are under way end with Unavailable."""
