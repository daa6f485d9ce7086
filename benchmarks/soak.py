"""Many jobs, random kills: all must end ACTIVE, each with the losses that it has when nobody disturbs it.

A real server with two workers on a tiny model takes jobs of several accounts. Workers are killed at random, now
and then the whole server, and jobs are paused and resumed. Then each job is trained once more, undisturbed, and
its losses are compared to the last bit: python benchmarks/soak.py [--jobs N] [--seed N] [--kills N]
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # as the server's workers have it, or last bits differ
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from rich.console import Console
from rich.table import Table

from servers import Server, tiny_catalog  # isort: skip
from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import Catalog
from tunesmith.base_models.prompts import FORMATS
from tunesmith.config import Settings
from tunesmith.jobs.queue import training_options
from tunesmith.training import examples, split
from tunesmith.training.loop import Base, Step, TuningRun

ACCOUNTS = ("ada@example.com", "bob@example.com", "eve@example.com")
WORKERS = 2
SERVER_KILLS = 0.1  # the share of kills that take the server with all its workers
PAUSES = 0.3  # the share of disturbances that let a job rest instead of killing
HELD_OUT_FROM = 50  # examples
LOST_SECONDS = 900.0  # without any job ending: something hangs


@dataclass
class Tuned:
    """One job."""

    account: str
    body: dict[str, Any]
    operation: str = ""
    model: str = ""
    steps: int = 0
    pauses: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    state: str = ""


def drawn(draw: random.Random, number: int) -> Tuned:
    """Draw a job of some hundred steps; many have validation, and some of these may stop early."""
    count, batch = draw.choice([5, 10, 20, 60, 80]), draw.choice([1, 2, 4, 8])
    pairs = [{"textInput": str(n), "output": str(n + draw.randint(1, 3))} for n in range(count)]
    hyperparameters = {
        "epochCount": max(2, draw.randint(100, 500) * batch // count),
        "batchSize": batch,
        "learningRate": draw.choice([0.0005, 0.001, 0.005]),
    }
    task = {"hyperparameters": hyperparameters, "trainingData": {"examples": {"examples": pairs}}}
    model = {"displayName": f"soak {number}", "baseModel": "models/tiny-gemma3", "tuningTask": task}
    patience = draw.choice([0, 2]) if count >= HELD_OUT_FROM else 0
    options = {"seed": draw.randrange(1000), "patience": patience, "keep": draw.choice(["BEST", "LAST"])}
    return Tuned(draw.choice(ACCOUNTS), {"tunedModel": model, "options": options})


class Soak:
    """The server, its jobs, and what happens to them."""

    def __init__(self, server: Server, jobs: list[Tuned], draw: random.Random) -> None:
        self._server, self._jobs, self._draw = server, jobs, draw
        self._tokens = {}
        self.worker_kills = self.server_kills = 0
        for account in ACCOUNTS:
            server.run("accounts", "create", account)
            self._tokens[account] = server.run("token", account).strip()

    def run(self, kills: int) -> None:
        """Queue the jobs, disturb them, and return when all have ended."""
        for job in self._jobs:
            made = self._call("POST", "tunedModels:tune", job, job.body)
            job.operation, job.model = made["name"], made["metadata"]["tunedModel"]
        left, seen = self._jobs, time.monotonic()
        while left:
            known = [job.steps for job in left]
            done = [job for job in left if self._done(job)]
            # Only what is at work is killed: a worker takes a few seconds to start. And not the first jobs alone.
            most = kills * (len(self._jobs) - len(left) + WORKERS) / len(self._jobs)
            if self.worker_kills + self.server_kills < min(most, kills) and known != [job.steps for job in left]:
                self._disturb([job for job in left if job not in done])
            for job in left:
                if job.pauses and job not in done and self._draw.random() < 0.5:
                    self._call("POST", f"{job.model}:resume", job, {})
            for job in done:
                job.state = self._call("GET", job.model, job)["state"]
                job.report = self._call("GET", f"{job.model}:report", job)
                left, seen = [other for other in left if other is not job], time.monotonic()
            if done:
                print(f"{len(self._jobs) - len(left)} of {len(self._jobs)} jobs have ended", file=sys.stderr)
            if time.monotonic() - seen > LOST_SECONDS:
                raise SystemExit(f"{len(left)} jobs hang; the server's log is {self._server.log.name}")
            time.sleep(self._draw.uniform(0.2, 1.5))  # the disturbances' rhythm

    def _done(self, job: Tuned) -> bool:
        operation = self._call("GET", job.operation, job)
        job.steps = operation["metadata"].get("completedSteps", 0)
        return bool(operation.get("done"))

    def _disturb(self, left: list[Tuned]) -> None:
        if left and self._draw.random() < PAUSES:
            job = self._draw.choice(left)
            if "error" not in self._call("POST", f"{job.model}:pause", job, {}):
                job.pauses += 1
        elif self._draw.random() < SERVER_KILLS:
            self._server.kill()
            self._server.start()
            self.server_kills += 1
        elif pids := workers(self._server):
            os.kill(self._draw.choice(pids), signal.SIGKILL)
            self.worker_kills += 1

    def _call(self, method: str, path: str, job: Tuned, body: Any = None) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self._tokens[job.account]}"}
        answer: dict[str, Any] = self._server.http.request(
            method, f"/v1beta/{path}", json=body, headers=headers
        ).json()
        if "error" in answer and not path.endswith((":pause", ":resume")):  # it may have ended meanwhile
            raise SystemExit(f"{method} {path}: {answer['error']['message']}")
        return answer


def workers(server: Server) -> list[int]:
    """Return the process ids of a server's workers."""
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [int(pid) for child in children for pid in child.read_text().split()]


