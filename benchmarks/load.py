"""The engine with more to do than it can, on this machine's default base model.

    python benchmarks/load.py adapters [--adapters 500] [--clients 16] [--seconds 120]
    python benchmarks/load.py soak     [--seconds 600]
    python benchmarks/load.py beside   [--seconds 30]

`adapters`: many tuned models, asked as often as words are used (Zipf), of which few fit into memory: each answer
must be the one that its adapter gave alone. `soak`: twice as many clients as there are places, in the batch and in
the queue together, of which every fourth leaves in the middle of an answer: all others must be answered or
refused, and memory must stay flat. `beside`: how fast answers come with and without a tuning job on the machine.
The adapters are random, of rank 4, so strong that no two answer alike. Exits with 1 when something is wrong.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from tunesmith.cli import SERVING_SPINS, TRAINING_SPINS

os.environ.setdefault("GOMP_SPINCOUNT", SERVING_SPINS)  # as a server does, before torch is loaded

import safetensors.torch
import torch
from prometheus_client import CollectorRegistry

from tunesmith import protos
from tunesmith.base_models.catalog import BaseModel, Catalog
from tunesmith.base_models.device import compute_dtype
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.base_models.weights import Weights, get
from tunesmith.config import Settings
from tunesmith.engines.adapter_cache import PREFIX
from tunesmith.engines.admission import Admission
from tunesmith.engines.base import Sampling
from tunesmith.engines.lora import Adapter
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.runner import Runner
from tunesmith.engines.torch_engine import TorchEngine
from tunesmith.errors import ResourceExhausted, Unavailable
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.training import examples
from tunesmith.training.loop import Base, TuningRun

QUESTION = "Who are you?"
TOKENS = 16
RANK = 4
STRENGTH = 0.4
"""Size of the numbers in B; those in A keep the length of what they are given."""
GROWTH = 1.1
"""How much larger the process may be at the end of the soak than when half of it was over."""


@dataclass
class Traffic:
    """What became of requests.

    Attributes:
        outcomes: How many were right, wrong, refused, given up by their clients, or failed.
        first: Seconds to each first token.
        tokens: How many all answers have.
        seconds: How long it all took.
        memory: Bytes of the process, now and then.
        failures: What was wrong.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    memory: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was wrong and something was right."""
        return not self.failures and self.outcomes["right"] > 0

    @property
    def flat(self) -> bool:
        """Whether memory did not grow in the second half."""
        return self.memory[-1] <= GROWTH * self.memory[len(self.memory) // 2]


class Asking:
    """Clients, a thread each, that ask an engine until time is over.

    Args:
        engine: The engine.
        model: The base model.
        expected: What each adapter answers alone.
        leaves: Which part of the clients leaves in the middle of each answer.
        tokens: Most tokens of an answer.
    """

    def __init__(
        self,
        engine: TorchEngine,
        model: BaseModel,
        expected: Mapping[str, str],
        leaves: float = 0.0,
        tokens: int = TOKENS,
    ) -> None:
        self._engine, self._model, self._expected, self._leaves = engine, model, expected, leaves
        self._paths, self._tokens = list(expected), tokens
        self._shares = list(accumulate(1 / place for place in range(1, len(self._paths) + 1)))
        self._lock, self._over = threading.Lock(), threading.Event()
        self.traffic = Traffic()

    def run(self, clients: int, seconds: float) -> Traffic:
        """Let so many clients ask for so long, and wait for the last answers."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        while (left := began + seconds - time.monotonic()) > 0:
            self.traffic.memory.append(resident())
            self._over.wait(min(left, seconds / 20))
        self._over.set()
        for thread in threads:
            thread.join()
        self.traffic.memory.append(resident())
        self.traffic.seconds = time.monotonic() - began
        return self.traffic

    def _client(self, number: int) -> None:
        chance = random.Random(number)
        while not self._over.is_set():
            (path,) = chance.choices(self._paths, cum_weights=self._shares)
            try:
                outcome = self._ask(path, f"client-{number}", chance)
            except (ResourceExhausted, Unavailable) as refused:
                outcome = "refused"
                if refused.retry_seconds is None:
                    outcome = "failed"
                    self._failed(f"{path}: refused without a word on when to try again: {refused}")
                self._over.wait(min(refused.retry_seconds or 1.0, 1.0))
            except Exception as error:  # noqa: BLE001 — the table tells it
                outcome = "failed"
                self._failed(f"{path}: {error!r}")
            with self._lock:
                self.traffic.outcomes[outcome] += 1

    def _ask(self, path: str, caller: str, chance: random.Random) -> str:
        stays = chance.random() >= self._leaves
        limit = self._tokens if stays else chance.randrange(self._tokens)
        began, text, tokens, gone = time.monotonic(), "", 0, threading.Event()
        chunks = asked(self._engine, self._model, path, self._tokens, gone, caller)
        for chunk in chunks:
            if not tokens:
                with self._lock:
                    self.traffic.first.append(time.monotonic() - began)
            text, tokens = text + chunk.text, chunk.output_tokens
            if not stays and tokens >= limit:
                gone.set()
                chunks.close()
                return "left"
        with self._lock:
            self.traffic.tokens += tokens
        if text == self._expected[path]:
            return "right"
        self._failed(f"{path}: {text!r} instead of {self._expected[path]!r}")
        return "wrong"

    def _failed(self, what: str) -> None:
        with self._lock:
            self.traffic.failures.append(what)


