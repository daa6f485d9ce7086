"""Training beside TRL's `SFTTrainer` with PEFT: the same base weights, rows, hyperparameters and first adapter.

The sides take turns, each run in a process of its own, with the model loaded and a step done before the clock
starts. Run on an otherwise idle machine: python benchmarks/training.py [--quick] [--job NAME]… [--rounds N]
docs/benchmarks.md says how each figure is taken. Needs Linux, for /proc.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import training_rows
import tutorial
from training_bench import (
    HEAD,
    LEARNING_RATE,
    OURS,
    TRL,
    TRL_PYTHON,
    TRL_WITH_OURS,
    Bench,
    Figures,
    Task,
    check_start,
)
from training_job import peak_bytes
from tunesmith import demo
from tunesmith.app import FIRST_ACCOUNT, Parts
from tunesmith.auth.tokens import DEFAULT_SCOPES
from tunesmith.client import Client

LONG_ROW = 512  # tokens


@dataclass(frozen=True)
class Goal:
    """What was to be reached, and whether it was; None for what is good to know."""

    text: str
    reached: str
    met: bool | None = None

    def __str__(self) -> str:
        verdict = "" if self.met is None else "met" if self.met else "missed"
        return f"{self.text:<60}{self.reached:>20}  {verdict}".rstrip()


@dataclass(frozen=True)
class Options:
    """How much is run.

    Attributes:
        quick: Fewer rounds of smaller jobs: to see that all works, not for figures.
        rounds: How often each job is run; 0: as often as it needs.
        whole: Whether `many` does all steps of its epoch.
    """

    quick: bool
    rounds: int
    whole: bool


def title(text: str) -> None:
    """Print what comes next."""
    print(f"\n{text}\n{HEAD}", flush=True)


def beside(bench: Bench, task: Task, rounds: int, bf16: bool | None = None) -> list[tuple[Figures, Figures]]:
    """Run a job on both sides in turn, a round a seed."""
    if not TRL_PYTHON.exists():
        raise SystemExit(f"{TRL_PYTHON} is not there: run make bench-environment")
    pairs = []
    for seed in range(rounds):
        pair = bench.run(OURS, task, seed, bf16=bf16), bench.run(TRL, task, seed, bf16=bf16)
        check_start(*pair)
        pairs.append(pair)
    return pairs


def compare(name: str, pairs: Sequence[tuple[Figures, Figures]], times: int) -> Iterator[Goal]:
    """Yield the goals of a job that both sides did."""
    ratio = statistics.median(theirs.result.seconds / ours.result.seconds for ours, theirs in pairs)
    yield Goal(f"{name}: at least {times} times as fast as TRL", f"{ratio:.1f} times", ratio >= times)
    ours, theirs = (max(figures.result.peak_bytes for figures in side) for side in zip(*pairs, strict=True))
    reached = f"{ours / 1e6:,.0f} / {theirs / 1e6:,.0f} MB"
    yield Goal(f"{name}: at no more memory than TRL", reached, ours <= theirs)
    yield loss_goal(name, pairs)
    ours_mean, theirs_mean = (
        statistics.mean(loss for figures in side for loss in figures.result.losses)
        for side in zip(*pairs, strict=True)
    )
    yield Goal(f"{name}: mean loss of all steps beside TRL's", f"{ours_mean / theirs_mean - 1:+.1%}")


def settled(bench: Bench, name: str, task: Task, pairs: Sequence[tuple[Figures, Figures]]) -> Goal:
    """Run TRL once more, with the allocator settings of our worker."""
    theirs = bench.run(TRL_WITH_OURS, task, 0).result.seconds
    ratio = theirs / statistics.median(ours.result.seconds for ours, _ in pairs)
    return Goal(f"{name}: beside TRL with our allocator settings (TRL*)", f"{ratio:.1f} times")


def loss_goal(name: str, pairs: Sequence[tuple[Figures, Figures]]) -> Goal:
    """Return the goal of equal learning: the final loss, its mean over the seeds."""
    ours, theirs = (statistics.mean(figures.final_loss for figures in side) for side in zip(*pairs, strict=True))
    apart, reached = ours / theirs - 1, f"{ours / theirs - 1:+.1%}"
    if len(pairs) > 2:
        spread = statistics.stdev(mine.final_loss - other.final_loss for mine, other in pairs)
        reached += f", standard error {spread / math.sqrt(len(pairs)) / theirs:.1%}"
    return Goal(f"{name}: final loss within 2 % of TRL's", reached, abs(apart) <= 0.02)


def tutorial_job(bench: Bench, options: Options) -> Iterator[Goal]:
    """The tutorial's 15 examples, batch 4, 5 epochs."""
    title("tutorial: 15 rows, batch 4, 5 epochs")
    task = Task(bench, "tutorial", training_rows.TUTORIAL, batch_size=4, epochs=5)
    pairs = beside(bench, task, options.rounds or (1 if options.quick else 3))
    yield from compare("tutorial", pairs, times=5)
    yield settled(bench, "tutorial", task, pairs)


