"""Faults, each injected into real worker processes beside a real server: every job ends in a clear state."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from jobs import processes
from servers import TIMEOUT, Server, job, losses
from tunesmith.jobs.queue import JobQueue
from tunesmith.jobs.worker import CHECKPOINT_SHARE
from tunesmith.login import CLIENT_ID
from tunesmith.store.database import Database

EVERY_STEP = {"TUNESMITH_CHECKPOINT_SECONDS": "0", "TUNESMITH_LEASE_SECONDS": "2"}
LONG = job(epochs=60)  # 150 steps


class Workers:
    """Worker processes beside a server that starts none."""

    def __init__(self, server: Server) -> None:
        self._server, self._started = server, dict[str, BaseProcess]()
        self.log = server.data_dir.parent / f"{server.data_dir.name}.workers.log"

    def start(self, fault: processes.Fault | None = None, *args: Any, **settings: str) -> BaseProcess:
        environment = {name: value for name, value in self._server.environment.items() if "TUNESMITH" in name}
        environment |= {"TUNESMITH_DATA_DIR": str(self._server.data_dir), **settings}
        name = f"worker-{time.monotonic_ns()}"
        self._started[name] = processes.start_worker(name, environment, self.log, fault, *args)
        return self._started[name]

    def buried(self, worker: BaseProcess) -> None:
        """Wait for a worker's end, and note it as the launcher of its process does."""
        worker.join(TIMEOUT)
        (name,) = [name for name, process in self._started.items() if process is worker]
        database = Database(f"sqlite:///{self._server.data_dir / 'tunesmith.db'}")
        JobQueue(database, lease_seconds=60).release(name)
        database.close()

    def stop(self) -> None:
        for process in self._started.values():
            process.kill()
            self.buried(process)
        self._started.clear()


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without workers."""
    with Server(tmp_path_factory.mktemp("faults"), tiny | EVERY_STEP, "--workers", "0") as server:
        yield server


@pytest.fixture
def workers(server: Server) -> Iterator[Workers]:
    workers = Workers(server)
    yield workers
    workers.stop()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[float]:
    """The losses of the long job when nobody disturbs it."""
    workers = Workers(server)
    workers.start()
    found = losses(server.finished(server.tune(LONG)))
    workers.stop()
    return found


def reaches(step: int) -> Any:
    return lambda operation: operation["metadata"].get("completedSteps", 0) >= step


def ended_well(server: Server, operation: dict[str, Any]) -> list[float]:
    done = server.finished(operation)
    assert "error" not in done, done
    assert done["response"]["state"] == "ACTIVE"
    return losses(done)


def failed(server: Server, operation: dict[str, Any]) -> str:
    """Check that an operation ends with a FAILED model, of which nothing is left; return the reason."""
    done = server.finished(operation)
    assert server.call("GET", done["metadata"]["tunedModel"])["state"] == "FAILED"
    eventually(lambda: not artifacts(server, operation))
    reason: str = done["error"]["message"]
    assert report(server, operation)["reason"] == reason
    return reason


def report(server: Server, operation: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = server.call("GET", f"{operation['metadata']['tunedModel']}:report")
    return found


def warnings(server: Server, operation: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["kind"], one["message"]) for one in report(server, operation).get("warnings", [])]


def kinds(server: Server, operation: dict[str, Any]) -> list[str]:
    return [kind for kind, _ in warnings(server, operation)]


def told(server: Server, operation: dict[str, Any], kind: str) -> str:
    """Wait for a warning; return what it says."""
    eventually(lambda: kind in kinds(server, operation))
    return dict(warnings(server, operation))[kind]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def artifacts(server: Server, operation: dict[str, Any]) -> list[str]:
    """The names of a job's artifacts, in the order of the alphabet."""
    folder = server.data_dir / "artifacts" / operation["metadata"]["tunedModel"]
    return sorted(path.name for path in folder.glob("*/*"))


