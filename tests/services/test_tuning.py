"""TuningService on a real server: options, watching, reports, pause and resume, over REST and gRPC."""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from servers import EXAMPLES, Server, job
from tunesmith import protos

EVERY_STEP = {"TUNESMITH_CHECKPOINT_SECONDS": "0"}
TUNING = "tunesmith.v1beta.TuningService"
LONG = 300  # epochs: more than a test waits for

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: its one worker must be free for these jobs."""
    with Server(tmp_path_factory.mktemp("tuning"), tiny | EVERY_STEP) as running:
        yield running


def tune(server: Server, code: int = 200, name: str | None = None, options: Any = None, **fields: Any) -> Any:
    """Tune with options; return the model's name, or the error."""
    body = {
        "tuned_model": job(**fields),
        "tuned_model_id": name or f"tuned-{next(numbers)}",
        "options": options or {},
    }
    answer = server.call("POST", "tunedModels:tune", body, code)
    return answer["metadata"]["tunedModel"] if code == 200 else answer["error"]


def fifty(**fields: Any) -> dict[str, Any]:
    """A job of fifty examples."""
    body = job(**fields)
    examples = [{"text_input": str(n), "output": str(n + 1)} for n in range(100, 150)]
    body["tuning_task"]["training_data"] = {"examples": {"examples": examples}}
    return body