def asked(
    engine: TorchEngine, model: BaseModel, path: str | None, tokens: int, gone: threading.Event, caller: str
) -> Any:
    """Return the chunks of an answer to the one question, greedily."""
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=1, max_output_tokens=tokens)
    return engine.generate(model, path, [Turn("user", QUESTION)], sampling, gone, caller)


def alone(engine: TorchEngine, model: BaseModel, paths: Sequence[str], tokens: int = TOKENS) -> dict[str, str]:
    """Return what each adapter answers while nothing else is asked.

    Raises:
        SystemExit: Two answer alike, so that a mistake between them would not be seen.
    """
    answers = {
        path: "".join(chunk.text for chunk in asked(engine, model, path, tokens, threading.Event(), ""))
        for path in paths
    }
    if len(set(answers.values())) < len(answers):
        raise SystemExit(f"only {len(set(answers.values()))} of {len(answers)} adapters answer in their own way")
    return answers


def publish(folder: Path, base: Weights, count: int) -> list[str]:
    """Publish random adapters; return their paths."""
    store, device, admission = ArtifactStore(f"file://{folder}"), torch.device("cpu"), Admission(1, 60.0)
    runner = Runner(base, device, compute_dtype(device), 1, 64 << 20, admission, EngineMetrics())
    form, tokenizer = FORMATS[base.model.prompt_format], base.tokenizer()
    prompt = form.prompt(tokenizer, [Turn("user", QUESTION)])
    tokens = [*prompt, *form.output(tokenizer, "Nobody.")]
    without, paths = runner.logprob(tokens, len(prompt), None), []
    for number in range(count):
        drawn = torch.Generator().manual_seed(number)
        factors = {
            path: (
                (torch.randn(RANK, inputs, generator=drawn) / inputs**0.5).bfloat16().float(),
                (torch.randn(outputs, RANK, generator=drawn) * STRENGTH / RANK**0.5).bfloat16().float(),
            )
            for path, (inputs, outputs) in runner.linears.items()
        }
        adapter = runner.prepare(Adapter(factors, RANK, base.model.prompt_format))
        probe = {
            "tokens": tokens,
            "prompt_length": len(prompt),
            "logprob": runner.logprob(tokens, len(prompt), adapter),
            "base_logprob": without,
        }
        manifest = {
            "base_model": base.model.id,
            "weights_sha256": base.sha256,
            "prompt_format": base.model.prompt_format,
            "probe": probe,
        }
        paths.append(f"adapters/{number}")
        store.publish(paths[-1], files(factors), {"kind": "adapter", "recipe": {}, **manifest})
    runner.close()
    print(f"{count} adapters are made", file=sys.stderr, flush=True)
    return paths


def files(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, bytes]:
    """Return an adapter in PEFT's format."""
    targets = sorted({path.rpartition(".")[2] for path in factors})
    tensors = {
        f"{PREFIX}{path}.lora_{letter}.weight": tensor.bfloat16()
        for path, pair in factors.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors.torch.save(tensors),
    }


def resident() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of all does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def row(name: str, traffic: Traffic) -> str:
    """Return a line of the table."""
    counts = " ".join(f"{traffic.outcomes[kind]:>8,}" for kind in ("right", "wrong", "refused", "left", "failed"))
    waits = " ".join(f"{1000 * percentile(traffic.first, share):>8,.0f}" for share in (0.5, 0.95))
    memory = f"{traffic.memory[len(traffic.memory) // 2] >> 20:>8,} {traffic.memory[-1] >> 20:>8,}"
    return f"{name:<18} {counts} {traffic.tokens / traffic.seconds:>8.1f} {waits} {memory}"


HEAD = (
    f"{'':<18} {'right':>8} {'wrong':>8} {'refused':>8} {'left':>8} {'failed':>8} {'tokens/s':>8} {'first ms':>8} "
    f"{'95 %':>8} {'MB half':>8} {'MB end':>8}"
)


