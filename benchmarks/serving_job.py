"""What one process of the serving benchmark is asked to do and what it answers: JSON that all sides read."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

Tokens = list[int]
WARM_UP = 4  # tokens of each answer


@dataclass(frozen=True)
class Ask:
    """One stream's question.

    Attributes:
        text: The input, as our API takes it.
        prompt: The same as token ids, as the engine makes them of it.
        adapter: Which of the job's adapters answers.
    """

    text: str
    prompt: Tokens
    adapter: int


@dataclass(frozen=True)
class Job:
    """Questions that are asked at the same moment, each answered with the same number of tokens.

    Attributes:
        asks: One a stream.
        warm: What is asked first, a burst after the other, for 4 tokens each: so all adapters are loaded, and
            each size of prompt and of batch has been computed.
        outputs: Tokens of each answer; what would end it earlier is ignored.
        threads: Of each side.
        bf16: Whether the weights are in bfloat16, as we run them where the processor multiplies that.
        weights: The base model's directory.
        adapters: The adapters' directories, in PEFT's format.
        artifacts: Our store, which these directories are part of.
        gguf: The first adapter merged into the base model, for llama.cpp; empty for other sides.
    """

    asks: list[Ask]
    warm: list[list[Ask]]
    outputs: int
    threads: int
    bf16: bool
    weights: str
    adapters: list[str]
    artifacts: str
    gguf: str

    @property
    def longest(self) -> int:
        """The most tokens that a stream has, prompt and answer."""
        return max(len(ask.prompt) for burst in [self.asks, *self.warm] for ask in burst) + self.outputs

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a job from a file."""
        fields = json.loads(path.read_text("utf-8"))
        asks = [Ask(**ask) for ask in fields["asks"]]
        return cls(**fields | {"asks": asks, "warm": [[Ask(**ask) for ask in burst] for burst in fields["warm"]]})

    def write(self, path: Path) -> None:
        """Write the job to a file."""
        path.write_text(json.dumps(asdict(self)), "utf-8")


@dataclass(frozen=True)
class Answer:
    """What came of one stream; seconds from the moment at which all of them were asked.

    Attributes:
        first: When its first token, or the first text of it, was there.
        last: When it was whole.
        tokens: How many it has.
        said: Its token ids, or its text where a side tells no ids.
    """

    first: float
    last: float
    tokens: int
    said: Tokens | str


@dataclass(frozen=True)
class Result:
    """How a job went.

    Attributes:
        answers: One a stream, in the job's order.
        peak_bytes: The most memory that the side's processes had in RAM, in sum.
        versions: Of the packages that did it.
    """

    answers: list[Answer]
    peak_bytes: int
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a result from a file."""
        fields = json.loads(path.read_text("utf-8"))
        return cls(**fields | {"answers": [Answer(**answer) for answer in fields["answers"]]})

    def write(self, path: Path) -> None:
        """Write the result to a file."""
        path.write_text(json.dumps(asdict(self)), "utf-8")


def ask_all(asks: list[Ask], ask: Callable[[Ask], Iterator[tuple[int, Tokens | str]]]) -> list[Answer]:
    """Ask every question at the same moment, each from a thread of its own.

    Args:
        asks: The questions.
        ask: Asks one; yields how many tokens there are so far, with what has come since the last time.
    """
    start = threading.Barrier(len(asks))

    def one(question: Ask) -> tuple[float, Answer]:
        start.wait()
        began = time.perf_counter()
        first = last = 0.0
        tokens, said = 0, []
        for so_far, piece in ask(question):
            last = time.perf_counter()
            first, tokens = first or last, so_far
            said.append(piece)
        return began, Answer(first, last, tokens, _joined(said))

    with ThreadPoolExecutor(len(asks)) as threads:
        done = [*threads.map(one, asks)]
    began = min(at for at, _ in done)
    return [Answer(answer.first - began, answer.last - began, answer.tokens, answer.said) for _, answer in done]


def _joined(pieces: list[Tokens | str]) -> Tokens | str:
    if any(isinstance(piece, str) for piece in pieces):
        return "".join(piece for piece in pieces if isinstance(piece, str))
    return [token for piece in pieces if isinstance(piece, list) for token in piece]
