"""Who waits for a place at a server of answers: by turns, not for too long, and no longer than the client."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tunesmith.engines.admission import Admission
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.places import Places
from tunesmith.errors import ApiError, Cancelled, ResourceExhausted, Unavailable


class Crowd:
    """Callers on threads of their own, each of which keeps its place until it is told to leave."""

    def __init__(self, count: int = 1, most: int = 100, seconds: float = 60.0) -> None:
        self.registry = CollectorRegistry()
        self.places = Places(count, Admission(most, seconds), EngineMetrics(self.registry), "m")
        self.order: list[str] = []
        self.errors: dict[str, ApiError] = {}
        self.leave = threading.Semaphore(0)
        self._queued, self._threads = threading.Semaphore(0), []
        queue: Any = self.places._queue
        add = queue.add

        def counted(item: Any) -> None:
            add(item)
            self._queued.release()

        queue.add = counted

    def come(self, caller: str, gone: threading.Event | None = None) -> threading.Thread:
        """Ask for a place, and return when it is given or waited for."""

        def run() -> None:
            try:
                with self.places.held(caller, gone or threading.Event()):
                    self.order.append(caller)
                    assert self.leave.acquire(timeout=30)
            except ApiError as error:
                self.errors[caller] = error

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)
        assert self._queued.acquire(timeout=30)
        return thread

    def all_leave(self) -> None:
        for _ in self._threads:
            self.leave.release()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"tunesmith_{name}", {"model": "m", **labels}) or 0.0


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    made = Crowd()
    yield made
    made.all_leave()
    made.places.close()


def test_callers_take_turns(crowd: Crowd) -> None:
    for caller in ("ada", "ada", "ada", "ada", "bob"):
        crowd.come(caller)
    assert (crowd.value("running_answers"), crowd.value("waiting_answers")) == (1, 4)
    crowd.all_leave()
    assert crowd.order.index("bob") <= 2
    assert sorted(crowd.order) == ["ada"] * 4 + ["bob"]
    assert (crowd.value("running_answers"), crowd.value("waiting_answers")) == (0, 0)
    assert crowd.value("wait_seconds_count") == 5


def test_who_leaves_waits_no_longer(crowd: Crowd) -> None:
    gone = threading.Event()
    crowd.come("ada")
    waiting = crowd.come("bob", gone)
    crowd.come("eve")
    gone.set()
    waiting.join(30)
    assert isinstance(crowd.errors["bob"], Cancelled)
    assert crowd.value("refused_answers_total", reason="gone") == 1
    crowd.all_leave()
    assert crowd.order == ["ada", "eve"]


def test_what_waits_for_too_long_is_given_up() -> None:
    crowd = Crowd(seconds=0.05)
    crowd.come("ada")
    waiting = crowd.come("bob")
    waiting.join(30)
    assert isinstance(crowd.errors["bob"], Unavailable)
    assert "did not come within 0.05 seconds" in str(crowd.errors["bob"])
    assert crowd.errors["bob"].retry_seconds == 1
    assert crowd.value("refused_answers_total", reason="overdue") == 1
    crowd.all_leave()
    crowd.places.close()


def test_a_full_queue_refuses_and_who_has_most_waiting_gives_way() -> None:
    crowd = Crowd(most=2)
    for _ in range(3):
        crowd.come("ada")
    with pytest.raises(ResourceExhausted), crowd.places.held("ada", threading.Event()):
        pass
    crowd.come("bob")
    crowd.all_leave()
    assert sorted(crowd.order) == ["ada", "ada", "bob"]
    assert isinstance(crowd.errors["ada"], ResourceExhausted)
    crowd.places.close()


def test_a_call_that_has_a_place_asks_more_in_it() -> None:
    crowd, gone = Crowd(), threading.Event()
    with crowd.places.held("ada", gone):
        crowd.come("ada")
        with crowd.places.held("ada", gone):
            assert (crowd.value("running_answers"), crowd.value("waiting_answers")) == (1, 1)
        assert crowd.order == []
    crowd.all_leave()
    assert crowd.order == ["ada"]
    assert crowd.value("running_answers") == 0
    crowd.places.close()


def test_who_cannot_wait_is_given_no_place_later(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    crowd.come("ada")
    with monkeypatch.context() as patched:
        patched.setattr(crowd.places._leavers, "watched", fails)
        with pytest.raises(RuntimeError), crowd.places.held("bob", threading.Event()):
            pass
    assert crowd.value("waiting_answers") == 0
    crowd.all_leave()
    assert crowd.value("running_answers") == 0


def test_closing_ends_those_that_wait() -> None:
    crowd = Crowd()
    crowd.come("ada")
    waiting = crowd.come("bob")
    crowd.places.close()
    waiting.join(30)
    assert "shutting down" in str(crowd.errors["bob"])
    crowd.all_leave()
    with pytest.raises(Unavailable), crowd.places.held("eve", threading.Event()):
        pass


def test_no_place_is_lost_or_given_twice() -> None:
    places = Places(3, Admission(1000, 60.0), EngineMetrics(), "m")
    lock, outcomes = threading.Lock(), {"inside": 0, "most": 0, "served": 0, "left": 0}

    def run(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            gone = threading.Event()
            leaves = chance.random() < 0.3
            if leaves:
                gone.set()
            try:
                with places.held(f"caller-{seed % 4}", gone):
                    with lock:
                        outcomes["inside"] += 1
                        outcomes["most"] = max(outcomes["most"], outcomes["inside"])
                    with lock:
                        outcomes["inside"] -= 1
                        outcomes["served"] += 1
            except Cancelled:
                assert leaves
                with lock:
                    outcomes["left"] += 1

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert outcomes["served"] + outcomes["left"] == 16 * 50
    assert outcomes["most"] <= 3
    assert places._held.total() == len(places._queue) == 0
    places.close()
