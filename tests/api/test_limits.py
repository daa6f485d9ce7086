"""What one account may ask for, over REST and through the dispatcher."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.stand_ins import PREFIX, Backend
from google_types import disagreements
from recording import RecordedApp, Recording
from tunesmith import protos
from tunesmith.api import limits as limits_module
from tunesmith.api.dispatch import Dispatcher
from tunesmith.api.limits import Limits
from tunesmith.caller import Credentials
from tunesmith.errors import ApiError, ResourceExhausted

GOOD = Credentials(bearer="good")
STREAM = protos.SERVICES[f"{PREFIX}GenerativeService"].methods_by_name["StreamGenerateContent"]
ANSWER = protos.SERVICES[f"{PREFIX}GenerativeService"].methods_by_name["GenerateContent"]
COUNT = protos.SERVICES[f"{PREFIX}GenerativeService"].methods_by_name["CountTokens"]


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits_module, "time", clock)
    return clock


def prompt(text: str) -> Any:
    request = protos.GenerateContentRequest(model="models/a")
    request.contents.add().parts.add(text=text)
    return request


def behind(backend: Backend, limits: Limits) -> Dispatcher:
    return Dispatcher({f"{PREFIX}GenerativeService": backend.generative}, backend.verifier, limits)


def passed(limits: Limits, account: str, tries: int) -> int:
    count = 0
    for _ in range(tries):
        try:
            limits.request(account)
        except ResourceExhausted:
            continue
        count += 1
    return count


def test_a_minutes_requests_at_once_and_then_as_they_come(clock: Clock):
    limits = Limits(requests_per_minute=30)
    assert passed(limits, "ada", 100) == 30
    assert passed(limits, "bob", 100) == 30  # each account has its own
    clock.now += 2.0
    assert passed(limits, "ada", 100) == 1
    clock.now += 10.0
    assert passed(limits, "ada", 100) == 5
    clock.now += 3600
    assert passed(limits, "ada", 100) == 30  # no more than a minute's


def test_the_refusal_says_when_to_try_again(clock: Clock):
    limits = Limits(requests_per_minute=20)
    passed(limits, "ada", 20)
    with pytest.raises(ResourceExhausted) as refused:
        limits.request("ada")
    wait = refused.value.retry_seconds
    assert wait == 3.0
    clock.now += wait
    limits.request("ada")


def test_zero_is_no_limit():
    limits = Limits()
    assert passed(limits, "ada", 1000) == 1000
    with limits.generation("ada"), limits.generation("ada"):
        pass


def test_threads_together_get_no_more(clock: Clock):
    limits, counts = Limits(requests_per_minute=500), list[int]()
    threads = [threading.Thread(target=lambda: counts.append(passed(limits, "ada", 400))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 500


def test_a_stream_counts_until_it_ends(backend: Backend):
    dispatcher = behind(backend, Limits(generations=2))
    first, second = (dispatcher.stream(STREAM, prompt("hi"), GOOD) for _ in range(2))
    next(first), next(second)
    with pytest.raises(ResourceExhausted, match="generations_per_account"):
        next(dispatcher.stream(STREAM, prompt("hi"), GOOD))
    with pytest.raises(ResourceExhausted):
        dispatcher.call(ANSWER, prompt("hi"), GOOD)
    dispatcher.call(COUNT, protos.CountTokensRequest(model="models/a"), GOOD)  # which generates nothing
    assert len([*first]) == 2  # to its end
    dispatcher.call(ANSWER, prompt("hi"), GOOD)
    second.close()  # nobody reads on
    third, fourth = (dispatcher.stream(STREAM, prompt("hi"), GOOD) for _ in range(2))
    next(third), next(fourth)


@pytest.mark.parametrize("text", ["fail", "break"])
def test_an_answer_that_fails_gives_its_place_up(backend: Backend, text: str):
    dispatcher = behind(backend, Limits(generations=1))
    for _ in range(3):
        with pytest.raises(ApiError) as failed:
            list(dispatcher.stream(STREAM, prompt(text), GOOD))
        assert not isinstance(failed.value, ResourceExhausted)


def test_who_is_unknown_uses_nobodys_requests_up(backend: Backend):
    dispatcher = behind(backend, Limits(requests_per_minute=1))
    for _ in range(5):
        with pytest.raises(ApiError, match="credentials"):
            dispatcher.call(COUNT, protos.CountTokensRequest(model="models/a"), Credentials(bearer="bad"))
    dispatcher.call(COUNT, protos.CountTokensRequest(model="models/a"), GOOD)


@pytest.fixture
def limited(backend: Backend, tmp_path: Path) -> Iterator[TestClient]:
    backend.dispatcher = behind(backend, Limits(requests_per_minute=2))
    app = RecordedApp(backend.app(), Recording(tmp_path / "answers"))
    with TestClient(app, headers={"authorization": "Bearer good"}) as client:
        yield client
    assert disagreements(tmp_path / "answers") == []


def test_over_rest(limited: TestClient):
    ask = {"contents": [{"parts": [{"text": "hi"}]}]}
    for _ in range(2):
        assert limited.post("/v1beta/models/a:countTokens", json=ask).status_code == 200
    refused = limited.post("/v1beta/models/a:countTokens", json=ask, headers={"origin": "https://x.example"})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "30"
    assert "retry-after" in refused.headers["access-control-expose-headers"]
    error = refused.json()["error"]
    assert error["status"] == "RESOURCE_EXHAUSTED"
    assert "limit for each account is 2" in error["message"]
    assert "requests_per_minute" in error["message"]
    failure, retry = error["details"]
    assert failure["@type"] == "type.googleapis.com/google.rpc.QuotaFailure"
    (violation,) = failure["violations"]
    assert violation["quotaId"] == "requests_per_minute"
    assert violation["quotaValue"] == "2"
    assert violation["quotaDimensions"] == {"account": "a@example.com"}
    assert retry["@type"] == "type.googleapis.com/google.rpc.RetryInfo"
    assert 29 < float(retry["retryDelay"].removesuffix("s")) <= 30
    stream = limited.post("/v1beta/models/a:streamGenerateContent", json=ask)
    assert stream.status_code == 429
    assert stream.json()[0]["error"]["status"] == "RESOURCE_EXHAUSTED"
