"""The vLLM engine against what vLLM 0.32.0 answered; `make test-vllm` runs the same tests on a real server."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

import tiny
from engines.vllm_model import LONGEST, publish, vllm_weights
from engines.vllm_server import BASE, VllmServer
from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.engines.admission import Admission
from tunesmith.engines.base import Chunk, Constraint, Sampling
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.places import Places
from tunesmith.engines.vllm_adapters import FILES, VllmAdapters
from tunesmith.engines.vllm_client import VllmClient
from tunesmith.engines.vllm_engine import VllmEngine
from tunesmith.errors import (
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from tunesmith.store.artifacts import ArtifactStore

GREEDY = Sampling(0.0, 0.95, 64, 12)
SAMPLED = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}
REAL = os.environ.get("TUNESMITH_TEST_VLLM", "")
"""A real server with the model of vllm_model.py as `base`; its answers are recorded."""


class Bench:
    """The engine with its server and its adapters, and what PEFT says of these."""

    def __init__(self, path: Path, server: VllmServer) -> None:
        self.model, self.weights = vllm_weights(path / "cache")
        self.store = ArtifactStore(f"file://{path / 'artifacts'}")
        self.sound = publish(self.store, self.weights)
        self.server, self.path = server, path

    def engine(
        self,
        url: str = "",
        capacity: int = 4,
        silence: float = 400.0,
        places: int = 8,
        metrics: CollectorRegistry | None = None,
    ) -> VllmEngine:
        client = VllmClient(url or self.server.url, silence_seconds=silence)
        folder, told = self.path / "pushed", EngineMetrics(metrics)
        adapters = VllmAdapters(self.store, client, folder, str(folder), capacity, told)
        queue = Places(places, Admission(1, 60.0), told, self.model.id)
        return VllmEngine(self.store, self.path / "cache", client, self.model.id, "", adapters, queue, told)

    def prompt(self, text: str, adapter: str | None) -> list[int]:
        form = FORMATS["plain" if adapter is None else "labelled"]
        return form.prompt(self.weights.tokenizer(), [Turn("user", text)])

    def folders(self) -> list[str]:
        """The adapters that lie there for the server."""
        return [path.name for path in (self.path / "pushed").glob("*/*") if path.is_dir()]

    def peft(self, adapter: str | None, text: str, count: int = 12) -> str:
        """What transformers and PEFT answer."""
        answer = self.weights.tokenizer().decode(self.peft_tokens(adapter, text, count))
        return str(answer if adapter is None else answer.removeprefix(" "))

    def peft_tokens(self, adapter: str | None, text: str, count: int = 12) -> list[int]:
        """The same, as tokens without the answer's end."""
        model = tiny.reference_model(self.weights) if adapter is None else self.sound[adapter]
        stops = FORMATS["labelled"].stop_tokens(self.weights.tokenizer())
        return tiny.greedy(model, self.prompt(text, adapter), count, stops)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with VllmServer(REAL) as server:
        yield Bench(tmp_path_factory.mktemp("vllm"), server)
        if REAL:
            server.save()


@pytest.fixture
def engine(bench: Bench) -> Iterator[VllmEngine]:
    bench.server.restart()
    made = bench.engine()
    yield made
    made.close()


def ask(engine: VllmEngine, bench: Bench, adapter: str | None, text: str, **fields: Any) -> list[Chunk]:
    sampling = Sampling(**vars(GREEDY) | fields)
    return [*engine.generate(bench.model, adapter, [Turn("user", text)], sampling, threading.Event())]


