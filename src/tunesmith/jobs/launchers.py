"""Where workers run: as child processes of the server."""

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from tunesmith.jobs.queue import RENEWALS, JobQueue
from tunesmith.store.database import DatabaseUnavailable

FIRST_BACKOFF = 0.5  # seconds before a worker that died is started again
LONGEST_BACKOFF = 30.0
STOP_SECONDS = 30.0  # for the step that is under way and its checkpoint

logger = logging.getLogger(__name__)


class LocalLauncher:
    """Keeps a number of worker processes running.

    A worker holds the reading end of a pipe that only this process writes to: however this process ends, the
    worker sees the pipe close, puts its job back and ends too.

    A worker that is stopped (SIGSTOP) keeps what it holds: its job, and all others' way into a SQLite file when it
    is in a transaction. One that stays so for as long as leases last is killed, and another one is started.

    Args:
        workers: How many.
        arguments: Of each, beside its name.
        queue: Where their jobs are.
        program: What a worker runs, before its arguments.
    """

    def __init__(
        self,
        workers: int,
        arguments: Sequence[str],
        queue: JobQueue,
        program: Sequence[str] = (sys.executable, "-m", "tunesmith"),
    ) -> None:
        self._arguments, self._queue = list(arguments), queue
        self._program = list(program)
        self._stopping = threading.Event()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"worker-{number}", daemon=True)
            for number in range(workers)
        ]

    def start(self) -> None:
        """Start the workers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each worker finish its step and put its job back; kill those that take too long."""
        self._stopping.set()
        self._queue.stopping.set()
        for process in list(self._processes.values()):
            process.terminate()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        for process in list(self._processes.values()):
            process.kill()

    def _keep(self, number: int) -> None:
        """Run one worker after another."""
        backoff = FIRST_BACKOFF
        for start in itertools.count():
            name = f"{socket.gethostname()}-{os.getpid()}-{number}-{start}"
            command = [*self._program, "worker", "--name", name, "--stop-with-stdin"]
            started = time.monotonic()
            with subprocess.Popen([*command, *self._arguments], stdin=subprocess.PIPE) as process:
                self._processes[number] = process
                if self._stopping.is_set():
                    process.terminate()
                with suppress(ChildProcessError):  # the thread that stops all has seen its end
                    self._watch(process, name)
                code = process.wait()
            del self._processes[number]
            progress = False
            with suppress(DatabaseUnavailable):  # while all stops: then its lease runs out
                progress = self._queue.release(name)  # nobody waits for a worker that is known to be dead
            if self._stopping.wait(backoff):
                return
            logger.warning("worker %s ended%s; starting another", name, _how(code))
            lived = time.monotonic() - started
            again = progress or lived > LONGEST_BACKOFF
            backoff = FIRST_BACKOFF if again else min(backoff * 2, LONGEST_BACKOFF)

    def _watch(self, process: subprocess.Popen[bytes], name: str) -> None:
        """Return when a worker has ended; end one that is stopped for too long, or while all stops."""
        if not hasattr(os, "waitid"):  # macOS, before Python 3.13
            return
        while _is_stopped(process):
            # Counted in parts: as long as this process is stopped with it, only one of them passes.
            for _ in range(RENEWALS):
                self._stopping.wait(self._queue.lease_seconds / RENEWALS)
                if not _is_stopped(process, os.WNOHANG):
                    break
            else:
                logger.warning("worker %s is stopped and answers nobody; killing it", name)
                process.kill()
                process.wait()
                return


def _is_stopped(process: subprocess.Popen[bytes], options: int = 0) -> bool:
    """Wait until a child is stopped or has ended; return whether it is stopped, and leave its end to be seen.

    Raises:
        ChildProcessError: Its end was seen already.
    """
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | options)
    return found is not None and found.si_code == os.CLD_STOPPED


def _how(code: int) -> str:
    """Return how a process ended, in words."""
    if code == -signal.SIGKILL:
        return " by SIGKILL; the system kills what takes too much memory: see the kernel's log (`dmesg`)"
    return f" by signal {-code}" if code < 0 else f" with code {code}"