def tutorial_fp32(bench: Bench, _options: Options) -> Iterator[Goal]:
    """The same in float32, where rounding does not hide what the sides do differently."""
    title("fp32: the tutorial's job in float32; for the losses, not the speed")
    task = Task(bench, "fp32", training_rows.TUTORIAL, batch_size=4, epochs=5)
    pairs = beside(bench, task, 1, bf16=False)
    yield loss_goal("tutorial in float32", pairs)
    ours, theirs = pairs[0][0].result.losses, pairs[0][1].result.losses
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    yield Goal("tutorial in float32: each step's loss within 2 % of TRL's", f"{apart:.2%} apart", apart <= 0.02)


def tickets(bench: Bench, options: Options) -> Iterator[Goal]:
    """Rows of about 40 tokens and outputs of 2 or 3, batch 8, 1 epoch."""
    count = 48 if options.quick else 400
    title(f"tickets: {count} rows of about 42 prompt tokens and 2 or 3 output tokens, batch 8, 1 epoch")
    task = Task(bench, "tickets", training_rows.tickets(count), batch_size=8)
    pairs = beside(bench, task, options.rounds or 1)
    yield from compare(f"{count} tickets", pairs, times=15)
    yield settled(bench, f"{count} tickets", task, pairs)


def many(bench: Bench, options: Options) -> Iterator[Goal]:
    """What a step of 10,000 rows costs beside one of 400 rows; ours alone."""
    counts = (48, 1200) if options.quick else (400, 10_000)
    steps = 0 if options.whole else counts[0] // 8 * (1 if options.quick else 3)
    until = "all steps" if options.whole else f"the first {steps:,} steps"
    title(f"many: {counts[0]} rows, and {counts[1]:,} ({until}); ours")
    few, more = (Task(bench, f"many-{count}", training_rows.tickets(count), batch_size=8) for count in counts)
    seeds = range(options.rounds or 1)
    pairs = [(bench.run(OURS, few, seed), bench.run(OURS, more, seed, steps)) for seed in seeds]
    speed = statistics.median(b.tokens_per_second / a.tokens_per_second for a, b in pairs) - 1
    yield Goal(
        f"{counts[1]:,} rows: tokens/s within 5 % of {counts[0]} rows'", f"{speed:+.1%}", abs(speed) <= 0.05
    )
    memory = statistics.median(b.result.peak_bytes / a.result.peak_bytes for a, b in pairs) - 1
    text = f"{counts[1]:,} rows: at most 5 % more memory than {counts[0]} rows"
    yield Goal(text, f"{memory:+.1%}", memory <= 0.05)


