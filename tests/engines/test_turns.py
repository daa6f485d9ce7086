"""Callers take turns in the engine."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from engines.client import Base, Client
from tunesmith.engines.turns import Turns

LONG = "the cat is in the hat and on the tin "


def taken(turns: Turns[str], under_way: dict[str, int] | None = None) -> list[str]:
    order = []
    while turn := turns.next(under_way or {}):
        caller, item = turn
        assert turns.take(caller) == item
        order.append(item)
    return order


def test_callers_take_turns_each_in_order():
    turns = Turns[str]()
    turns.add("ada", ["a1", "a2", "a3", "a4"])
    turns.add("bob", ["b1", "b2"])
    turns.add("eve", ["e1"])
    assert len(turns) == 7
    assert taken(turns) == ["a1", "b1", "e1", "a2", "b2", "a3", "a4"]
    assert len(turns) == 0


def test_who_comes_back_comes_last():
    turns = Turns[str]()
    turns.add("ada", ["a1", "a2"])
    turns.add("bob", ["b1"])
    assert turns.take("ada") == "a1"
    assert turns.take("bob") == "b1"
    turns.add("bob", ["b2"])
    assert taken(turns) == ["a2", "b2"]


def test_who_has_least_under_way_comes_first():
    turns = Turns[str]()
    turns.add("ada", ["a1"])
    turns.add("bob", ["b1"])
    assert turns.next({"ada": 2, "bob": 1}) == ("bob", "b1")


def test_what_nobody_waits_for_any_more_takes_no_turn():
    turns = Turns[str]()
    turns.add("ada", ["a1", "a2"])
    turns.add("bob", ["b1"])
    turns.keep(lambda item: item in ("a2",))
    assert [*turns] == ["a2"]
    assert taken(turns) == ["a2"]


class Asking:
    """Asks one engine from many threads; all are in the queue, in the order of the calls, before it goes on."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[str] = []
        self._runner = client.runner
        self._opened, self._queued, self._lock = threading.Event(), threading.Semaphore(0), threading.Lock()
        self._threads: list[threading.Thread] = []
        step = self._runner._step

        def held_step() -> None:
            assert self._opened.wait(30)
            step()

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                result = method(*arguments)
                self._queued.release()
                return result

            return call

        monkeypatch.setattr(self._runner, "_step", held_step)
        monkeypatch.setattr(self._runner._waiting, "add", counted(self._runner._waiting.add))
        monkeypatch.setattr(self._runner._tasks, "add", counted(self._runner._tasks.add))

    def add(self, caller: str, ask: Callable[[], object]) -> None:
        """Ask from a thread, and wait until it is in the queue."""

        def run() -> None:
            ask()
            with self._lock:
                self.ended.append(caller)

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)
        assert self._queued.acquire(timeout=30)

    def go_on(self) -> list[str]:
        """Let the engine work; return the callers as their answers end."""
        self._opened.set()
        for thread in self._threads:
            thread.join(60)
        return self.ended


@pytest.mark.parametrize("batch", [1, 2])
def test_many_requests_of_one_caller_do_not_delay_anothers(
    gemma: Base, float32: None, monkeypatch: pytest.MonkeyPatch, batch: int
):
    client = Client(gemma, max_batch=batch)
    asking = Asking(client, monkeypatch)
    for number in range(8):
        asking.add("ada", lambda number=number: client.ask(None, f"{LONG} {number}", 6, caller="ada"))
    asking.add("bob", lambda: client.ask(None, LONG, 6, caller="bob"))
    ended = asking.go_on()
    assert ended.count("ada") == 8
    assert ended.index("bob") <= 2, ended
    client.engine.close()


def test_candidates_are_no_way_round_it(gemma: Base, float32: None, monkeypatch: pytest.MonkeyPatch):
    client = Client(gemma, max_batch=1)
    asking = Asking(client, monkeypatch)
    asking.add("ada", lambda: client.ask(None, LONG, 6, caller="ada", candidates=8))
    asking.add("bob", lambda: client.ask(None, LONG, 6, caller="bob"))
    assert asking.go_on() == ["bob", "ada"]
    client.engine.close()


def test_embeddings_take_turns_too(gemma: Base, float32: None, monkeypatch: pytest.MonkeyPatch):
    client = Client(gemma)
    asking = Asking(client, monkeypatch)
    embed = client.engine.embed
    for _ in range(6):
        asking.add("ada", lambda: embed(gemma.model, [LONG * 40] * 2, threading.Event(), "ada"))
    asking.add("bob", lambda: embed(gemma.model, ["hello"], threading.Event(), "bob"))
    ended = asking.go_on()
    assert ended.count("ada") == 6
    assert ended.index("bob") <= 2, ended
    client.engine.close()