@contextmanager
def watched(server: Server, name: str, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a job as a browser sees them, each with its `id`, its `event` and its message."""

    def told(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        event: dict[str, Any] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            if name in ("id", "event"):
                event[name] = value
            elif name == "data":
                event["message"] = json.loads(value)
            elif not line and event:
                yield event
                event = {}

    given = {"accept": "text/event-stream", **headers}
    with server.http.stream("GET", f"/v1beta/{name}:watch", headers=given) as response:
        assert response.headers["content-type"] == "text/event-stream"
        yield told(response.iter_lines())


def kinds(events: Iterator[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def until(events: Iterator[dict[str, Any]], kind: str, step: int = 0) -> dict[str, Any]:
    """Read events until one of a kind, and of at least a step."""
    for event in events:
        if event["event"] == kind and event["message"][kind].get("step", 0) >= step:
            return event
    raise AssertionError(f"the stream ended without {kind}")


def watch(server: Server, name: str) -> list[dict[str, Any]]:
    """All events of a job, once it is done."""
    with watched(server, name) as events:
        return [*events]


@contextmanager
def channel(server: Server) -> Iterator[Any]:
    """A function that calls our RPCs over gRPC with the first account's token."""
    token = str(server.http.headers["authorization"])
    with grpc.insecure_channel(server.grpc) as opened:

        def call(name: str, request: Any) -> Any:
            rpc = protos.SERVICES[TUNING].methods_by_name[name]
            make = opened.unary_stream if rpc.server_streaming else opened.unary_unary
            answer = protos.message_class(rpc.output_type)
            method = make(f"/{TUNING}/{name}", lambda message: message.SerializeToString(), answer.FromString)
            return method(request, metadata=(("authorization", token),), timeout=60)

        yield call


def test_a_job_tells_its_story(server: Server) -> None:
    name = tune(server, epochs=2)
    events = watch(server, name)
    assert [event["id"] for event in events if "id" in event] == [
        str(n) for n in range(1, 1 + sum("id" in event for event in events))
    ]
    kept = [event for event in events if "id" in event]
    assert kept[0]["event"] == "queued"
    assert kept[0]["message"]["queued"]["position"] >= 1
    started = next(event for event in kept if event["event"] == "started")["message"]["started"]
    assert started == {"attempt": 1, "totalSteps": 5}
    steps = [event["message"]["step"] for event in kept if event["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    official = server.call("GET", name)["tuningTask"]["snapshots"]
    assert [step["meanLoss"] for step in steps] == [snapshot["meanLoss"] for snapshot in official]
    assert steps[0]["learningRate"] == 0.001
    assert all(step["tokensPerSecond"] > 0 and step["gradientNorm"] > 0 for step in steps)
    assert "etaSeconds" in steps[0]
    assert "etaSeconds" not in steps[-1]  # 0: nothing is left
    assert {"checkpoint"} <= set(kinds(iter(kept)))
    assert kept[-1]["event"] == "finished"
    assert kept[-1]["message"]["finished"] == {"state": "ACTIVE", "completedSteps": 5}
    assert watch(server, name) == kept  # what was kept replays as it was


def test_a_watch_goes_on_where_it_was_cut_off(server: Server) -> None:
    name = tune(server, epochs=1)
    whole = [event for event in watch(server, name) if "id" in event]
    with watched(server, name, **{"last-event-id": "3"}) as rest:
        assert [*rest] == whole[3:]
    last = {"last-event-id": whole[-1]["id"], "accept": "text/event-stream"}
    assert server.http.get(f"/v1beta/{name}:watch", headers=last).status_code == 204
    assert server.call("GET", f"{name}:watch?after_event={whole[-1]['id']}") == []
    assert server.call("GET", f"{name}:watch?afterEvent=2")[0]["eventId"] == 3
    (wrong,) = server.call("GET", f"{name}:watch?afterEvent=-1", code=400)
    assert "WatchTuningRequest.after_event" in wrong["error"]["message"]


def test_the_same_over_grpc(server: Server) -> None:
    request = protos.TuneModelRequest(tuned_model_id="over-grpc")
    request.tuned_model.base_model = "models/tiny-gemma3"
    request.tuned_model.tuning_task.hyperparameters.epoch_count = 1
    for example in EXAMPLES:
        request.tuned_model.tuning_task.training_data.examples.examples.add(**example)
    with channel(server) as call:
        assert call("TuneModel", request).name.startswith("tunedModels/over-grpc/operations/")
        name = "tunedModels/over-grpc"
        events = [*call("WatchTuning", protos.WatchTuningRequest(name=name))]
        assert events[-1].finished.state == protos.TunedModel.ACTIVE
        report = call("GetTuningReport", protos.GetTuningReportRequest(name=name))
        assert report.status.state == protos.TuningStatus.DONE
        assert [step.step for step in report.steps] == [1, 2, 3]
        with pytest.raises(grpc.RpcError) as refused:
            call("PauseTuning", protos.PauseTuningRequest(name=name))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.RpcError) as unknown:
            [*call("WatchTuning", protos.WatchTuningRequest(name="tunedModels/no-such-model"))]
        assert unknown.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_options_are_kept_and_heeded(server: Server) -> None:
    assert tune(server, name="seven", options={"seed": 7}) == "tunedModels/seven"
    tune(server, name="seven-again", options={"seed": 7})
    tune(server, name="another")
    losses = {}
    for name in ("seven", "seven-again", "another"):
        report = finished(server, f"tunedModels/{name}")
        losses[name] = [step["meanLoss"] for step in report["steps"]]
        assert report["recipe"].get("seed") == ("7" if name != "another" else None)
    assert losses["seven"] == losses["seven-again"] != losses["another"]


def finished(server: Server, name: str) -> Any:
    """The report of a job that is done."""
    watch(server, name)
    return server.call("GET", f"{name}:report")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"validation_fraction": 0.9}, "validation_fraction"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"patience": -1}, "patience"),
        ({"patience": 2}, "patience"),  # nothing is held out of ten examples
    ],
)
def test_wrong_options_are_named(server: Server, options: dict[str, Any], field: str) -> None:
    error = tune(server, 400, options=options)
    paths = [violation["field"] for violation in error["details"][0]["fieldViolations"]]
    assert paths == [f"TuneModelRequest.options.{field}"]


def test_all_that_is_wrong_comes_at_once_under_the_requests_own_name(server: Server) -> None:
    body = job(batch=-1)
    body["tuning_task"]["training_data"]["examples"]["examples"] = [{"text_input": "", "output": "2"}]
    error = server.call(
        "POST", "tunedModels:tune", {"tuned_model": body, "options": {"patience": -1, "keep": "LAST"}}, 400
    )["error"]
    paths = [violation["field"] for violation in error["details"][0]["fieldViolations"]]
    task = "TuneModelRequest.tuned_model.tuning_task"
    assert paths == [
        f"{task}.hyperparameters.batch_size",
        "TuneModelRequest.options.patience",
        f"{task}.training_data.examples.examples[0].text_input",
    ]
    missing = server.call("POST", "tunedModels:tune", {"options": {"seed": 1}}, 400)["error"]["message"]
    assert missing == "* TuneModelRequest.tuned_model: tuned_model is not specified"
    assert (
        "keep" in server.call("POST", "tunedModels:tune", {"options": {"keep": "WORST"}}, 400)["error"]["message"]
    )


