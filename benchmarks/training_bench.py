"""Runs one side of the training benchmark in a process of its own, and makes figures of what it answers."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from training_job import Job, Result
from training_rate import Products
from training_rows import Row
from tunesmith import protos
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.device import compute_dtype
from tunesmith.base_models.prompts import FORMATS
from tunesmith.cli import ALLOCATOR, TRAINING_SPINS
from tunesmith.config import Settings
from tunesmith.terminal import fetch_weights
from tunesmith.training import examples

HERE = Path(__file__).parent
TRL_PYTHON = HERE.parent / ".bench" / "trl" / "bin" / "python"
RANK = 16
LEARNING_RATE = 0.001


@dataclass(frozen=True)
class Side:
    """Who trains.

    Attributes:
        name: In the table.
        command: Its Python and script.
        environment: What it needs of variables.
    """

    name: str
    command: tuple[str, str]
    environment: dict[str, str]


# As `tunesmith worker` sets it; TRL gets it too: without it any process that wants a core stalls every product.
SPIN = {"GOMP_SPINCOUNT": TRAINING_SPINS}
ALLOCATION = {"GLIBC_TUNABLES": ALLOCATOR}
QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore"}
OURS = Side("ours", (sys.executable, str(HERE / "training_ours.py")), SPIN | ALLOCATION)
TRL = Side("TRL", (str(TRL_PYTHON), str(HERE / "training_trl.py")), SPIN | QUIET)
TRL_WITH_OURS = Side("TRL*", TRL.command, TRL.environment | ALLOCATION)
"""TRL with the allocator settings of our worker, which nobody is told to give it but which do it good."""


class Task:
    """One job's rows as both sides must see them, and the arithmetic of its figures.

    Attributes:
        seen: Each row's token ids, and how many of them are targets.
        sequence: The rows' numbers in the order in which they are trained on.
    """

    def __init__(self, bench: "Bench", name: str, rows: Sequence[Row], batch_size: int, epochs: int = 1) -> None:
        self._bench, self._name, self._given = bench, name, [*rows]
        self._batch_size, self._epochs = batch_size, epochs
        self._rows = bench.tokenize(rows)
        self.seen = [(row.prompt + row.output, row.learnt) for row in self._rows]

    def sequence(self, seed: int) -> list[int]:
        """Return the rows' numbers in the order in which they are trained on."""
        return [*islice(examples.order(len(self._rows), seed), len(self._rows) * self._epochs)]

    def job(self, seed: int, steps: int = 0, bf16: bool | None = None) -> Job:
        """Return what a side is asked to do."""
        tokenizer = self._bench.tokenizer
        return Job(
            rows=self._given,
            texts=[(tokenizer.decode(row.prompt), tokenizer.decode(row.output)) for row in self._rows],
            sequence=self.sequence(seed),
            batch_size=self._batch_size,
            epochs=self._epochs,
            learning_rate=LEARNING_RATE,
            seed=seed,
            steps=steps,
            threads=self._bench.threads,
            bf16=self._bench.bf16 if bf16 is None else bf16,
            weights=str(self._bench.weights.path),
            adapter=str(self._bench.folder / f"{self._name}-{seed}"),
        )

    def tokens(self, seed: int, steps: int) -> tuple[int, int]:
        """Return how many tokens so many steps train on, padding not counted, and how many of them are targets."""
        done = self.sequence(seed)[: steps * self._batch_size]
        return sum(len(self.seen[row][0]) for row in done), sum(self.seen[row][1] for row in done)

    def last_quarter(self, seed: int, losses: Sequence[float]) -> float:
        """Return the mean loss of the last quarter's target tokens: of the tutorial's job, its last epoch."""
        first = len(losses) - max(1, len(losses) // 4)
        counts = [self.tokens(seed, step + 1)[1] - self.tokens(seed, step)[1] for step in range(len(losses))]
        weighted = sum(loss * count for loss, count in zip(losses[first:], counts[first:], strict=True))
        return weighted / sum(counts[first:])


@dataclass(frozen=True)
class Figures:
    """What one run gave."""

    side: str
    seed: int
    result: Result
    tokens: int
    targets: int
    final_loss: float
    rate: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of rows, padding not counted."""
        return self.tokens / self.result.seconds


class Bench:
    """The machine, the base model, and a scratch folder for jobs and results."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.settings = Settings.load(data_dir=folder / "data", threads=threads)
        self.model = Catalog.load(self.settings).default
        self.weights = fetch_weights(Console(stderr=True), self.model, self.settings.cache_dir)
        self.tokenizer = self.weights.tokenizer()
        self.bf16 = compute_dtype(torch.device("cpu")) is torch.bfloat16
        self.products = Products.of(self.weights.path, RANK)
        self.rates: list[float] = []
        self.versions: dict[str, str] = {}

    def tokenize(self, rows: Sequence[Row]) -> list[examples.Row]:
        """Return the rows as the worker makes them."""
        pairs = [protos.TuningExample(text_input=text, output=output) for text, output in rows]
        form, limit = FORMATS[self.model.prompt_format], self.model.tuning_token_limit
        return examples.tokenize(protos.TuningExamples(examples=pairs), form, self.tokenizer, limit)

    def run(self, side: Side, task: Task, seed: int, steps: int = 0, bf16: bool | None = None) -> Figures:
        """Let a side do a job in a process of its own, check what it saw, and print a line.

        Raises:
            SystemExit: It failed, or saw other tokens or targets than the other side.
        """
        asked, answer = self.folder / "job.json", self.folder / "result.json"
        job = task.job(seed, steps, bf16)
        job.write(asked)
        rate = self._rate() if bf16 is None else 0.0
        done = subprocess.run(
            [*side.command, str(asked), str(answer)],
            env=os.environ | side.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{side.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        result = Result.read(answer)
        check_seen(side.name, task, result)
        self.versions |= result.versions
        figures = Figures(
            side.name,
            seed,
            result,
            *task.tokens(seed, len(result.losses)),
            task.last_quarter(seed, result.losses),
            rate,
        )
        print(self._line(figures), flush=True)
        return figures

    def _rate(self) -> float:
        """Measure the machine, which other guests may slow down from one run to the next."""
        command = [
            sys.executable,
            str(HERE / "training_rate.py"),
            str(self.threads),
            "bf16" if self.bf16 else "fp32",
        ]
        output = subprocess.run(command, env=os.environ | SPIN, capture_output=True, text=True, check=True).stdout
        self.rates.append(float(output))
        return self.rates[-1]

    def share(self, figures: Figures) -> float:
        """Return the share of the machine's matrix-product rate that a run reached."""
        operations = self.products.operations(figures.tokens, figures.targets)
        return operations / figures.result.seconds / figures.rate

    def _line(self, figures: Figures) -> str:
        result = figures.result
        share = f"{self.share(figures):.1%}" if figures.rate else ""
        return (
            f"  {figures.side:<6}{figures.seed:>5}{result.seconds:>10.2f}{figures.tokens_per_second:>10,.0f}"
            f"{share:>10}{result.peak_bytes / 1e6:>10,.0f}{result.losses[0]:>10.4f}{figures.final_loss:>12.4f}"
        )


HEAD = (
    f"  {'':<6}{'seed':>5}{'seconds':>10}{'tokens/s':>10}{'of rate':>10}{'peak MB':>10}{'loss 1':>10}"
    f"{'final loss':>12}"
)


def check_seen(name: str, task: Task, result: Result) -> None:
    """Stop when a side trained on other tokens, or other targets, than the job's."""
    if len(result.seen) != len(task.seen):
        raise SystemExit(f"{name} sees {len(result.seen)} rows, and not {len(task.seen)}")
    for number, (wanted, got) in enumerate(zip(task.seen, result.seen, strict=True)):
        if wanted[0] != list(got[0]) or wanted[1] != got[1]:
            raise SystemExit(f"{name} sees row {number} as {got}, and not as {wanted}")


def check_start(ours: Figures, theirs: Figures) -> None:
    """Stop when the sides do not start alike: nothing after the first step would be comparable."""
    first, other = ours.result.losses[0], theirs.result.losses[0]
    if abs(first - other) > 0.01 * other or len(ours.result.losses) != len(theirs.result.losses):
        raise SystemExit(
            f"The sides differ at step 1: losses of {first:.4f} and {other:.4f}, "
            f"{len(ours.result.losses)} and {len(theirs.result.losses)} steps in all"
        )
