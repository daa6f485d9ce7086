"""Nothing that is killed loses a job: real servers and workers, real signals."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import Server, job, losses

EVERY_STEP = {"TUNESMITH_CHECKPOINT_SECONDS": "0"}
LONG = job(epochs=60)  # 150 steps


@pytest.fixture(scope="module")
def careful(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose worker makes a checkpoint at every step."""
    with Server(tmp_path_factory.mktemp("careful"), tiny | EVERY_STEP) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(careful: Server) -> list[float]:
    """The losses of the job when nobody disturbs it."""
    return losses(careful.finished(careful.tune(LONG)))


def workers(server: Server) -> list[int]:
    """The process ids of a server's workers."""
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [int(pid) for child in children for pid in child.read_text().split()]


def reaches(step: int) -> Any:
    return lambda operation: operation["metadata"].get("completedSteps", 0) >= step


def ended_well(server: Server, operation: dict[str, Any]) -> list[float]:
    """Check that an operation ends with an ACTIVE model that answers; return its losses."""
    done = server.finished(operation)
    assert "error" not in done
    assert done["response"]["state"] == "ACTIVE"
    body = {"contents": [{"parts": [{"text": "1"}]}], "generationConfig": {"maxOutputTokens": 4}}
    name = done["response"]["name"]
    assert server.call("POST", f"{name}:generateContent", body)["candidates"]
    assert len(list((server.data_dir / "artifacts" / name).glob("*/*"))) == 1  # the adapter, no checkpoint
    return losses(done)


def test_a_worker_killed_at_three_steps(careful: Server, undisturbed: list[float]) -> None:
    operation = careful.tune(LONG)
    for step in (3, 47, 101):
        careful.until(operation, reaches(step))
        (worker,) = workers(careful)
        os.kill(worker, signal.SIGKILL)
    assert ended_well(careful, operation) == undisturbed


def test_cancel_keeps_the_weights_so_far(careful: Server) -> None:
    operation = careful.tune(LONG)
    careful.until(operation, reaches(3))
    assert careful.call("POST", f"{operation['name']}:cancel") == {}
    done = careful.finished(operation)
    assert done["error"]["code"] == 1
    assert "response" not in done
    name = done["metadata"]["tunedModel"]
    assert 3 <= len(losses(done)) < 150
    assert careful.call("GET", name)["state"] == "ACTIVE"
    body = {"contents": [{"parts": [{"text": "1"}]}], "generationConfig": {"maxOutputTokens": 4}}
    assert careful.call("POST", f"{name}:generateContent", body)["candidates"]


def test_deleting_a_model_ends_its_job_and_leaves_nothing(careful: Server) -> None:
    operation = careful.tune(LONG)
    careful.until(operation, reaches(3))
    name = operation["metadata"]["tunedModel"]
    assert careful.call("DELETE", name) == {}
    assert careful.call("GET", name, code=404)["error"]["message"] == f"Tuned model {name} does not exist."
    careful.call("GET", operation["name"], code=404)
    ended_well(careful, careful.tune(job("next")))  # the worker is free
    left = careful.data_dir / "artifacts" / name
    assert not left.exists() or not list(left.glob("*/*/manifest.json"))


def test_without_a_checkpoint_a_job_starts_again(
    tiny: dict[str, str], data_dir: Path, undisturbed: list[float]
) -> None:
    never = {"TUNESMITH_CHECKPOINT_SECONDS": "1000", "TUNESMITH_LEASE_SECONDS": "1000"}
    server = Server(data_dir, tiny | never)
    with server:
        operation = server.tune(LONG)
        server.until(operation, reaches(20))
        (worker,) = workers(server)
        os.kill(worker, signal.SIGKILL)  # the server, who sees it die, does not wait for the lease
        assert ended_well(server, operation) == undisturbed
        operation = server.tune(LONG)
        server.until(operation, reaches(5))
    with server:  # a server that stops puts its job back
        assert ended_well(server, operation) == undisturbed


def test_the_whole_server_killed(tiny: dict[str, str], data_dir: Path, undisturbed: list[float]) -> None:
    server = Server(data_dir, tiny | EVERY_STEP | {"TUNESMITH_LEASE_SECONDS": "2"})
    server.start()
    operation = server.tune(LONG)
    waiting = server.tune(job("waiting"))
    for step in (10, 60):
        server.until(operation, reaches(step))
        server.kill()
        server.start()
    assert ended_well(server, operation) == undisturbed
    ended_well(server, waiting)
    server.stop()