def test_validation_is_told_and_reported(server: Server) -> None:
    body = {"tuned_model": fifty(epochs=2, batch=10), "tuned_model_id": "fifty", "options": {"keep": "LAST"}}
    server.call("POST", "tunedModels:tune", body)
    events = watch(server, "tunedModels/fifty")
    told = [event["message"]["validation"] for event in events if event["event"] == "validation"]
    assert [one["epoch"] for one in told] == [1, 2]
    report = server.call("GET", "tunedModels/fifty:report")
    assert [one["loss"] for one in report["validations"]] == [one["loss"] for one in told]
    assert report["finalValidation"] == report["validations"][-1]
    assert len(report["recipe"]["heldOutRows"]) == 5
    assert report["recipe"]["trainingRows"] == 45
    shown = report["samples"]
    assert [sample["row"] for sample in shown[:5]] == report["recipe"]["heldOutRows"]
    assert [sample.get("heldOut", False) for sample in shown] == [True] * 5 + [False] * 3
    # Nothing is held out when it is not wanted, by the official method either.
    server.finished(server.tune(fifty(epochs=1, batch=10), tunedModelId="official"))
    assert len(server.call("GET", "tunedModels/official:report")["validations"]) == 1
    server.call(
        "POST", "tunedModels:tune", {**body, "tuned_model_id": "all", "options": {"validationFraction": 0}}
    )
    assert "validations" not in finished(server, "tunedModels/all")


def test_a_report_says_how_it_was_trained(server: Server) -> None:
    name = tune(server, epochs=2, options={"seed": 3})
    report = finished(server, name)
    assert report["name"] == name
    assert report["status"] == {"state": "DONE", "completedSteps": 5, "totalSteps": 5}
    assert report["options"] == {"seed": 3}
    recipe = report["recipe"]
    assert recipe["baseModel"] == "models/tiny-gemma3"
    assert recipe["promptFormat"] == "labelled"
    assert len(recipe["weightsSha256"]) == 64
    assert (recipe["rank"], recipe["trainingRows"]) == (16, 10)
    assert {"q_proj", "down_proj"} <= set(recipe["layers"])
    assert recipe["hyperparameters"] == {"epochCount": 2, "batchSize": 4, "learningRate": 0.001}
    timings = report["timings"]
    assert timings["attempts"] == 1
    assert "interruptions" not in timings
    assert 0 < timings["trainingSeconds"] < timings["totalSeconds"]
    assert timings["queuedSeconds"] < timings["totalSeconds"]
    assert timings["tokensPerSecond"] > 0
    samples = report["samples"]
    assert len(samples) == 8
    assert {"input": samples[0]["input"], "expected": samples[0]["expected"]} == {"input": "1", "expected": "2"}
    body = {"contents": [{"parts": [{"text": "1"}]}], "generationConfig": {"maxOutputTokens": 128}}
    answer = server.call("POST", f"{name}:generateContent", body)["candidates"][0]["content"]["parts"][0]["text"]
    assert samples[0]["tunedAnswer"][:20] == answer[:20]  # further on, random weights show the batch's rounding
    assert samples[0]["baseAnswer"] != samples[0]["tunedAnswer"]
    assert server.call("GET", f"{name}:report") == report  # made once


def test_warnings_about_the_data(server: Server) -> None:
    body = job(epochs=1)
    body["tuning_task"]["training_data"]["examples"]["examples"] = [*EXAMPLES, {"text_input": "1", "output": "7"}]
    server.call("POST", "tunedModels:tune", {"tuned_model": body, "tuned_model_id": "torn"})
    events = watch(server, "tunedModels/torn")
    (warning,) = [event["message"]["warning"] for event in events if event["event"] == "warning"]
    assert warning["kind"] == "contradiction"
    assert warning["rows"] == [0, 10]
    assert server.call("GET", "tunedModels/torn:report")["warnings"] == [warning]