def text_of(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


@pytest.mark.parametrize("adapter", [None, "one", "two"])
def test_it_answers_as_peft_does(engine: VllmEngine, bench: Bench, adapter: str | None) -> None:
    for text in ("hello", "the cat is in the hat", "七 and 六"):
        chunks = ask(engine, bench, adapter, text)
        assert text_of(chunks) == bench.peft(adapter, text)
        assert chunks[-1].prompt_tokens == len(bench.prompt(text, adapter))
        count = len(bench.peft_tokens(adapter, text))
        assert chunks[-1].output_tokens == count
        ended = protos.Candidate.STOP if count < 12 else protos.Candidate.MAX_TOKENS
        assert chunks[-1].finish_reason == ended
        turns = [Turn("user", text)]
        assert engine.count_tokens(bench.model, adapter, turns) == len(bench.prompt(text, adapter))


@pytest.mark.parametrize("adapter", ["misnamed", "zeroed"])
def test_an_adapter_without_effect_is_refused(engine: VllmEngine, bench: Bench, adapter: str) -> None:
    with pytest.raises(Internal, match="the adapter has no effect"):
        ask(engine, bench, adapter, "hello")
    assert bench.server.loaded == {}  # nor does it stay there
    assert bench.folders() == []


def test_an_adapter_with_another_effect_is_refused(engine: VllmEngine, bench: Bench) -> None:
    with pytest.raises(Internal, match="does not answer as it did when it was trained: the mean"):
        ask(engine, bench, "swapped", "hello")


def test_other_weights(engine: VllmEngine, bench: Bench) -> None:
    with pytest.raises(FailedPrecondition, match="was trained on other weights"):
        ask(engine, bench, "elsewhere", "hello")
    with pytest.raises(FailedPrecondition, match=r"has other weights as base than .* start it with --model"):
        ask(engine, bench, "foreign", "hello")
    with pytest.raises(NotFound):
        ask(engine, bench, "absent", "hello")
    other = bench.model.model_copy(update={"id": "other"})
    with pytest.raises(FailedPrecondition, match="models/other is not served here"):
        next(engine.generate(other, None, [Turn("user", "a")], GREEDY, threading.Event()))


def test_a_rank_that_the_server_does_not_take(engine: VllmEngine, bench: Bench) -> None:
    with pytest.raises((Internal, InvalidArgument), match=r"max_lora_rank"):
        ask(engine, bench, "wide", "hello")


def test_least_recently_used_out_first(bench: Bench) -> None:
    bench.server.restart()
    engine = bench.engine(capacity=1)
    for name in ("one", "two", "one"):
        assert text_of(ask(engine, bench, name, "hello")) == bench.peft(name, "hello")
        assert [loaded.rpartition("-")[0] for loaded in bench.server.loaded] == [name]
        assert bench.folders() == [*bench.server.loaded]
    engine.close()
    assert bench.server.loaded == {}
    assert not [*(bench.path / "pushed").iterdir()]


def test_what_an_ended_process_left_is_taken_away(engine: VllmEngine, bench: Bench) -> None:
    left = bench.path / "pushed" / "tunesmith-0" / "one-0"
    left.mkdir(parents=True)
    for name in FILES:
        (left / name).write_bytes(bench.store.read("one")[name])
    client = VllmClient(bench.server.url)
    client.load("one-0", str(left))
    client.close()
    assert "one-0" in bench.server.loaded
    text = text_of(ask(engine, bench, "one", "hello"))
    assert text == bench.peft("one", "hello")
    assert not left.parent.exists()
    assert "one-0" not in bench.server.loaded


def test_adapters_are_pushed_again_after_a_restart(engine: VllmEngine, bench: Bench) -> None:
    expected = ask(engine, bench, "one", "hello")
    bench.server.restart()
    assert text_of(ask(engine, bench, "one", "hello")) == text_of(expected)
    assert len(bench.server.loaded) == 1
    bench.server.breaks = 1  # a connection that was kept ends with the server
    assert text_of(ask(engine, bench, "one", "hello")) == text_of(expected)


def test_a_server_that_is_not_there(bench: Bench) -> None:
    with VllmServer(REAL) as other:
        engine = bench.engine(other.url)
        ask(engine, bench, None, "hello")
    for _ in range(2):
        with pytest.raises(Unavailable, match="Please retry") as told:
            ask(engine, bench, None, "hello")
        assert told.value.retry_seconds == 10
    engine.close()


def test_a_server_that_says_nothing(bench: Bench) -> None:
    engine = bench.engine(silence=0.2)
    if REAL:
        ask(bench.engine(), bench, None, "hello")
    bench.server.stalls = True
    try:
        with pytest.raises(Unavailable, match="vllm_silence_seconds"):
            ask(engine, bench, None, "hello")
    finally:
        bench.server.stalls = False
        engine.close()


@pytest.mark.parametrize("how", ["gone", "closed iterator", "closed engine"])
def test_who_leaves_ends_the_answer_at_the_server(bench: Bench, how: str) -> None:
    server, gone, engine = bench.server, threading.Event(), bench.engine()
    server.stalled.clear()
    server.hung_up.clear()
    server.stalls = True
    try:
        answer = engine.generate(bench.model, None, [Turn("user", "hello")], GREEDY, gone)
        assert next(answer).text
        assert server.stalled.wait(30)
        assert not server.hung_up.is_set()
        if how == "closed iterator":
            answer.close()
        elif how == "gone":
            threading.Thread(target=gone.set).start()
            with pytest.raises(Cancelled):
                next(answer)
        else:
            threading.Thread(target=engine.close).start()
            with pytest.raises(Unavailable, match="shutting down"):
                next(answer)
        assert server.hung_up.wait(30)
    finally:
        server.stalls = False
        engine.close()


def test_stop_sequences(engine: VllmEngine, bench: Bench) -> None:
    whole = bench.peft("one", "one", 24)  # ": Cid7CU C C C9':八3L:"
    stop = whole[4:7]
    chunks = ask(engine, bench, "one", "one", stop_sequences=(stop, " "), max_output_tokens=24)
    assert text_of(chunks) == whole[: whole.index(" ")]  # not the one that opens every answer
    assert chunks[-1].finish_reason == protos.Candidate.STOP
    chunks = ask(engine, bench, "one", "one", stop_sequences=(stop, ""), max_output_tokens=24)
    assert text_of(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == protos.Candidate.STOP


def test_candidates_and_seeds(engine: VllmEngine, bench: Bench) -> None:
    chunks = ask(engine, bench, "one", "hello", candidates=3, seed=-1, **SAMPLED)
    texts = [text_of(chunks, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert text_of(ask(engine, bench, "one", "hello", seed=1, **SAMPLED)) == texts[2]
    assert sum(bool(chunk.finish_reason) for chunk in chunks) == 3
    greedy = ask(engine, bench, "one", "hello", candidates=2)
    assert text_of(greedy, 0) == text_of(greedy, 1) == bench.peft("one", "hello")


def test_penalties(engine: VllmEngine, bench: Bench) -> None:
    tokens = {}
    for penalty in (0.0, 2.0):
        fields = {"frequency_penalty": penalty, "logprobs": 0, "max_output_tokens": 30}
        chunks = ask(engine, bench, None, "hello", **fields)
        tokens[penalty] = [place.chosen.token for chunk in chunks for place in chunk.places]
    assert len(set(tokens[2.0])) > len(set(tokens[0.0]))


def test_logprobs(engine: VllmEngine, bench: Bench) -> None:
    chunks = ask(engine, bench, "one", "one", logprobs=3)
    places = [place for chunk in chunks for place in chunk.places]
    prompt, tokens = bench.prompt("one", "one"), [place.chosen.token for place in places]
    mean = tiny.mean_logprob(bench.sound["one"], [*prompt, *tokens], len(prompt))
    assert sum(place.chosen.logprob for place in places) / len(places) == pytest.approx(mean, abs=1e-3)
    assert len(places) == 12
    for place in places:
        assert [one.logprob for one in place.top] == sorted((one.logprob for one in place.top), reverse=True)
        assert len(place.top) == 3
        assert place.top[0] == place.chosen  # greedy
    without = ask(engine, bench, "one", "one", logprobs=0)
    assert all(place.top == () for chunk in without for place in chunk.places)


@pytest.mark.parametrize("adapter", [None, "one"])
def test_constraints(engine: VllmEngine, bench: Bench, adapter: str | None) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": [7, 12]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    chunks = ask(engine, bench, adapter, "hello", constraint=Constraint("f", schema), max_output_tokens=40)
    assert text_of(chunks) in ('{"a": 7}', '{"a": 12}')
    assert chunks[-1].finish_reason == protos.Candidate.STOP
    chunks = ask(engine, bench, adapter, "hello", constraint=Constraint("f", choices=("red", "green")))
    assert text_of(chunks) in ("red", "green")
    with pytest.raises(InvalidArgument, match=r"\* f: "):
        ask(engine, bench, adapter, "hello", constraint=Constraint("f", {"type": "nothing"}))


def test_a_server_that_ignores_constraints(
    engine: VllmEngine, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = VllmClient.stream

    def older(client: VllmClient, body: dict[str, Any], gone: threading.Event) -> Iterator[dict[str, Any]]:
        return stream(client, {key: value for key, value in body.items() if key != "structured_outputs"}, gone)

    monkeypatch.setattr(VllmClient, "stream", older)
    with pytest.raises(Internal, match="does not hold answers to a schema"):
        ask(engine, bench, None, "hello", constraint=Constraint("f", choices=("red", "green")))


def test_long_prompts(engine: VllmEngine, bench: Bench) -> None:
    with pytest.raises(InvalidArgument, match=rf"exceeds the maximum number of tokens allowed \({LONGEST - 1}\)"):
        ask(engine, bench, None, "z" * LONGEST)
    chunks = ask(engine, bench, None, "z" * (LONGEST - 5), max_output_tokens=256)
    assert chunks[-1].prompt_tokens + chunks[-1].output_tokens == LONGEST
    assert chunks[-1].finish_reason == protos.Candidate.MAX_TOKENS


def refusal(engine: VllmEngine, bench: Bench) -> ResourceExhausted | None:
    """Ask for somebody who has left; return the error when there was no room to wait for a place."""
    gone = threading.Event()
    gone.set()
    try:
        next(engine.generate(bench.model, None, [Turn("user", "hello")], GREEDY, gone))
    except ResourceExhausted as error:
        return error
    except Cancelled:
        return None
    raise AssertionError("a client that has left was answered")


def test_more_than_it_has_places_for_wait_or_are_refused(bench: Bench) -> None:
    engine, gone = bench.engine(places=1), threading.Event()
    first = engine.generate(bench.model, None, [Turn("user", "hello")], GREEDY, gone, "ada")
    text = next(first).text  # and it keeps its place
    answers: list[str] = []
    second = threading.Thread(target=lambda: answers.append(text_of(ask(engine, bench, None, "hello"))))
    second.start()
    refused = None
    while refused is None:  # until the other one waits, these have its place
        refused = refusal(engine, bench)
    assert "waiting_answers" in refused.message
    assert refused.retry_seconds == 1
    assert not answers
    text += text_of([*first])
    second.join(30)
    assert [text] == answers == [bench.peft(None, "hello")]
    engine.close()


def test_metrics(bench: Bench) -> None:
    bench.server.restart()
    registry = CollectorRegistry()
    engine = bench.engine(capacity=1, metrics=registry)

    def value(name: str) -> float:
        return registry.get_sample_value(f"tunesmith_{name}", {"model": bench.model.id}) or 0.0

    for adapter in (None, "one", "one", "two"):
        ask(engine, bench, adapter, "hello")
    assert value("adapter_loads_total") == value("adapter_load_seconds_count") == 2
    assert (value("adapter_hits_total"), value("adapter_evictions_total"), value("adapters")) == (1, 1, 1)
    assert value("wait_seconds_count") == value("first_token_seconds_count") == 4
    asked = [(None, bench.prompt("hello", None)), *((name, bench.prompt("hello", name)) for name in ("one",) * 2)]
    asked.append(("two", bench.prompt("hello", "two")))
    assert value("prompt_tokens_total") == sum(len(prompt) for _, prompt in asked)
    tokens = sum(len(bench.peft_tokens(adapter, "hello")) for adapter, _ in asked)
    assert tokens <= value("output_tokens_total") <= tokens + 4  # with the ends
    assert (value("running_answers"), value("waiting_answers")) == (0, 0)
    engine.close()


def test_embeddings_are_not_implemented(engine: VllmEngine, bench: Bench) -> None:
    with pytest.raises(Unimplemented, match="engine = vllm"):
        engine.embed(bench.model, ["hello"], threading.Event())


def test_ready_when_the_server_is(bench: Bench) -> None:
    engine = bench.engine("http://127.0.0.1:1")
    ended: list[Exception] = []

    def preload() -> None:
        try:
            engine.preload(bench.model)
        except Unavailable as error:
            ended.append(error)

    waiting = threading.Thread(target=preload)
    waiting.start()
    engine.close()
    waiting.join(30)
    assert len(ended) == 1
    engine = bench.engine()
    engine.preload(bench.model)
    assert ("/v1/models", {}) in bench.server.asked
    assert engine._base().name == BASE
    engine.close()
