"""One answer that an engine makes: what is asked, what has come of it, and what its reader hears."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from tunesmith import protos
from tunesmith.engines.drafts import Drafter
from tunesmith.engines.lora import Adapter
from tunesmith.engines.sampling import Chosen, Sampler
from tunesmith.errors import ApiError, Cancelled


@dataclass(frozen=True)
class Ended:
    """How a request ended.

    Attributes:
        finish_reason: `Candidate.STOP` or `MAX_TOKENS`.
    """

    finish_reason: int


@dataclass(frozen=True)
class Event:
    """What has happened to a request.

    Attributes:
        index: Which of those that share a queue.
        tokens: Its next tokens.
        end: How it ended, if it did.
    """

    index: int
    tokens: Sequence[Chosen]
    end: Ended | ApiError | None = None


Events = SimpleQueue[Event]


@dataclass(eq=False)
class Request:
    """One answer to make.

    Attributes:
        prompt: Token ids, at least one.
        adapter: None for the base model itself.
        sampler: How tokens are chosen.
        drafter: Guesses them.
        max_output_tokens: When to end, if no stop token comes first.
        stop_tokens: Ids that end the answer.
        gone: Set when nobody waits for the answer any more.
        events: The answer's tokens, some at a time, and how it ended.
        index: Which of the requests that share `events` it is.
        caller: Who asks; callers take turns.
        abandoned: Set when the reader has stopped reading.
        tokens: Ids generated so far.
        untold: The last ones, of which the reader has not heard.
        slot: Its keys and values, while it is under way.
        since: When it came, in seconds of the admission's clock.
        begun: When its turn came.
    """

    prompt: Sequence[int]
    adapter: Adapter | None
    sampler: Sampler
    drafter: Drafter
    max_output_tokens: int
    stop_tokens: frozenset[int]
    gone: threading.Event
    events: Events = field(default_factory=SimpleQueue)
    index: int = 0
    caller: str = ""
    abandoned: bool = False
    ended: bool = False
    tokens: list[int] = field(default_factory=list)
    untold: list[Chosen] = field(default_factory=list)
    slot: Any = None
    since: float = 0.0
    begun: float = 0.0

    def end(self, event: Ended | ApiError) -> None:
        """Say how the request ended, once."""
        if not self.ended:
            self.ended = True
            self.events.put(Event(self.index, self.untold, event))

    def take(self, chosen: Chosen, longest: int) -> None:
        """Hand out the next token; `longest` is how many tokens the model can hold."""
        if failed := self.sampler.failed:
            return self.end(failed)
        if chosen.token in self.stop_tokens:
            return self.end(Ended(protos.Candidate.STOP))
        self.tokens.append(chosen.token)
        self.sampler.take(chosen.token)
        self.drafter.take(chosen.token)
        self.untold.append(chosen)
        if self.sampler.finished:
            self.end(Ended(protos.Candidate.STOP))
        elif self.left(longest) <= 0:
            self.end(Ended(protos.Candidate.MAX_TOKENS))
        return None

    def tell(self, most: int) -> None:
        """Let the reader hear of its tokens, if it has not heard of more than so many, or of the first."""
        if self.untold and not self.ended and (len(self.untold) > most or len(self.untold) == len(self.tokens)):
            self.events.put(Event(self.index, self.untold))
            self.untold = []

    def left(self, longest: int) -> int:
        """Return how many tokens may still come; `longest` is how many tokens the model can hold."""
        return min(self.max_output_tokens, longest - len(self.prompt)) - len(self.tokens)

    def leave(self) -> bool:
        """Return whether the request has ended or nobody waits for it."""
        if self.abandoned or self.gone.is_set():
            self.end(Cancelled("The client went away."))
        return self.ended
