"""The load benchmark, small: a few adapters in more traffic than there is room for, each answering as alone."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engines.client import Base, Client

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "load.py"


@pytest.fixture(scope="module")
def load() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("load", BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules["load"]


def test_traffic_on_more_adapters_than_fit(gemma: Base, float32: None, load: ModuleType) -> None:
    client = Client(gemma, loaded_adapters=1)
    expected = load.alone(client.engine, gemma.model, ["one", "two", "attention"])
    traffic = load.Asking(client.engine, gemma.model, expected).run(6, 0.5)
    assert traffic.sound, traffic.failures[:3]
    assert set(traffic.outcomes) == {"right"}
    mixed: Any = dict(zip(expected, reversed(expected.values()), strict=True))
    wrong = load.Asking(client.engine, gemma.model, mixed).run(2, 0.1)
    assert not wrong.sound
    client.engine.close()


def test_twice_the_capacity_with_clients_that_leave(gemma: Base, float32: None, load: ModuleType) -> None:
    client = Client(gemma, max_batch=2, waiting=2)
    expected = load.alone(client.engine, gemma.model, ["one", "two", "attention"])
    traffic = load.Asking(client.engine, gemma.model, expected, leaves=0.25).run(8, 1.0)
    assert traffic.sound, traffic.failures[:3]
    assert {"right", "refused", "left"} == set(traffic.outcomes)
    for _ in range(2):
        client.runner.logprob([1, 2], 1, None)
    assert client.runner._running == []
    assert client.runner._network._cache.lengths == []
    client.engine.close()
