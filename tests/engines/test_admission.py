"""Under load an engine refuses at once, and by turns, what it could not answer in time; it counts what it does."""

import threading
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from engines.client import Base, Client
from engines.test_turns import Asking
from tunesmith import protos
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.errors import ApiError, ResourceExhausted, Unavailable

ENDLESS = "the other one is in a tin on the table, and a hat"
"""The tiny Gemma answers it until it is stopped."""


class Answers:
    """What several threads were answered."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.of: dict[str, list[str | ApiError]] = {}

    def ask(self, caller: str, text: str = "hello") -> None:
        found: str | ApiError
        try:
            found = self._client.ask(None, text, 6, caller=caller)
        except ApiError as error:
            found = error
        self.of.setdefault(caller, []).append(found)


def retry_seconds(error: ApiError) -> float:
    (retry,) = error.details
    assert isinstance(retry, protos.RetryInfo)
    seconds: float = retry.retry_delay.ToSeconds()
    return seconds


def test_a_full_queue_refuses_and_who_has_most_waiting_gives_way(
    gemma: Base, float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(gemma, max_batch=1, waiting=2)
    asking, answers = Asking(client, monkeypatch), Answers(client)
    for _ in range(3):  # one has a place, two wait
        asking.add("ada", lambda: answers.ask("ada"))
    with pytest.raises(ResourceExhausted, match=r"already: 2 \(waiting_answers\)") as refused:
        client.ask(None, "hello", caller="ada")
    assert retry_seconds(refused.value) >= 1
    asking.add("bob", lambda: answers.ask("bob"))  # one more of theirs is refused instead
    asking.go_on()
    expected = gemma.text(None, "hello", 6)
    assert answers.of["bob"] == [expected]
    assert answers.of["ada"].count(expected) == 2
    (given_up,) = (answer for answer in answers.of["ada"] if isinstance(answer, ApiError))
    assert isinstance(given_up, ResourceExhausted)
    assert client.ask(None, "hello", 6, caller="ada") == expected
    client.engine.close()


def test_what_would_wait_for_too_long_is_refused_and_what_did_is_given_up(
    gemma: Base, float32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(gemma, max_batch=1, waiting_seconds=60)
    clock = [0.0]
    monkeypatch.setattr(client.runner._admission, "now", lambda: clock[0])
    answer = client.chunks(None, "hello", 6)
    next(answer)
    clock[0] = 100.0  # that is how long answers take
    assert list(answer)[-1].finish_reason
    running = client.chunks(None, ENDLESS, 1400)
    next(running)
    with pytest.raises(
        ResourceExhausted, match=r"wait for its turn for about 100 seconds, and 60 are the most"
    ) as no:
        client.ask(None, "hello")
    assert retry_seconds(no.value) == 40
    running.close()
    for _ in range(2):  # the runner has taken the step that sees it
        client.runner.logprob([1, 2], 1, None)
    assert client.ask(None, "hello", 6) == gemma.text(None, "hello", 6)  # nothing is before it

    client.runner._admission._took = None  # as long as nothing is known, they are let in
    asking, answers = Asking(client, monkeypatch), Answers(client)
    for _ in range(2):
        asking.add("ada", lambda: answers.ask("ada"))
    clock[0] = 161.0
    asking.go_on()
    assert [type(answer) for answer in answers.of["ada"]] == [Unavailable, Unavailable]
    assert "did not come within 60 seconds" in str(answers.of["ada"][0])
    client.engine.close()


def test_embeddings_wait_in_the_same_queue(gemma: Base, float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(gemma, max_batch=1, waiting=1)
    asking, gone = Asking(client, monkeypatch), threading.Event()
    asking.add("ada", lambda: client.engine.embed(gemma.model, ["hello"], gone, "ada"))
    with pytest.raises(ResourceExhausted):
        client.engine.embed(gemma.model, ["hello"], gone, "bob")
    assert asking.go_on() == ["ada"]
    client.engine.close()


def test_metrics(gemma: Base, float32: None) -> None:
    registry = CollectorRegistry()
    client = Client(gemma, loaded_adapters=1, metrics=EngineMetrics(registry))

    def value(name: str, **labels: Any) -> float:
        found = registry.get_sample_value(f"tunesmith_{name}", {"model": gemma.model.id, **labels})
        return found or 0.0

    for adapter in (None, "one", "one", "two"):
        client.ask(adapter, "hello", 6)
    assert value("adapter_loads_total") == value("adapter_load_seconds_count") == 2
    assert (value("adapter_hits_total"), value("adapter_evictions_total"), value("adapters")) == (1, 1, 1)
    assert value("wait_seconds_count") == value("first_token_seconds_count") == 4
    lengths = [len(gemma.tokens(adapter, "hello", 6)) for adapter in (None, "one", "one", "two")]
    assert sum(lengths) <= value("output_tokens_total") <= sum(lengths) + 4  # with the ends
    assert value("prompt_tokens_total") > 4
    assert value("batch_size_sum") == value("batch_size_count")  # one at a time
    gone = threading.Event()
    gone.set()
    with pytest.raises(ApiError):
        client.ask(None, "hello", gone=gone)
    assert value("refused_answers_total", reason="gone") == 1
    client.engine.close()
