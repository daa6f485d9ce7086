"""Worker processes that are there in a moment, as they fork from one that has imported torch, and their faults."""

import logging
import multiprocessing
import os
import resource
import signal
import sqlite3
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tunesmith.config import Settings

Fault = Callable[..., None]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the servers of tests have it, or last bits differ
# What is free counts as taken, where the address space is limited, unless the C library gives it back.
os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tunesmith.app", "tunesmith.jobs.worker"])


def start_worker(
    name: str, environment: dict[str, str], log: Path, fault: Fault | None = None, *args: Any
) -> BaseProcess:
    """Start a worker on a data dir.

    Args:
        name: What the queue calls it.
        environment: Settings.
        log: Where it logs to.
        fault: Called in it with `args` before it works.
    """
    process = _CONTEXT.Process(target=_work, args=(name, environment, log, fault, args), daemon=True)
    process.start()
    return process


def _work(name: str, environment: dict[str, str], log: Path, fault: Fault | None, args: tuple[Any, ...]) -> None:
    from tunesmith import app

    os.environ |= environment
    logging.basicConfig(filename=log, level=logging.INFO, force=True)
    if fault:
        fault(*args)
    app.work(Settings.load(threads=1), name, stop_with_stdin=False)


def killed_above(tokens: int) -> None:
    """The system kills the process when a step takes memory for more than so many tokens at once."""
    from tunesmith.training.batches import Batch
    from tunesmith.training.network import DecoderNetwork

    learn = DecoderNetwork.learn

    def too_much(self: DecoderNetwork, batch: Batch, weight: float) -> float:
        if sum(batch.lengths) > tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(self, batch, weight)

    DecoderNetwork.learn = too_much  # type: ignore[method-assign]


def killed_writing_checkpoint(number: int) -> None:
    """The process is killed in the middle of a checkpoint's file."""
    from tunesmith.store.artifacts import ArtifactStore

    write, left = ArtifactStore._write, [number]

    def half(self: ArtifactStore, path: str, content: bytes) -> None:
        if path.endswith("checkpoint.safetensors"):
            left[0] -= 1
            if not left[0]:
                write(self, path, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        write(self, path, content)

    ArtifactStore._write = half  # type: ignore[method-assign]


def little_memory(megabytes: int) -> None:
    """The process gets so much more memory than it has when it is ready; a step takes what it likes."""
    from tunesmith.jobs.worker import Worker
    from tunesmith.training import loop

    loop.MICRO_BATCH_TOKENS = 1 << 20
    run = Worker.run

    def limited(self: Worker, stop: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + megabytes * 1_000_000
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        run(self, stop)

    Worker.run = limited  # type: ignore[method-assign]


def weights_overflow(step: int) -> None:
    """A step makes the weights larger than numbers are."""
    from torch import Tensor

    from tunesmith.training.adam import Adam

    take, left = Adam.step, [step + 1]  # the first one warms up

    def leap(self: Adam, gradient: Tensor, learning_rate: float) -> None:
        left[0] -= 1
        take(self, gradient, learning_rate if left[0] else 1e38)

    Adam.step = leap  # type: ignore[method-assign]


def no_memory_above(tokens: int) -> None:
    """The device has no memory for more than so many tokens at once, and says so as torch does."""
    from tunesmith.training.batches import Batch
    from tunesmith.training.network import DecoderNetwork

    learn = DecoderNetwork.learn

    def refused(self: DecoderNetwork, batch: Batch, weight: float) -> float:
        if sum(batch.lengths) > tokens:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000000000 bytes."
            )
        return learn(self, batch, weight)

    DecoderNetwork.learn = refused  # type: ignore[method-assign]


def clock_jumps(seconds: float, steps: int) -> None:
    """The time of day jumps ahead by so much and back by twice as much, in turns, each time after some steps."""
    import time
    from functools import partialmethod

    from torch import Tensor

    from tunesmith.jobs.queue import JobQueue
    from tunesmith.training.adam import Adam

    take, real, real_ns, done, off = Adam.step, time.time, time.time_ns, [0], [0.0]

    def step(self: Adam, gradient: Tensor, learning_rate: float) -> None:
        take(self, gradient, learning_rate)
        done[0] += 1
        off[0] = seconds * (1, -1)[done[0] // steps % 2]

    Adam.step = step  # type: ignore[method-assign]
    time.time = lambda: real() + off[0]
    time.time_ns = lambda: real_ns() + round(off[0] * 1e9)
    JobQueue.__init__ = partialmethod(JobQueue.__init__, clock=time.time)  # type: ignore[method-assign, assignment]


def stops_in_a_transaction(step: int, once: Path) -> None:
    """The process is stopped, as by SIGSTOP, while it stores a step; later ones find a file and go on."""
    from sqlalchemy.orm import Session

    from tunesmith import protos
    from tunesmith.store import events

    tell = events.tell

    def stop(session: Session, job: str, event: protos.TuningEvent) -> None:
        tell(session, job, event)
        if event.step.step == step and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    events.tell = stop


def freeze(pid: int, database: Path) -> None:
    """Stop a process outside of a transaction: one that holds SQLite's lock would stop everybody."""
    for _ in range(100):
        os.kill(pid, signal.SIGSTOP)
        while not has_stopped(pid):
            pass  # a thread that is in the kernel may still take the lock on its way out
        probe = sqlite3.connect(database, timeout=0.5, isolation_level=None)
        try:
            probe.execute("BEGIN IMMEDIATE")
            probe.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
        finally:
            probe.close()
    raise AssertionError("the process holds the database's lock all the time")


def has_stopped(pid: int) -> bool:
    """Whether all threads of a process have stopped."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state == "T" for state in states)