def test_readers_see_no_training_data(server: Server) -> None:
    body = job(epochs=1)
    body["tuning_task"]["training_data"]["examples"]["examples"] = [
        *EXAMPLES,
        {"text_input": "1", "output": "secret"},
    ]
    server.call("POST", "tunedModels:tune", {"tuned_model": body, "tuned_model_id": "shared"})
    server.run("accounts", "create", "tuning-reader@x", "--password-stdin", input="a long password\n")
    who = {"authorization": f"Bearer {server.run('token', 'tuning-reader@x').strip()}"}
    sharing = {"granteeType": "USER", "emailAddress": "tuning-reader@x", "role": "READER"}
    server.call("POST", "tunedModels/shared/permissions", sharing)
    finished(server, "tunedModels/shared")
    seen = server.call("GET", "tunedModels/shared:report", headers=who)
    told = server.call("GET", "tunedModels/shared:watch", headers=who)
    assert "secret" not in json.dumps([seen, told])
    assert seen["warnings"] == [{"kind": "contradiction", "rows": [0, 10]}]
    assert "samples" not in seen
    assert len(seen["steps"]) == 3
    assert "secret" in json.dumps(server.call("GET", "tunedModels/shared:report"))


def test_pause_and_resume(server: Server) -> None:
    twin = finished(server, tune(server, epochs=LONG // 10, options={"seed": 5}))
    name = tune(server, epochs=LONG // 10, options={"seed": 5})
    with watched(server, name) as events:
        until(events, "step", 10)
        asked = server.call("POST", f"{name}:pause", {})
        assert asked["state"] in ("PAUSING", "PAUSED")
        paused = until(events, "paused")["message"]["paused"]
        status = server.call("GET", f"{name}:report")["status"]
        assert status == {"state": "PAUSED", "totalSteps": 75, "completedSteps": paused["completedSteps"]}
        assert paused["completedSteps"] < 75
        operation = server.call("GET", f"{name}/operations")["operations"][0]
        assert "done" not in operation
        assert server.call("GET", name)["state"] == "CREATING"
        server.finished(server.tune(job("others", epochs=1)))  # the worker is free
        assert server.call("POST", f"{name}:pause", {})["state"] == "PAUSED"  # as it was
        assert server.call("POST", f"{name}:resume", {})["state"] in ("QUEUED", "RUNNING")
        until(events, "resumed")
        started = until(events, "started")["message"]["started"]
        assert (started["attempt"], started["interruption"]) == (2, "PAUSED")
        assert until(events, "finished")["message"]["finished"]["state"] == "ACTIVE"
    report = server.call("GET", f"{name}:report")
    assert [step["meanLoss"] for step in report["steps"]] == [step["meanLoss"] for step in twin["steps"]]
    assert (report["timings"]["attempts"], report["timings"]["interruptions"]) == (2, 1)
    for verb in ("pause", "resume"):
        error = server.call("POST", f"{name}:{verb}", {}, 400)["error"]
        assert error["status"] == "FAILED_PRECONDITION"


def test_a_paused_job_stays_so_over_restarts_and_can_be_cancelled(tiny: dict[str, str], tmp_path: Path) -> None:
    with Server(tmp_path / "data", tiny | EVERY_STEP) as server:
        begun, waiting, resumed = (tune(server, epochs=LONG) for _ in range(3))
        with watched(server, begun) as events:
            until(events, "step", 3)
            assert server.call("POST", f"{waiting}:pause", {})["state"] == "PAUSED"
            assert server.call("POST", f"{resumed}:pause", {})["state"] == "PAUSED"
            server.call("POST", f"{begun}:pause", {})
            until(events, "paused")
    with server:
        after = server.tune(job("after", epochs=1))
        server.finished(after)  # nobody is in its way
        for name in (begun, waiting, resumed):
            assert server.call("GET", f"{name}:report")["status"]["state"] == "PAUSED"
        for name in (begun, waiting):
            assert server.call("POST", f"{name}:cancel", {}) == {}
        assert until_end(server, begun) == "ACTIVE"  # with the weights that it had
        assert until_end(server, waiting) == "FAILED"
        server.call("POST", f"{resumed}:resume", {})
        with watched(server, resumed) as events:
            assert until(events, "started")["message"]["started"]["attempt"] == 1
        server.call("DELETE", resumed)


def until_end(server: Server, name: str) -> Any:
    return watch(server, name)[-1]["message"]["finished"]["state"]


def test_waiting_jobs_hear_of_their_place(server: Server) -> None:
    first, second, third = (tune(server, epochs=LONG) for _ in range(3))
    with watched(server, first) as at_work, watched(server, third) as events:
        until(at_work, "step", 2)
        assert next(events)["message"]["queued"]["position"] >= 2
        server.call("DELETE", second)
        while (told := next(events))["message"]["queued"]["position"] != 1:
            pass
        assert "id" not in told  # it is not kept
        assert told["message"]["queued"]["etaSeconds"] > 0
        status = server.call("GET", f"{third}:report")["status"]
        assert (status["state"], status["position"]) == ("QUEUED", 1)
        server.call("POST", f"{first}:cancel", {})
        assert until(events, "started")
    server.call("DELETE", third)
    server.call("DELETE", first)


def test_a_killed_worker_leaves_no_event_twice(server: Server) -> None:
    name = tune(server, epochs=20)
    with watched(server, name) as events:
        until(events, "step", 5)
        children = Path(f"/proc/{server.process.pid}/task").glob("*/children")
        (worker,) = [int(pid) for child in children for pid in child.read_text().split()]
        os.kill(worker, signal.SIGKILL)
        started = until(events, "started")["message"]["started"]
        assert (started["attempt"], started["interruption"]) == (2, "WORKER_ENDED")
        until(events, "finished")
    told = watch(server, name)
    steps = [event["message"]["step"]["step"] for event in told if event["event"] == "step"]
    assert steps == list(range(1, 51))
    assert [int(event["id"]) for event in told] == list(range(1, len(told) + 1))


def test_a_deleted_model_ends_its_watch(server: Server) -> None:
    name = tune(server, epochs=LONG)
    with watched(server, name) as events:
        until(events, "step")
        server.call("DELETE", name)
        while "error" not in (last := next(events, {"message": {"error": None}}))["message"]:
            pass
        assert last["message"]["error"]["status"] == "NOT_FOUND"
    server.call("GET", f"{name}:report", code=404)


def test_watchers_never_use_up_the_threads_of_others(server: Server, tiny: dict[str, str]) -> None:
    name = tune(server, epochs=LONG)
    url, headers = f"{server.url}/v1beta/{name}:watch?alt=sse", dict(server.http.headers)
    begun = threading.Barrier(33, timeout=60)
    end = threading.Event()

    def sit() -> None:
        with httpx2.stream("GET", url, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            begun.wait()
            end.wait(60)

    sitting = [threading.Thread(target=sit) for _ in range(32)]
    for thread in sitting:
        thread.start()
    begun.wait()
    refused = httpx2.get(url, headers=headers)
    assert refused.status_code == 429
    assert "watches_per_account" in refused.text
    assert server.call("GET", f"{name}:report")["name"] == name
    end.set()
    for thread in sitting:
        thread.join()
    server.call("DELETE", name)
    free = tune(server, epochs=1)
    deadline = time.monotonic() + 30
    while httpx2.get(f"{server.url}/v1beta/{free}:watch?alt=sse", headers=headers, timeout=60).status_code == 429:
        assert time.monotonic() < deadline, "watchers that have left keep their places"
        time.sleep(0.1)
    assert watch(server, free)[-1]["event"] == "finished"


def test_changes_are_on_record(server: Server) -> None:
    name = tune(server, epochs=LONG)
    server.call("POST", f"{name}:pause", {})
    server.call("POST", f"{name}:resume", {})
    server.call("DELETE", name)
    lines = server.run("audit", "--model", name)
    for action in ("TuneModel", "PauseTuning", "ResumeTuning", "DeleteTunedModel"):
        assert action in lines
