"""Tuned from tuned: the weights go on from the parent's, and the child outlives it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import Server, job, losses

PARENT = "tunedModels/parent"
ANSWER = {"contents": {"parts": {"text": "1"}}, "generationConfig": {"maxOutputTokens": 4}}


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose worker makes a checkpoint at every step, with a model to tune from."""
    with Server(tmp_path_factory.mktemp("data"), tiny | {"TUNESMITH_CHECKPOINT_SECONDS": "0"}) as running:
        parent = job("parent", epochs=12, temperature=0.7)
        running.finished(running.tune(parent, tunedModelId="parent"))
        yield running


def child(name: str, parent: str = PARENT, **options: Any) -> dict[str, Any]:
    body = job(name, **options)
    del body["base_model"]
    return {**body, "tunedModelSource": {"tunedModel": parent, "baseModel": "models/ignored"}}


def test_a_child_goes_on_where_its_parent_ended(server: Server) -> None:
    before = losses(server.call("GET", f"{PARENT}/operations")["operations"][0])
    operation = server.finished(server.tune(child("child")))
    first = losses(operation)[0]
    assert first < sum(before) / len(before) < before[0]
    model = operation["response"]
    assert model["tunedModelSource"] == {"tunedModel": PARENT, "baseModel": "models/tiny-gemma3"}
    assert "baseModel" not in model
    assert model.get("temperature") == 0  # the base model's, not the parent's
    assert server.call("GET", PARENT)["temperature"] == pytest.approx(0.7)
    assert server.call("POST", f"{model['name']}:generateContent", ANSWER)["candidates"]


def test_the_base_model_field_may_name_the_parent(server: Server) -> None:
    ways = [child("a"), job("b", base_model=PARENT)]
    done = [server.finished(server.tune(body)) for body in ways]
    assert losses(done[0]) == losses(done[1])
    assert done[0]["response"]["tunedModelSource"] == done[1]["response"]["tunedModelSource"]
    assert "baseModel" not in done[1]["response"]


def test_a_grandchild_names_its_parent_and_the_base(server: Server) -> None:
    middle = server.finished(server.tune(child("middle")))["response"]["name"]
    young = server.finished(server.tune(child("young", middle)))["response"]
    assert young["tunedModelSource"] == {"tunedModel": middle, "baseModel": "models/tiny-gemma3"}


def test_a_child_that_is_killed_has_the_same_losses(server: Server) -> None:
    undisturbed = losses(server.finished(server.tune(child("quiet", epochs=8))))
    operation = server.tune(child("disturbed", epochs=8))
    server.until(operation, lambda now: now["metadata"].get("completedSteps", 0) >= 3)
    for worker in workers(server):
        os.kill(worker, signal.SIGKILL)
    assert losses(server.finished(operation)) == undisturbed


@pytest.mark.parametrize("step", [0, 5])
def test_a_child_outlives_its_parent(server: Server, step: int) -> None:
    parent = server.finished(server.tune(job("mortal", epochs=4)))["response"]["name"]
    undisturbed = losses(server.finished(server.tune(child("first", parent, epochs=6))))
    before = server.tune(job("before", epochs=6))  # keeps the worker busy: the child waits
    operation = server.tune(child("orphan", parent, epochs=6))
    server.until(operation, lambda now: now["metadata"].get("completedSteps", 0) >= step)
    assert server.call("DELETE", parent) == {}
    for worker in workers(server):
        os.kill(worker, signal.SIGKILL)  # whoever takes over needs the parent's weights again, or a checkpoint
    done = server.finished(operation)
    assert losses(done) == undisturbed
    model = done["response"]
    assert model["tunedModelSource"]["tunedModel"] == parent
    assert server.call("POST", f"{model['name']}:generateContent", ANSWER)["candidates"]
    server.until(operation, lambda _: not artifacts(server, parent))  # the worker removes it after its job
    server.finished(before)
    assert len(artifacts(server, PARENT)) == 1  # the living are left alone


def test_the_last_child_that_is_deleted_takes_the_parents_weights_along(server: Server) -> None:
    parent = server.finished(server.tune(job("mortal", epochs=1)))["response"]["name"]
    busy = server.tune(job("busy", epochs=100))
    waiting = server.tune(child("waiting", parent))["metadata"]["tunedModel"]
    server.call("DELETE", parent)
    assert len(artifacts(server, parent)) == 1
    server.call("DELETE", waiting)
    assert not artifacts(server, parent)
    server.call("DELETE", busy["metadata"]["tunedModel"])


def test_the_last_child_that_is_cancelled_takes_the_parents_weights_along(server: Server) -> None:
    parent = server.finished(server.tune(job("mortal", epochs=1)))["response"]["name"]
    busy = server.tune(job("busy", epochs=100))
    first, second = (server.tune(child("waiting", parent)) for _ in range(2))
    server.call("DELETE", parent)
    server.call("POST", f"{first['name']}:cancel")
    assert len(artifacts(server, parent)) == 1  # the second one needs it
    server.call("POST", f"{second['metadata']['tunedModel']}:cancel")
    assert not artifacts(server, parent)
    living = server.tune(child("waiting"))
    server.call("POST", f"{living['name']}:cancel")
    assert len(artifacts(server, PARENT)) == 1
    server.call("DELETE", busy["metadata"]["tunedModel"])


def test_a_restart_keeps_what_a_waiting_child_needs(server: Server) -> None:
    parent = server.finished(server.tune(job("mortal", epochs=1)))["response"]["name"]
    busy = server.tune(job("busy", epochs=100))
    operation = server.tune(child("waiting", parent))
    server.call("DELETE", parent)
    server.stop()
    server.start()  # which sweeps
    server.call("DELETE", busy["metadata"]["tunedModel"])
    assert server.finished(operation)["response"]["state"] == "ACTIVE"


def test_a_parent_without_weights(server: Server) -> None:
    operation = server.tune(job("slow", epochs=60))
    parent = operation["metadata"]["tunedModel"]
    error = server.call("POST", "tunedModels", child("early", parent), code=400)["error"]
    assert error["status"] == "FAILED_PRECONDITION"
    assert f"{parent} is in state CREATING: wait until its operation {operation['name']}" in error["message"]
    waiting = server.tune(job("never"))
    server.call("POST", f"{waiting['name']}:cancel")
    failed = waiting["metadata"]["tunedModel"]
    error = server.call("POST", "tunedModels", child("late", failed), code=400)["error"]
    assert error["status"] == "FAILED_PRECONDITION"
    assert f"{failed} is in state FAILED: The operation was cancelled" in error["message"]
    server.call("DELETE", parent)


def test_somebody_elses_parent(server: Server) -> None:
    server.run("accounts", "create", "eve@example.com")
    eve = {"authorization": "", "x-goog-api-key": server.run("api-key", "create", "eve@example.com").strip()}
    for body in (child("hers"), job("hers", base_model=PARENT), child("hers", "tunedModels/never-was")):
        assert server.call("POST", "tunedModels", body, code=403, headers=eve)["error"]["message"].startswith(
            "You do not have permission to access tuned model tunedModels/"
        )


def artifacts(server: Server, model: str) -> list[Path]:
    return list((server.data_dir / "artifacts" / model).glob("*/*/manifest.json"))


def workers(server: Server) -> list[int]:
    """The process ids of a server's workers."""
    children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [int(pid) for child in children for pid in child.read_text().split()]