def long_rows(bench: Bench, options: Options) -> Iterator[Goal]:
    """The memory of a worker process that trains on long rows: a server's, through the API."""
    count = 8 if options.quick else 32
    rows = training_rows.long_tickets(count, LONG_ROW, lambda *row: len(bench.tokenize([row])[0]))
    lengths = [len(row) for row in bench.tokenize(rows)]
    print(f"\nlong: {count} rows of {min(lengths)} to {max(lengths)} tokens, batch 8, 1 epoch; a server's worker")
    given = {"batch_size": 8, "learning_rate": LEARNING_RATE, "epoch_count": 1}
    pairs = [{"text_input": text, "output": output} for text, output in rows]
    body = {
        "base_model": f"models/{bench.model.id}",
        "tuning_task": {"hyperparameters": given, "training_data": {"examples": {"examples": pairs}}},
    }
    with worker_and_client(bench) as (process, client):
        seconds = tutorial.once(client, body)
        peak = peak_bytes(process)
    print(f"  POST to ACTIVE {seconds:.1f} s, the worker's peak {peak / 1e6:,.0f} MB")
    yield Goal("rows of 512 tokens: worker below 2.5 GB", f"{peak / 1e9:.2f} GB", peak < 2.5e9)


@contextmanager
def worker_and_client(bench: Bench) -> Iterator[tuple[int, Client]]:
    """A server with one worker, which is a child of ours: yields its process id and the server's client."""
    data = bench.settings.data_dir
    command = [sys.executable, "-m", "tunesmith", "worker", "--stop-with-stdin", "--data-dir", str(data)]
    os.environ["TUNESMITH_WORKERS"] = "0"
    try:
        with demo.server(bench.settings) as url:
            token = Parts.open(bench.settings).tokens.create(FIRST_ACCOUNT, DEFAULT_SCOPES, seconds=3600)
            worker = subprocess.Popen(
                [*command, "--threads", str(bench.threads)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            with Client(url, token) as client, worker:
                try:
                    yield worker.pid, client
                finally:
                    worker.terminate()
    finally:
        del os.environ["TUNESMITH_WORKERS"]


def active(_bench: Bench, options: Options) -> Iterator[Goal]:
    """Seconds from POST to ACTIVE of the tutorial's job, its worker warm."""
    print("\nactive: the tutorial's job through the API, from POST to ACTIVE, worker warm")
    median = statistics.median(tutorial.seconds(options.rounds or (2 if options.quick else 5)))
    yield Goal("tutorial: POST to ACTIVE in at most 4 s", f"{median:.2f} s", median <= 4)


JOBS: dict[str, Callable[[Bench, Options], Iterator[Goal]]] = {
    "tutorial": tutorial_job,
    "fp32": tutorial_fp32,
    "tickets": tickets,
    "many": many,
    "long": long_rows,
    "active": active,
}


def main(names: Sequence[str], options: Options) -> None:
    """Run the jobs, then print the goals with what was reached."""
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), threads)
        print(f"{processor()}, {threads} threads, load {os.getloadavg()[0]:.1f}")
        print(f"{bench.weights.version} in {'bfloat16' if bench.bf16 else 'float32'}", flush=True)
        goals = [goal for name in names for goal in JOBS[name](bench, options)]
        if bench.rates:
            print(f"\nmatrix products: {statistics.median(bench.rates) / 1e12:.2f} TFLOP/s", end=" ")
            print(f"(median; {min(bench.rates) / 1e12:.2f} to {max(bench.rates) / 1e12:.2f} over the runs)")
        print(", ".join(f"{name} {version}" for name, version in bench.versions.items()))
        print("\ngoals" + (" (quick: the jobs are smaller than those that the goals are for)" * options.quick))
        print(*(f"  {goal}" for goal in goals), sep="\n")


def processor() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--job", action="append", choices=[*JOBS], help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=0, help="how often each job is run")
    parser.add_argument("--quick", action="store_true", help="smaller jobs: to see that all works")
    parser.add_argument("--whole", action="store_true", help="all 1,250 steps of the job of 10,000 rows")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    main(given.job or [*JOBS], Options(given.quick, given.rounds, given.whole))