def watched(server: Server, operation: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a job, once it is done."""
    name, stream = operation["metadata"]["tunedModel"], {"accept": "text/event-stream"}
    lines = server.http.get(f"/v1beta/{name}:watch", headers=stream).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def moment(event: dict[str, Any]) -> float:
    """When an event was told, in seconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def rows(lengths: list[int], batch: int) -> dict[str, Any]:
    """A job on examples whose inputs have so many letters."""
    body = job(epochs=1, batch=batch)
    examples = [{"text_input": "x" * length, "output": "y"} for length in lengths]
    body["tuning_task"]["training_data"]["examples"]["examples"] = examples
    return body


def test_twenty_kills_at_random_steps(server: Server, workers: Workers, undisturbed: list[float]) -> None:
    operation = server.tune(LONG)
    step, draw = 0, random.Random(7)
    for _ in range(20):
        worker = workers.start()
        done = server.until(operation, reaches(step + draw.randint(1, 5)))
        worker.kill()
        workers.buried(worker)
        step = server.call("GET", done["name"])["metadata"]["completedSteps"]
    workers.start()
    assert ended_well(server, operation) == undisturbed
    assert report(server, operation)["timings"]["attempts"] == 21


def test_checkpoints_come_at_bounded_intervals(server: Server, workers: Workers) -> None:
    workers.start(TUNESMITH_CHECKPOINT_SECONDS="0.1")
    operation = server.tune(LONG)
    ended_well(server, operation)
    events = watched(server, operation)
    steps = {event["step"]["step"]: moment(event) for event in events if "step" in event}
    made = {event["checkpoint"]["step"]: moment(event) for event in events if "checkpoint" in event}
    assert len(made) > 1
    for last, step in pairwise(made):
        cost = steps[last + 1] - steps[last]  # at most: a step is in it too
        assert steps[step - 1] - made[last] <= max(0.1, CHECKPOINT_SHARE * cost) + cost
        assert made[step] - made[last] >= 0.1


def test_killed_while_writing_a_checkpoint(server: Server, workers: Workers, undisturbed: list[float]) -> None:
    operation = server.tune(LONG)
    workers.buried(workers.start(processes.killed_writing_checkpoint, 30))
    folder = server.data_dir / "artifacts" / operation["metadata"]["tunedModel"]
    found = {path.name: (path / "manifest.json").exists() for path in folder.glob("*/checkpoint-*")}
    assert found == {"checkpoint-1-29": True, "checkpoint-1-30": False}
    workers.start()
    assert ended_well(server, operation) == undisturbed
    eventually(lambda: artifacts(server, operation) == ["adapter-2"])


def test_a_damaged_checkpoint_is_not_the_jobs_end(
    server: Server, workers: Workers, undisturbed: list[float]
) -> None:
    operation = server.tune(LONG)
    workers.buried(workers.start(processes.killed_writing_checkpoint, 30))
    folder = server.data_dir / "artifacts" / operation["metadata"]["tunedModel"]
    (file,) = folder.glob("*/checkpoint-1-29/checkpoint.safetensors")
    file.write_bytes(b"x")
    workers.start()
    assert ended_well(server, operation) == undisturbed
    (message,) = [message for kind, message in warnings(server, operation) if kind == "checkpoint_lost"]
    assert "Training begins anew" in message


def test_what_the_system_kills_for_its_memory_goes_on_with_half_of_it(server: Server, workers: Workers) -> None:
    operation = server.tune(rows([200] * 8, batch=8))
    workers.buried(workers.start(processes.killed_above, 300))
    workers.start(processes.killed_above, 300)
    found = ended_well(server, operation)
    (message,) = [message for kind, message in warnings(server, operation) if kind == "micro_batch"]
    assert "ended before it finished a step, perhaps for want of memory" in message
    workers.stop()
    workers.start()
    assert found == pytest.approx(ended_well(server, server.tune(rows([200] * 8, batch=8))), rel=1e-3)


def test_a_poison_job_is_given_up_and_the_next_one_runs(server: Server, workers: Workers) -> None:
    worker = workers.start(processes.killed_above, 100)
    parent = server.finished(server.tune(job("parent")))["response"]["name"]
    body = rows([150], batch=1) | {"base_model": None, "tuned_model_source": {"tuned_model": parent}}
    poison, after = server.tune(body), server.tune(job("after"))
    server.call("DELETE", parent)
    kept = server.data_dir / "artifacts" / parent
    assert kept.exists()  # for the job that starts from it
    workers.buried(worker)
    for _ in range(2):
        workers.buried(workers.start(processes.killed_above, 100))
    workers.start(processes.killed_above, 100)
    reason = failed(server, poison)
    assert "ended 3 times in a row without finishing a step" in reason
    assert "Try shorter examples or a smaller base model, or ask the server's operator" in reason
    ended_well(server, after)
    assert not kept.exists()


def test_an_example_that_memory_does_not_hold_is_named(server: Server, workers: Workers) -> None:
    worker = workers.start(processes.no_memory_above, 100)
    reason = failed(server, server.tune(rows([20, 150, 20, 130], batch=4)))
    assert "not enough memory for step 1, not even for one example at a time" in reason
    assert "longest example has 169 tokens" in reason
    assert "1 of all 4 are as long or longer: shorten or split them" in reason
    ended_well(server, server.tune(job("after")))
    assert worker.is_alive()


def test_a_step_without_memory_takes_less(server: Server, workers: Workers) -> None:
    lengths = [200] * 200
    operation = server.tune(rows(lengths, batch=200))
    worker = workers.start(processes.little_memory, 250)
    found = ended_well(server, operation)
    assert worker.is_alive()
    messages = [message for kind, message in warnings(server, operation) if kind == "micro_batch"]
    assert messages
    assert all("Memory ran out" in message for message in messages)
    workers.stop()
    workers.start()
    assert found == pytest.approx(ended_well(server, server.tune(rows(lengths, batch=200))), rel=1e-3)


def test_a_loss_that_is_no_number_names_the_learning_rate(server: Server, workers: Workers) -> None:
    workers.start(processes.weights_overflow, 5)
    reason = failed(server, server.tune(LONG))
    assert "diverged: the loss of step 6 is not a number" in reason
    assert "learning rate below 0.001" in reason


def test_a_clock_that_jumps_changes_nothing(server: Server, workers: Workers, undisturbed: list[float]) -> None:
    operation = server.tune(LONG)
    for _ in range(2):  # the one that does not get the job looks at its lease
        workers.start(processes.clock_jumps, 3600.0, 40)
    assert ended_well(server, operation) == undisturbed
    found = report(server, operation)
    assert found["timings"]["attempts"] == 1
    assert 0 <= found["timings"].get("totalSeconds", 0.0) < TIMEOUT  # known or not, but never less than nothing


def test_a_worker_that_froze_past_its_lease_is_replaced_and_leaves_the_job(
    server: Server, workers: Workers, undisturbed: list[float]
) -> None:
    operation = server.tune(LONG)
    frozen = workers.start(TUNESMITH_LEASE_SECONDS="1")
    server.until(operation, reaches(5))
    assert frozen.pid
    processes.freeze(frozen.pid, server.data_dir / "tunesmith.db")
    step = server.call("GET", operation["name"])["metadata"]["completedSteps"]
    workers.start(TUNESMITH_LEASE_SECONDS="1")
    server.until(operation, reaches(step + 20))
    os.kill(frozen.pid, signal.SIGCONT)
    assert ended_well(server, operation) == undisturbed
    assert report(server, operation)["timings"]["attempts"] == 2
    eventually(lambda: "no longer holds job" in workers.log.read_text())
    assert frozen.is_alive()


def test_a_database_that_another_process_locks(
    tiny: dict[str, str], data_dir: Path, undisturbed: list[float]
) -> None:
    quick = {"TUNESMITH_DATABASE_WAIT_SECONDS": "0.5", "TUNESMITH_LEASE_SECONDS": "1"}
    with Server(data_dir, tiny | EVERY_STEP | quick, "--workers", "2") as server:
        operation = server.tune(LONG)
        server.until(operation, reaches(5))
        locked = sqlite3.connect(data_dir / "tunesmith.db", isolation_level=None, timeout=TIMEOUT)
        locked.execute("BEGIN IMMEDIATE")
        step = server.call("GET", operation["name"])["metadata"]["completedSteps"]
        until = time.monotonic() + 3  # more than the lease
        while time.monotonic() < until:
            refused = server.call("POST", "tunedModels", job("refused"), code=503)["error"]
        assert refused["status"] == "UNAVAILABLE"
        assert "locked by another process" in refused["message"]
        asked = server.http.post("/device/code", data={"client_id": CLIENT_ID, "scope": "openid"})
        assert (asked.status_code, asked.json()["error"]) == (503, "temporarily_unavailable")
        assert server.call("GET", operation["name"])["metadata"]["completedSteps"] == step
        locked.execute("ROLLBACK")
        locked.close()
        assert ended_well(server, operation) == undisturbed
        assert report(server, operation)["timings"]["attempts"] == 1
        listed = server.call("GET", "tunedModels")["tunedModels"]
        assert [model["displayName"] for model in listed] == ["counts"]


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A disk of its own at a path."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk up; return the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return filler
    raise AssertionError("unlimited")


def test_no_space_for_checkpoints_and_adapter(
    tiny: dict[str, str], data_dir: Path, tmp_path: Path, undisturbed: list[float]
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        artifacts = {"TUNESMITH_ARTIFACTS_URL": f"file://{disk}/artifacts"}
        with Server(data_dir, tiny | EVERY_STEP | artifacts) as server:
            filler = fill(disk)
            operation = server.tune(LONG)
            message = told(server, operation, "checkpoint_not_stored")
            assert f"no space left on device: free 2 MB in {disk}/artifacts" in message
            message = told(server, operation, "adapter_not_stored")
            assert "no space left on device: free 2 MB" in message
            model = operation["metadata"]["tunedModel"]
            assert not list(disk.glob(f"artifacts/{model}/*/adapter-*"))
            assert server.call("GET", model)["state"] == "CREATING"
            server.call("POST", f"{model}:pause", {})  # the worker is free for others meanwhile
            eventually(lambda: report(server, operation)["status"]["state"] == "PAUSED")
            server.call("POST", f"{model}:resume", {})
            eventually(lambda: kinds(server, operation).count("adapter_not_stored") == 2)
            filler.unlink()
            assert ended_well(server, operation) == undisturbed
            assert kinds(server, operation).count("checkpoint_not_stored") == 2  # once an attempt
            assert "adapter was not stored" in Path(server.log.name).read_text()


def test_no_space_for_the_database(tiny: dict[str, str], tmp_path: Path, undisturbed: list[float]) -> None:
    with small_disk(tmp_path / "disk", "40m") as disk, Server(disk / "data", tiny | EVERY_STEP) as server:
        operation = server.tune(LONG)
        server.until(operation, reaches(5))
        filler = fill(disk)
        refused = server.call("POST", "tunedModels", rows([4000] * 100, 1), code=503)["error"]
        assert refused["status"] == "UNAVAILABLE"
        assert "space" in refused["message"]
        filler.unlink()
        assert ended_well(server, operation) == undisturbed


def test_a_worker_that_stops_while_the_database_is_locked_ends(server: Server, workers: Workers) -> None:
    operation = server.tune(LONG)
    worker = workers.start(TUNESMITH_DATABASE_WAIT_SECONDS="0.2")
    server.until(operation, reaches(5))
    locked = sqlite3.connect(server.data_dir / "tunesmith.db", isolation_level=None, timeout=TIMEOUT)
    locked.execute("BEGIN IMMEDIATE")
    assert worker.pid
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(TIMEOUT)
    assert worker.exitcode == 0
    locked.execute("ROLLBACK")
    locked.close()
    workers.start()
    ended_well(server, operation)