class Place:
    """The engine with the settings of a server, on random adapters; ends with the block."""

    def __init__(self, settings: Settings, adapters: int, folder: Path) -> None:
        self.model, self.registry = Catalog.load(settings).default, CollectorRegistry()
        # In a process of its own: this one's threads would keep helpers from OpenMP that slow the engine's down.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as once:
            made = once.submit(publish, folder, get(self.model, settings.cache_dir), adapters)
            self.paths = made.result()
        self.engine = TorchEngine(
            ArtifactStore(f"file://{folder}"),
            settings.cache_dir,
            device="cpu",
            max_batch=settings.max_batch,
            loaded_adapters=settings.loaded_adapters,
            kv_bytes=settings.kv_cache_mb << 20,
            waiting=settings.waiting_answers,
            waiting_seconds=settings.waiting_seconds,
            metrics=EngineMetrics(self.registry),
        )
        self.engine.preload(self.model)

    def counted(self, name: str) -> float:
        """Return a metric of the engine."""
        return self.registry.get_sample_value(f"tunesmith_{name}", {"model": self.model.id}) or 0.0


def many(place: Place, clients: int, seconds: float) -> Traffic:
    """Print what becomes of Zipf traffic on all adapters."""
    expected = alone(place.engine, place.model, place.paths)
    loaded = place.counted("adapter_loads_total")
    traffic = Asking(place.engine, place.model, expected).run(clients, seconds)
    loads = place.counted("adapter_loads_total") - loaded
    print(f"{HEAD}\n{row(f'{len(place.paths)} adapters', traffic)}")
    in_memory = place.counted("adapter_hits_total") / max(sum(traffic.outcomes.values()), 1)
    print(f"{loads / traffic.seconds:.1f} adapters loaded a second, {in_memory:.0%} of answers found theirs there")
    return traffic


def soaked(place: Place, settings: Settings, seconds: float) -> Traffic:
    """Print what becomes of twice as many clients as there are places."""
    expected = alone(place.engine, place.model, place.paths)
    clients = 2 * (settings.max_batch + settings.waiting_answers)
    traffic = Asking(place.engine, place.model, expected, leaves=0.25).run(clients, seconds)
    print(f"{HEAD}\n{row(f'{clients} clients', traffic)}")
    if not traffic.flat:
        traffic.failures.append("memory grew")
    return traffic


def train(nice: int, begun: Event, over: Event) -> None:
    """Tune one model after another until it is over."""
    os.nice(nice)
    settings = Settings.load()
    base = Base.load(get(Catalog.load(settings).default, settings.cache_dir), torch.device("cpu"))
    pairs = [protos.TuningExample(text_input=str(n), output=str(n + 1)) for n in range(100)]
    form = FORMATS[base.weights.model.prompt_format]
    rows = examples.tokenize(
        protos.TuningExamples(examples=pairs), form, base.tokenizer, base.weights.model.tuning_token_limit
    )
    given = protos.Hyperparameters(epoch_count=100, batch_size=8, learning_rate=0.0001)
    with TuningRun(base, rows, given, seed=0) as run:
        for _ in run:
            begun.set()
            if over.is_set():
                return


def beside(place: Place, settings: Settings, clients: int, seconds: float) -> list[Traffic]:
    """Print how fast answers come without a tuning job, and with one that gives way or does not."""
    expected = alone(place.engine, place.model, place.paths)
    print(HEAD)
    found = []
    for nice in (None, settings.worker_nice, 0):
        with training(nice):
            found.append(Asking(place.engine, place.model, expected).run(clients, seconds))
        name = "no job" if nice is None else f"job, nice {nice}"
        print(row(name, found[-1]), flush=True)
    return found


@contextmanager
def training(nice: int | None) -> Iterator[None]:
    """Have a process that trains, once its first step is done; None for none."""
    if nice is None:
        yield
        return
    context = multiprocessing.get_context("spawn")
    begun, over = context.Event(), context.Event()
    process = context.Process(target=train, args=(nice, begun, over))
    os.environ["GOMP_SPINCOUNT"] = TRAINING_SPINS  # as the process does that begins here
    process.start()
    begun.wait()
    try:
        yield
    finally:
        over.set()
        process.join()


def main(arguments: argparse.Namespace) -> int:
    """Run what is asked for."""
    settings = Settings.load()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(settings, arguments.adapters, Path(folder))
        try:
            if arguments.what == "adapters":
                found = [many(place, arguments.clients, arguments.seconds or 120)]
            elif arguments.what == "soak":
                found = [soaked(place, settings, arguments.seconds or 600)]
            else:
                found = beside(place, settings, arguments.clients, arguments.seconds or 30)
        finally:
            place.engine.close()
    for failure in [failure for traffic in found for failure in traffic.failures][:10]:
        print(f"WRONG: {failure}", file=sys.stderr)
    return 0 if all(traffic.sound for traffic in found) else 1


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["adapters", "soak", "beside"])
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seconds", type=float)
    given = parser.parse_args()
    many_ones = given.what == "adapters"
    given.adapters = given.adapters or (500 if many_ones else 8)
    given.clients = given.clients or (16 if many_ones else 4)
    return given


if __name__ == "__main__":
    sys.exit(main(options()))
