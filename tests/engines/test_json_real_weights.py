"""Answers held to schemas with the real model's vocabulary, asked as the service asks."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel, Catalog
from tunesmith.base_models.prompts import Turn
from tunesmith.config import Settings
from tunesmith.engines.base import Constraint, Sampling
from tunesmith.engines.torch_engine import TorchEngine
from tunesmith.store.artifacts import ArtifactStore

pytestmark = pytest.mark.weights

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "born"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"enum": ["六", "sieben", 8, None]}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[A-Z]{3}-\\d{2}$"}]},
]


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[TorchEngine, BaseModel]]:
    settings = Settings.load()
    model = Catalog.load(settings).default
    weights.ensure(model, settings.cache_dir)
    engine = TorchEngine(ArtifactStore("memory://json"), settings.cache_dir, device="cpu")
    yield engine, model
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_json(engine: tuple[TorchEngine, BaseModel], schema: dict[str, Any], temperature: float):
    torch_engine, model = engine
    sampling = Sampling(
        temperature, 0.95, 64, 200, seed=4, candidates=3, constraint=Constraint("schema", schema), logprobs=0
    )
    texts, ends, tokens = [""] * 3, [0] * 3, [0] * 3
    turns = [Turn("user", "Ada Lovelace was born on 10 December 1815. As JSON: ")]
    for chunk in torch_engine.generate(model, None, turns, sampling, threading.Event()):
        texts[chunk.index] += chunk.text
        ends[chunk.index] = chunk.finish_reason
        tokens[chunk.index] += len(chunk.places)
    for text in texts:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert ends == [protos.Candidate.STOP] * 3
    assert 0 < min(tokens) <= max(tokens) < 200
