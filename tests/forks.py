"""`tunesmith` commands that begin in a moment: processes that fork from one that has imported what they import.

That process is this file as a script: python tests/forks.py DESCRIPTOR. It ends with whoever started it.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

IMPORTED = (
    "tunesmith.cli",
    "tunesmith.app",
    "tunesmith.api.grpc_server",
    "tunesmith.api.rest_server",
    "tunesmith.client",
    "tunesmith.engines.torch_engine",
    "tunesmith.terminal",
    "uvicorn",
    "recording",
)
LARGEST = 1 << 17  # bytes of a command with its environment
NUMBER = struct.Struct("i")


class Fork:
    """A command under way; its methods are those of `subprocess.Popen`.

    Args:
        arguments: What follows `tunesmith`.
        environment: All of it; but what is read when Python or torch start is what `_origin` has set.
        stdin, stdout, stderr: Descriptors or files.
        cwd: Where it runs.
        recording: Where a server keeps its answers, see `recording.py`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: dict[str, str],
        *,
        stdin: int | IO[Any],
        stdout: int | IO[Any],
        stderr: int | IO[Any],
        cwd: Path | None = None,
        recording: Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        command = {
            "arguments": [str(recording), *arguments] if recording else list(arguments),
            "module": "recording" if recording else "tunesmith.cli",
            "environment": environment,
            "cwd": str(cwd or Path.cwd()),
        }
        self._told, told = socket.socketpair()
        standard = [stream if isinstance(stream, int) else stream.fileno() for stream in (stdin, stdout, stderr)]
        with told:
            socket.send_fds(_origin(), [json.dumps(command).encode()], [*standard, told.fileno()])
        self.pid = self._number()

    def _number(self) -> int:
        told = self._told.recv(NUMBER.size, socket.MSG_WAITALL)
        assert told, "the process that commands fork from has ended"
        return int(NUMBER.unpack(told)[0])

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._told.settimeout(timeout)
            self.returncode = self._number()
            self._told.close()
        return self.returncode

    def terminate(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)


class PipedFork(Fork):
    """A command with pipes for its input and output; see `Fork`."""

    def __init__(self, *command: Any, stderr: int | IO[Any], **more: Any) -> None:
        given, self.stdin = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
        self.stdout, out = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
        with given, out:
            super().__init__(*command, stdin=given, stdout=out, stderr=stderr, **more)

    def communicate(self) -> tuple[str, None]:
        self.stdin.close()
        with self.stdout as out:
            said = out.read()
        self.wait()
        return said, None


def run(
    arguments: Sequence[str],
    environment: dict[str, str],
    *,
    input: str = "",
    cwd: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` with `capture_output` and `text` does."""
    with ExitStack() as stack:
        given, out, wrong = (stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(3))
        given.write(input)
        given.seek(0)
        code = Fork(arguments, environment, stdin=given, stdout=out, stderr=wrong, cwd=cwd).wait(timeout)
        out.seek(0)
        wrong.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read(), wrong.read())


@cache
def _origin() -> socket.socket:
    """Start the process that commands fork from, which ends with this one."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, __file__, str(its.fileno())],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[its.fileno()],
        start_new_session=True,
    )
    its.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # which runs first
    return ours


def _next_command(control: socket.socket) -> dict[str, Any] | None:
    """Return, in a new process, the command that is to run there; None when there will be no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that `_keep` runs in
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, LARGEST, 4)
        if not message:
            return None
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            _keep(*descriptors)
            return dict(json.loads(message))
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(stdin: int, stdout: int, stderr: int, told: int) -> None:
    """Return in a new process with these streams; in this one tell its number and, when it ends, its status."""
    pid = os.fork()
    if pid:
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
        os.write(told, NUMBER.pack(pid))
        _, status = os.waitpid(pid, 0)
        os.write(told, NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    os.setsid()
    os.close(told)
    for number, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)


class Ending:
    """Ends the process after all else that is to be done at its end, with the status of what was run.

    Freeing all that was imported, as Python does otherwise, takes longer than most commands.
    """

    def __init__(self) -> None:
        self.code = 1
        atexit.register(self._end)  # before the libraries' own, which run first then

    @contextmanager
    def of(self) -> Iterator[None]:
        """Note the status with which a command ends."""
        try:
            yield
            self.code = 0
        except SystemExit as end:
            self.code = end.code if isinstance(end.code, int) else int(bool(end.code))
            raise

    def _end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


def main() -> None:
    """Fork until the other end is closed; each command runs and ends as one that was started does."""
    ending = Ending()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        command = _next_command(control)
    if command is not None:
        os.environ.clear()
        os.environ.update(command["environment"])
        os.chdir(command["cwd"])
        sys.argv = ["tunesmith", *command["arguments"]]
        with ending.of():
            importlib.import_module(command["module"]).main()


if __name__ == "__main__":
    main()
