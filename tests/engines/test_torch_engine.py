import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from engines.client import Base, Client
from tunesmith import protos
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.engines import runner as runner_module
from tunesmith.engines.network import Piece
from tunesmith.engines.runner import Request
from tunesmith.engines.torch_engine import TorchEngine
from tunesmith.errors import Cancelled, FailedPrecondition, Internal, InvalidArgument, NotFound, Unavailable

TEXTS = ["hello", "one two three four", "the cat is in the hat and on the tin", "a", "七 and 六", "Zebra 12"]
ENDLESS = "the other one is in a tin on the table, and a hat"
"""The tiny Gemma answers it until it is stopped."""

SAMPLED = {"temperature": 1.3, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize("adapter", [None, "one", "two", "attention"])
def test_alone_it_answers_as_peft_does(client: Client, adapter: str | None):
    for text in TEXTS[:3]:
        assert client.ask(adapter, text) == client.base.text(adapter, text, 24)


def test_adapters_mixed_in_one_batch_answer_as_alone(client: Client, monkeypatch: pytest.MonkeyPatch):
    questions = [
        {"adapter": adapter, "text": text} for text in TEXTS[:4] for adapter in (None, "one", "two", "attention")
    ]
    expected = [client.base.text(one["adapter"], one["text"], 24) for one in questions]
    client.ask_all(questions[:4])  # the adapters are loaded, which takes the runner
    widest, asked, all_asked = [], [], threading.Event()
    decode, submit = client.runner._decode, client.runner.submit

    def submitted(*requests: Request) -> None:
        submit(*requests)
        asked.extend(requests)
        if len(asked) == len(questions):
            all_asked.set()

    def watched() -> None:
        all_asked.wait(30)
        widest.append(len(client.runner._running))
        decode()

    monkeypatch.setattr(client.runner, "submit", submitted)
    monkeypatch.setattr(client.runner, "_decode", watched)
    assert client.ask_all(questions) == expected
    assert max(widest) > 4  # they did run together
    assert len(set(expected)) > len(TEXTS[:4])  # and the adapters do matter


def test_requests_join_and_leave_while_others_go_on(gemma: Base, float32: None):
    client = Client(gemma, max_batch=3)
    questions = [
        {"adapter": adapter, "text": text, "count": count}
        for text, count in zip(TEXTS, (40, 3, 17, 1, 29, 8), strict=True)
        for adapter in (None, "one")
    ]
    expected = [gemma.text(one["adapter"], one["text"], one["count"]) for one in questions]
    assert client.ask_all(questions) == expected
    client.engine.close()


def test_rows_that_leave_give_up_their_place(gemma_client: Client):
    gemma_client.ask_all([{"adapter": None, "text": text, "count": 5} for text in TEXTS])
    assert is_idle(gemma_client)


def test_sliding_window(gemma_client: Client):
    text = "the cat is in the hat and on the tin " * 3
    prompt = FORMATS["plain"].prompt(gemma_client.base.weights.tokenizer(), [Turn("user", text)])
    assert len(prompt) > 4 * tiny.SLIDING_WINDOW
    assert gemma_client.ask(None, text, 40) == gemma_client.base.text(None, text, 40)


def ask_together(client: Client, questions: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ask so that all are in the queue, in this order, before the runner takes its next step."""
    runner = client.runner
    step, submit, opened = runner._step, runner.submit, threading.Event()
    queued = threading.Semaphore(0)
    requests: list[Request] = []

    def hold_back(request: Request) -> None:
        requests.append(request)
        queued.release()

    def held_step() -> None:
        assert opened.wait(30)
        step()

    monkeypatch.setattr(runner, "submit", hold_back)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.extend(client.ask_all(questions)))
    asking.start()
    for _ in questions:
        assert queued.acquire(timeout=30)
    monkeypatch.setattr(runner, "_step", held_step)
    for request in sorted(requests, key=lambda request: -len(request.prompt)):
        submit(request)
    opened.set()
    asking.join(30)
    return answers


def test_long_prompts_come_in_chunks_between_which_others_go_on(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "CHUNK", 32)
    long = "the cat is in the hat and on the tin " * 8
    questions = [
        {"adapter": "one", "text": long},
        {"adapter": "two", "text": long[1:]},
        {"adapter": None, "text": "hello"},
        {"adapter": "one", "text": "one"},
        {"adapter": "two", "text": "a"},
    ]
    expected = [client.base.text(one["adapter"], one["text"], 24) for one in questions]
    for name in ("one", "two"):
        client.ask(name, "a", 1)  # loads it
    passes = []
    forward = client.runner._network.forward

    def watched(pieces: Sequence[Piece]) -> torch.Tensor:
        passes.append((len(pieces), max(len(piece.tokens) for piece in pieces)))
        return forward(pieces)

    monkeypatch.setattr(client.runner._network, "forward", watched)
    assert ask_together(client, questions, monkeypatch) == expected
    assert max(rows * width for rows, width in passes) <= 32
    long_ones = [number for number, (_, width) in enumerate(passes) if width == 32]
    decoding = [number for number, (_, width) in enumerate(passes) if width == 1]
    assert len(long_ones) > 12
    assert decoding[0] < long_ones[6]  # the short ones took their turn before a long one was done


def test_short_prompts_are_computed_together(client: Client, monkeypatch: pytest.MonkeyPatch):
    prefills = []
    chunk = client.runner._prefill_chunk

    def watched(prefill: Any) -> Any:
        prefills.append(len(prefill.requests))
        return chunk(prefill)

    monkeypatch.setattr(client.runner, "_prefill_chunk", watched)
    questions = [{"adapter": None, "text": text} for text in TEXTS]
    expected = [client.base.text(None, text, 24) for text in TEXTS]
    assert ask_together(client, questions, monkeypatch) == expected
    assert prefills == [len(TEXTS)]


def test_growing_past_a_block_of_the_cache(gemma_client: Client):
    questions = [{"adapter": "one", "text": "hello", "count": 400}, {"adapter": None, "text": "a", "count": 300}]
    expected = [gemma_client.base.text(one["adapter"], one["text"], one["count"]) for one in questions]
    assert gemma_client.ask_all(questions) == expected


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(client: Client):
    alone = [client.ask("one", text, seed=number, **SAMPLED) for number, text in enumerate(TEXTS)]
    again = client.ask_all(
        [{"adapter": "one", "text": text, "seed": number, **SAMPLED} for number, text in enumerate(TEXTS)]
        + [{"adapter": "two", "text": text, **SAMPLED} for text in TEXTS]
    )
    assert again[: len(TEXTS)] == alone


def test_seeds_differ_and_none_draws_one(client: Client):
    assert len({client.ask(None, "hello", seed=seed, **SAMPLED) for seed in (1, 2, -3)}) == 3
    assert len({client.ask(None, "hello", **SAMPLED) for _ in range(3)}) == 3


def test_top_k_1_is_greedy(client: Client):
    greedy = client.ask("one", "hello")
    assert client.ask("one", "hello", temperature=2.0, top_k=1) == greedy
    assert client.ask("one", "hello", temperature=2.0, top_p=1e-6) == greedy


@pytest.mark.parametrize("after", [1, 4, 9])
def test_stop_sequences_end_the_answer_and_are_not_part_of_it(gemma_client: Client, after: int):
    whole = gemma_client.ask(None, "hello", 40)
    stop = whole[after : after + 4]  # of single letters, so it lies across tokens
    chunks = list(gemma_client.chunks(None, "hello", 40, stop_sequences=("never", stop)))
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == protos.Candidate.STOP


def test_max_output_tokens(gemma_client: Client):
    chunks = list(gemma_client.chunks(None, "hello", 7))
    assert chunks[-1].finish_reason == protos.Candidate.MAX_TOKENS
    assert chunks[-1].output_tokens == len(gemma_client.base.tokens(None, "hello", 7)) == 7
    assert chunks[-1].prompt_tokens == len(TEXTS[0])  # <bos>, h, e+l... the pair "he" is one token
    assert all(chunk.finish_reason == 0 for chunk in chunks[:-1])
    assert [chunk.output_tokens for chunk in chunks] == sorted(chunk.output_tokens for chunk in chunks)


def test_stop_tokens_end_the_answer_and_are_not_counted(client: Client):
    adapter, text = next(
        (adapter, text)
        for adapter in (None, "one", "two", "attention")
        for text in TEXTS
        if len(client.base.tokens(adapter, text, 60)) < 60
    )
    last = list(client.chunks(adapter, text, 60))[-1]
    assert last.finish_reason == protos.Candidate.STOP
    assert last.output_tokens == len(client.base.tokens(adapter, text, 60))


def test_the_model_ends_where_its_positions_do(gemma_client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gemma_client.runner, "longest", 12)
    last = list(gemma_client.chunks(None, "hello", 40))[-1]
    assert (last.prompt_tokens + last.output_tokens, last.finish_reason) == (12, protos.Candidate.MAX_TOKENS)


def test_too_long_a_prompt(gemma_client: Client):
    with pytest.raises(InvalidArgument, match=r"token count \(1601\) exceeds the maximum .* \(1536\)"):
        gemma_client.ask(None, "x" * 1600)


def test_count_tokens_is_the_prompt_that_generate_makes(client: Client):
    for adapter in (None, "one"):
        counted = client.engine.count_tokens(client.base.model, adapter, [Turn("user", "hello")])
        assert counted == next(iter(client.chunks(adapter, "hello"))).prompt_tokens
    with pytest.raises(NotFound):
        client.engine.count_tokens(client.base.model, "absent", [Turn("user", "hello")])


def test_weights_that_are_not_here(gemma: Base, float32: None, tmp_path):
    with (
        pytest.raises(FailedPrecondition, match="not on this machine"),
    ):
        TorchEngine(gemma.store, tmp_path, device="cpu").preload(gemma.model)


def is_idle(client: Client) -> bool:
    """Whether the runner has nothing left; asked between two steps."""
    client.runner.logprob([1, 2], 1, None)
    return client.runner._running == [] and client.runner._network._cache.lengths == []


def test_gone_ends_a_request_that_runs(gemma_client: Client):
    gone = threading.Event()
    chunks = gemma_client.chunks(None, ENDLESS, 1400, gone)
    next(chunks)
    gone.set()
    with pytest.raises(Cancelled):
        list(chunks)
    assert is_idle(gemma_client)


def test_gone_ends_a_request_that_waits(gemma: Base, float32: None):
    client = Client(gemma, max_batch=1)
    first = client.chunks(None, ENDLESS, 1400)
    next(first)
    gone = threading.Event()
    gone.set()
    with pytest.raises(Cancelled):  # though the only place is taken
        client.ask(None, "one", gone=gone)
    assert not is_idle(client)
    first.close()
    client.engine.close()


def test_closing_the_iterator_frees_the_place(gemma: Base, float32: None):
    client = Client(gemma, max_batch=1)
    chunks = client.chunks(None, ENDLESS, 1400)
    next(chunks)
    chunks.close()
    assert is_idle(client)
    assert client.ask(None, "one", 3) == gemma.text(None, "one", 3)  # in the only place
    client.engine.close()


def fails_once(monkeypatch: pytest.MonkeyPatch, runner: Any, method: str, error: Exception) -> None:
    original = getattr(runner, method)

    def failing(*args: Any) -> Any:
        monkeypatch.setattr(runner, method, original)
        raise error

    monkeypatch.setattr(runner, method, failing)


@pytest.mark.parametrize("method", ["_decode", "_prefill_chunk", "_admit"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError()])
def test_an_error_in_a_step_ends_the_requests_and_not_the_runner(
    gemma_client: Client, monkeypatch: pytest.MonkeyPatch, caplog, method: str, error: Exception
):
    expected = gemma_client.ask(None, "hello")
    fails_once(monkeypatch, gemma_client.runner, method, error)
    if method == "_admit":  # what still waits is none of the failed step's business
        assert gemma_client.ask(None, "hello") == expected
    else:
        with pytest.raises(Internal, match="An internal error has occurred"):
            gemma_client.ask(None, "hello")
    assert [record for record in caplog.records if record.exc_info and record.exc_info[1] is error]
    assert gemma_client.ask(None, "hello") == expected


def test_a_prefill_that_fails_leaves_the_running_alone(gemma_client: Client, monkeypatch: pytest.MonkeyPatch):
    expected = gemma_client.base.text(None, "hello", 200)
    chunks = gemma_client.chunks(None, "hello", 200)
    text = next(chunks).text
    fails_once(monkeypatch, gemma_client.runner, "_prefill_chunk", RuntimeError("out of memory"))
    with pytest.raises(Internal):
        gemma_client.ask(None, "one")
    assert text + "".join(chunk.text for chunk in chunks) == expected


def test_close_ends_what_runs_and_what_waits(gemma: Base, float32: None):
    client = Client(gemma, max_batch=1)
    running = client.chunks(None, ENDLESS, 1400)
    next(running)
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.extend(client.ask_all([{"adapter": None, "text": "a"}])))
    submitted, runner = threading.Event(), client.runner
    submit = runner.submit
    runner.submit = lambda request: (submit(request), submitted.set())
    thread.start()
    assert submitted.wait(30)
    client.engine.close()
    with pytest.raises(Unavailable):
        list(running)
    thread.join(30)
    assert isinstance(waiting[0], Unavailable)
    with pytest.raises(Unavailable):
        client.ask(None, "hello")
    assert not runner._thread.is_alive()


def test_bfloat16_answers_as_transformers_does(base: Base, monkeypatch: pytest.MonkeyPatch):
    """The product with packed weights: the scores are transformers' own up to bfloat16's rounding."""
    client = Client(base)
    monkeypatch.setattr("tunesmith.engines.torch_engine.compute_dtype", lambda device: torch.bfloat16)
    tokens = list(range(270, 300))
    expected = tiny.mean_logprob(base.reference, tokens, 10)
    assert client.runner.logprob(tokens, 10, None) == pytest.approx(expected, abs=0.15)
    client.engine.close()


def test_candidates_are_what_their_seeds_give_alone(client: Client):
    alone = [client.ask("one", "hello", seed=seed, **SAMPLED) for seed in (7, 8, 9, 10)]
    chunks = list(client.chunks("one", "hello", seed=7, candidates=4, **SAMPLED))
    together = ["", "", "", ""]
    for chunk in chunks:
        together[chunk.index] += chunk.text
    assert together == alone
    ends = {chunk.index: chunk for chunk in chunks if chunk.finish_reason}
    assert sorted(ends) == [0, 1, 2, 3]
    assert [chunk for chunk in chunks if chunk.index == 2][-1] is ends[2]  # nothing after a candidate's end
    order = [chunk.index for chunk in chunks]
    assert order != sorted(order)  # they come as they are made


def test_a_candidate_that_meets_a_stop_sequence_ends_alone(gemma_client: Client):
    options = {"seed": 7, "candidates": 4, **SAMPLED}
    whole = ["", "", "", ""]
    for chunk in gemma_client.chunks("one", "hello", 40, **options):
        whole[chunk.index] += chunk.text
    stop = next(text[3:5] for text in whole if len(text) > 8)
    cut = ["", "", "", ""]
    for chunk in gemma_client.chunks("one", "hello", 40, stop_sequences=(stop,), **options):
        cut[chunk.index] += chunk.text
    assert cut == [text.partition(stop)[0] for text in whole]
    assert cut != whole
    assert is_idle(gemma_client)


def test_a_candidate_that_has_ended_gives_up_its_place(gemma_client: Client):
    options = {"candidates": 2, **SAMPLED}
    for seed in range(50):
        texts = ["", ""]
        for chunk in gemma_client.chunks(None, ENDLESS, 200, seed=seed, **options):
            texts[chunk.index] += chunk.text
        stop = texts[0][3:7]
        if len(stop) == 4 and len(texts[1]) > 150 and stop not in texts[1]:
            break
    ended = threading.Event()
    for chunk in gemma_client.chunks(None, ENDLESS, 200, seed=seed, stop_sequences=(stop,), **options):
        if chunk.index == 0 and chunk.finish_reason:
            ended.set()
            gemma_client.runner.logprob([1, 2], 1, None)  # between two steps
            assert len(gemma_client.runner._running) == 1
    assert ended.is_set()


def embedding(client: Client, text: str) -> list[float]:
    """What transformers and a plain mean give."""
    form, tokenizer = FORMATS[client.base.model.untuned_prompt_format], client.base.weights.tokenizer()
    tokens, first = form.passage(tokenizer, text)
    with torch.inference_mode():
        hidden = client.base.reference.base_model(input_ids=torch.tensor([tokens])).last_hidden_state
    mean = hidden[0, first:].mean(0)
    values: list[float] = (mean / mean.norm()).tolist()
    return values


def test_embeddings_are_the_mean_of_the_last_hidden_states(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "CHUNK", 32)
    texts = [*TEXTS, "the cat is in the hat and on the tin " * 8, "b"]  # the long one takes several passes
    passes: list[tuple[int, ...]] = []
    forward = client.runner._network.forward

    def watched(pieces: Sequence[Piece]) -> torch.Tensor:
        passes.append((len(pieces), max(len(piece.tokens) for piece in pieces)))
        return forward(pieces)

    monkeypatch.setattr(client.runner._network, "forward", watched)
    for text, vector in zip(texts, client.engine.embed(client.base.model, texts, threading.Event()), strict=True):
        assert vector == pytest.approx(embedding(client, text), abs=1e-4)
    assert max(rows * width for rows, width in passes) <= 32
    assert max(rows for rows, _ in passes) > 1  # short ones share a pass


def test_embedding_while_others_are_answered(gemma_client: Client):
    expected = gemma_client.base.text("one", "hello", 60)
    chunks = gemma_client.chunks("one", "hello", 60)
    text = next(chunks).text
    vectors = gemma_client.engine.embed(gemma_client.base.model, TEXTS * 4, threading.Event())
    assert vectors[0] == pytest.approx(embedding(gemma_client, TEXTS[0]), abs=1e-4)
    assert text + "".join(chunk.text for chunk in chunks) == expected


def test_an_embedding_that_nobody_waits_for(gemma_client: Client):
    gone = threading.Event()
    gone.set()
    with pytest.raises(Cancelled):
        gemma_client.engine.embed(gemma_client.base.model, ["hello"], gone)
    with pytest.raises(InvalidArgument, match="token count"):
        gemma_client.engine.embed(gemma_client.base.model, ["x" * 1600], threading.Event())
