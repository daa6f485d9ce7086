"""Real servers and workers in processes of their own, for tests."""

import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx2

from forks import PipedFork
from forks import run as run_fork
from google_types import disagreements
from tiny import tiny_cache

EXAMPLES = [{"text_input": str(n), "output": str(n + 1)} for n in range(1, 11)]
TIMEOUT = 180.0  # seconds, for what takes a few where nothing else runs
RECORDED = str(Path(__file__).with_name("recording.py"))
FREE_PORTS = ("--port", "0", "--grpc-port", "0")


def tiny_catalog(path: Path) -> dict[str, str]:
    """Make a weights cache and a catalog with a tiny default model; return the environment that selects them."""
    model, cache = tiny_cache(path / "cache")
    fields = model.model_dump(mode="json", exclude={"id"}, exclude_none=True)
    block = "\n".join(f"{key} = {value!r}" for key, value in fields.items())
    catalog = path / "catalog.toml"
    catalog.write_text(f'default = "{model.id}"\n[models.{model.id}]\n{block}\n')
    # One thread: for a model this small, threads that wait for each other take most of the time.
    return {"TUNESMITH_CATALOG": str(catalog), "TUNESMITH_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


def job(name: str = "counts", epochs: int = 2, batch: int = 4, **fields: Any) -> dict[str, Any]:
    """The body of a create: ten examples on the default base model."""
    return {
        "display_name": name,
        "base_model": "models/tiny-gemma3",
        "tuning_task": {
            "hyperparameters": {"epoch_count": epochs, "batch_size": batch, "learning_rate": 0.001},
            "training_data": {"examples": {"examples": EXAMPLES}},
        },
        **fields,
    }


class Server:
    """A `tunesmith serve` on a free port of the loopback interface; ends with the block.

    When it ends, Google's own types must agree with all that it answered over REST and gRPC.
    """

    def __init__(self, data_dir: Path, environment: dict[str, str], *options: str, ca: Path | None = None) -> None:
        self.data_dir = data_dir
        self.environment = {**os.environ, "PYTHONWARNINGS": "default", **environment}
        self.environment.pop("COLUMNS", None)  # which tests that run side by side have: pipes are wide
        self.environment["XDG_CONFIG_HOME"] = str(data_dir.parent / "config")  # not the developer's sign-ins
        self._options = options
        self._verify = ssl.create_default_context(cafile=ca)
        self.recording = data_dir.parent / f"{data_dir.name}.answers"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait for the line that names its address."""
        self.log = (self.data_dir.parent / f"{self.data_dir.name}.log").open("a")
        self.process = self._process("serve", *FREE_PORTS, "--stop-with-stdin", *self.where(), *self._options)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Tunesmith serves "):
                self.url = line.split()[-1]
            elif line.startswith("  gRPC "):
                self.grpc = line.split()[1]
                break
        else:
            raise AssertionError(f"the server did not start: {Path(self.log.name).read_text()}")
        token = self.run("token", "admin@localhost").strip()
        self.http = httpx2.Client(
            base_url=self.url, headers={"authorization": f"Bearer {token}"}, timeout=TIMEOUT, verify=self._verify
        )

    def _process(self, *arguments: str) -> "subprocess.Popen[str] | PipedFork":
        if may_fork(self.environment):
            return PipedFork(arguments, self.environment, stderr=self.log, recording=self.recording)
        return subprocess.Popen(
            [sys.executable, RECORDED, str(self.recording), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=self.environment,
            start_new_session=True,
        )

    def stop(self) -> None:
        """End it as an operator would."""
        self.http.close()
        self.process.terminate()
        self._ended()

    def kill(self) -> None:
        """End it and its workers with SIGKILL, all at once."""
        self.http.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self._ended()

    def _ended(self) -> None:
        self.process.communicate()
        self.log.close()
        assert not (wrong := disagreements(self.recording)), "\n".join(wrong[:10])
        self.recording.unlink(missing_ok=True)

    def where(self) -> list[str]:
        """The options that name the data dir."""
        return ["--data-dir", str(self.data_dir)]

    def run(self, *arguments: str, code: int = 0, **options: Any) -> str:
        """Run a command on the server's data dir and return what it prints."""
        done = run([*arguments, *self.where()], self.environment, **options)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def call(self, method: str, path: str, body: Any = None, code: int = 200, **options: Any) -> Any:
        """Call the API as the first account and return the JSON of an answer with the expected code."""
        response = self.http.request(method, f"/v1beta/{path}", json=body, **options)
        assert response.status_code == code, response.text
        return response.json()

    def tune(self, body: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        """Create a tuned model and return its operation."""
        operation: dict[str, Any] = self.call("POST", "tunedModels", body, params=parameters)
        return operation

    def finished(self, operation: dict[str, Any]) -> dict[str, Any]:
        """Return an operation once it is done."""
        return self.until(operation, lambda now: bool(now.get("done")))

    def until(self, operation: dict[str, Any], holds: Any) -> dict[str, Any]:
        """Poll an operation until something holds of it."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            now: dict[str, Any] = self.call("GET", operation["name"])
            if holds(now):
                return now
            time.sleep(0.1)
        raise AssertionError(f"not in {TIMEOUT} s: {now}\n{Path(self.log.name).read_text()}")


def run(arguments: Sequence[str], environment: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does."""
    if may_fork(environment):
        return run_fork(arguments, environment, **options)
    return subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, check=False, **options
    )


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tunesmith", *arguments]


def may_fork(environment: dict[str, str]) -> bool:
    """Whether a command may fork from a process whose torch has one thread: not one with the real weights."""
    return environment.get("OMP_NUM_THREADS") == "1"


def losses(operation: dict[str, Any]) -> list[float]:
    """The losses of an operation, step by step, which must be numbered without a gap."""
    snapshots = operation["metadata"]["snapshots"]
    assert [snapshot["step"] for snapshot in snapshots] == list(range(1, len(snapshots) + 1))
    return [snapshot["meanLoss"] for snapshot in snapshots]