def undisturbed(base: Base, job: Tuned) -> tuple[list[float], list[float]]:
    """Train a job here; return its losses and its validation losses."""
    told = job.body["tunedModel"]["tuningTask"]
    task, rates = told["trainingData"]["examples"]["examples"], told["hyperparameters"]
    data = protos.TuningExamples(
        examples=[protos.TuningExample(text_input=one["textInput"], output=one["output"]) for one in task]
    )
    given = protos.Hyperparameters(
        epoch_count=rates["epochCount"], batch_size=rates["batchSize"], learning_rate=rates["learningRate"]
    )
    asked = job.body["options"]
    keep = protos.TuningOptions.Keep.Value(asked["keep"])
    options = training_options(protos.TuningOptions(patience=asked["patience"], keep=keep))
    model = base.weights.model
    rows = examples.tokenize(data, FORMATS[model.prompt_format], base.tokenizer, model.tuning_token_limit)
    out = split.held_out(data, options, asked["seed"])
    losses, validations = list[float](), list[float]()
    with TuningRun(base, rows, given, asked["seed"], options=options, held_out=out) as run:
        for one in run:
            if isinstance(one, Step):
                losses.append(rounded(one.mean_loss))
            else:
                validations.append(rounded(one.loss))
    return losses, validations


def rounded(number: float) -> float:
    """Return a number as a message holds it."""
    return protos.TuningStep(mean_loss=number).mean_loss


def verdict(base: Base, job: Tuned) -> str:
    """Return how a job ended, and whether its losses are those of its twin."""
    losses = [rounded(step["meanLoss"]) for step in job.report["steps"]]
    validations = [rounded(one["loss"]) for one in job.report.get("validations", [])]
    if job.state != "ACTIVE":
        return f"{job.state}: {job.report.get('reason', '')}"
    expected = undisturbed(base, job)
    if (losses, validations) == expected:
        return "equal"
    first = next((n for n, pair in enumerate(zip(losses, expected[0], strict=False), 1) if len({*pair}) > 1), 0)
    return f"DIFFERS, first at step {first}; {len(losses)} steps of {len(expected[0])}"


def main() -> None:
    """Run it and print a table; exit with 1 unless all jobs are ACTIVE and equal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the jobs and of what happens to them")
    parser.add_argument("--kills", type=int, default=60, help="of workers and of the whole server")
    asked = parser.parse_args()
    draw, began = random.Random(asked.seed), time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        environment = tiny_catalog(Path(folder) / "tiny")
        settings = Settings.load(
            catalog=environment["TUNESMITH_CATALOG"], cache_dir=environment["TUNESMITH_CACHE_DIR"]
        )
        found = weights.get(Catalog.load(settings).default, settings.cache_dir)
        base = Base.load(found, torch.device("cpu"))  # first: all are to find the kernels compiled
        jobs = [drawn(draw, number) for number in range(asked.jobs)]
        often = {"TUNESMITH_CHECKPOINT_SECONDS": "0.2", "TUNESMITH_LEASE_SECONDS": "3"}
        with Server(Path(folder) / "data", environment | often, "--workers", str(WORKERS)) as server:
            soak = Soak(server, jobs, draw)
            soak.run(asked.kills)
        verdicts = [verdict(base, job) for job in jobs]
    table = Table("job", "account", "steps", "validations", "attempts", "pauses", "losses")
    for job, said in zip(jobs, verdicts, strict=True):
        counts = len(job.report["steps"]), len(job.report.get("validations", []))
        attempts = job.report["timings"]["attempts"]
        table.add_row(job.model, job.account, *map(str, counts), str(attempts), str(job.pauses), said)
    Console().print(table)
    good = verdicts.count("equal")
    print(
        f"{good} of {len(jobs)} jobs ACTIVE with the losses of their undisturbed twins; {soak.worker_kills} "
        f"workers and {soak.server_kills} servers killed in {time.monotonic() - began:.0f} s (seed {asked.seed})"
    )
    sys.exit(good < len(jobs))


if __name__ == "__main__":
    main()
