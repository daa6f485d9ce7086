import json
import threading
from typing import Any

import pytest
import safetensors.torch
import torch

import tiny
from engines.client import Base, Client
from tunesmith.base_models import weights
from tunesmith.engines import adapter_cache
from tunesmith.engines.adapter_cache import AdapterCache
from tunesmith.errors import FailedPrecondition, Internal, NotFound
from tunesmith.store.artifacts import ArtifactStore

KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.fixture
def store(gemma: Base) -> ArtifactStore:
    return gemma.store


def publish(gemma: Base, path: str, files: dict[str, bytes] | None = None, **about: Any) -> None:
    """Publish adapter `one` with changes."""
    adapted = gemma.adapted["one"]
    manifest = tiny.adapter_manifest(gemma.weights, adapted, "labelled")
    gemma.store.publish(path, tiny.adapter_files(adapted) | (files or {}), manifest | about)


def tensors(gemma: Base) -> dict[str, torch.Tensor]:
    loaded = safetensors.torch.load(tiny.adapter_files(gemma.adapted["one"])["adapter_model.safetensors"])
    return {name: tensor.clone() for name, tensor in loaded.items()}


def saved(changed: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {"adapter_model.safetensors": safetensors.torch.save(changed)}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are loaded, in order."""
    paths: list[str] = []
    load = adapter_cache.load

    def watched(store: ArtifactStore, path: str, base: Any) -> Any:
        paths.append(path)
        return load(store, path, base)

    monkeypatch.setattr(adapter_cache, "load", watched)
    return paths


def test_least_recently_used_leave_and_come_back(gemma: Base, float32: None, loads: list[str]):
    client = Client(gemma, loaded_adapters=2)
    expected = {name: gemma.text(name, "hello", 24) for name in ("one", "two", "attention")}
    for name in ("one", "two", "one", "attention", "one", "two"):
        assert client.ask(name, "hello") == expected[name]
    assert loads == ["one", "two", "attention", "two"]
    client.engine.close()


def test_an_adapter_in_use_stays(gemma: Base, float32: None, loads: list[str]):
    client = Client(gemma, loaded_adapters=1)
    chunks = client.chunks("one", "hello", 40)
    text = next(chunks).text
    client.ask("two", "hello")
    client.ask("attention", "hello")
    client.ask("one", "hello")
    assert loads == ["one", "two", "attention"]
    assert text + "".join(chunk.text for chunk in chunks) == gemma.text("one", "hello", 40)
    client.ask("two", "hello")
    assert loads == ["one", "two", "attention", "two"]
    client.engine.close()


def test_an_adapter_is_loaded_once_for_all_who_come_meanwhile(gemma: Base, monkeypatch: pytest.MonkeyPatch):
    cache, waiting, loading, proceed = AdapterCache(gemma.store, 4), [], threading.Event(), threading.Event()

    def slow(store: ArtifactStore, path: str, base: Any) -> Any:
        loading.set()
        assert proceed.wait(30)
        return object()

    def use() -> None:
        with cache.use(client, "one") as adapter:
            waiting.append(adapter)

    client = Client(gemma).runner
    monkeypatch.setattr(adapter_cache, "load", slow)
    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert loading.wait(30)
    proceed.set()
    for thread in threads:
        thread.join(30)
    assert len(waiting) == 3
    assert len(set(waiting)) == 1
    client.close()


def test_a_load_that_failed_is_tried_again(gemma: Base, gemma_client: Client):
    with pytest.raises(NotFound):
        gemma_client.ask("late", "hello")
    tiny.publish_adapter(gemma.store, "late", gemma.weights, gemma.adapted["one"])
    assert gemma_client.ask("late", "hello") == gemma.text("one", "hello", 24)


def test_other_weights(gemma: Base, gemma_client: Client):
    publish(gemma, "bad", weights_sha256="0" * 64)
    with pytest.raises(FailedPrecondition, match="trained on other weights of models/tiny-gemma3"):
        gemma_client.ask("bad", "hello")


def test_another_base_model(gemma: Base, llama: Base, float32: None):
    client = Client(llama)
    client.engine._artifacts = gemma.store
    client.engine._adapters = AdapterCache(gemma.store, 4)
    with pytest.raises(
        FailedPrecondition, match="trained on models/tiny-gemma3 and does not fit models/tiny-llama"
    ):
        client.ask("one", "hello")
    client.engine.close()


def test_keys_that_do_not_match(gemma: Base, gemma_client: Client):
    renamed = {name.replace("model.model.layers", "model.layers"): one for name, one in tensors(gemma).items()}
    publish(gemma, "bad", saved(renamed))
    with pytest.raises(Internal, match=r"lacks base_model\.model\.model\.layers\.0\.self_attn"):
        gemma_client.ask("bad", "hello")


def test_a_module_that_is_missing(gemma: Base, gemma_client: Client):
    fewer = {name: one for name, one in tensors(gemma).items() if name != KEY}
    publish(gemma, "bad", saved(fewer))
    with pytest.raises(Internal, match=f"lacks {KEY}"):
        gemma_client.ask("bad", "hello")


def test_a_module_too_many(gemma: Base, gemma_client: Client):
    more = tensors(gemma) | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}
    publish(gemma, "bad", saved(more))
    with pytest.raises(Internal, match=r"holds base_model\.model\.lm_head\.lora_A\.weight, which is no part"):
        gemma_client.ask("bad", "hello")


def test_a_shape_that_does_not_fit(gemma: Base, gemma_client: Client):
    publish(gemma, "bad", saved(tensors(gemma) | {KEY: torch.zeros(4, 31)}))
    with pytest.raises(Internal, match=rf"{KEY} is \[4, 31\] where \[4, 32\] fits"):
        gemma_client.ask("bad", "hello")


def test_settings_that_are_not_served(gemma: Base, gemma_client: Client):
    config = json.loads(tiny.adapter_files(gemma.adapted["one"])["adapter_config.json"])
    publish(gemma, "bad", {"adapter_config.json": json.dumps(config | {"use_dora": True}).encode()})
    with pytest.raises(Internal, match="use_dora"):
        gemma_client.ask("bad", "hello")


def test_an_adapter_without_effect_is_caught(gemma: Base, gemma_client: Client):
    zeroed = {name: one * ("lora_A" in name) for name, one in tensors(gemma).items()}
    publish(gemma, "bad", saved(zeroed))
    with pytest.raises(Internal, match=r"does not answer as it did .* the adapter has no effect"):
        gemma_client.ask("bad", "hello")


def test_another_adapters_tensors_are_caught(gemma: Base, gemma_client: Client):
    halved = {name: -one if "lora_A" in name else one for name, one in tensors(gemma).items()}
    publish(gemma, "bad", saved(halved))
    with pytest.raises(Internal, match="does not answer as it did when it was trained"):
        gemma_client.ask("bad", "hello")


@pytest.mark.parametrize(("about", "message"), [({"probe": None}, "no probe"), ({"prompt_format": "?"}, "'\\?'")])
def test_manifests_that_are_not_whole(gemma: Base, gemma_client: Client, about: dict[str, Any], message: str):
    publish(gemma, "bad", **about)
    with pytest.raises(Internal, match=message):
        gemma_client.ask("bad", "hello")


def test_the_probe_is_scored_as_peft_scores_it(base: Base, client: Client):
    for name, adapted in base.adapted.items():
        probe = base.store.manifest(name)["probe"]
        with client.engine._adapters.use(client.runner, name) as adapter:
            measured = client.runner.logprob(probe["tokens"], probe["prompt_length"], adapter)
        assert measured == pytest.approx(probe["logprob"], abs=1e-4)
        without = client.runner.logprob(probe["tokens"], probe["prompt_length"], None)
        assert without == pytest.approx(probe["base_logprob"], abs=1e-4)
        assert adapted is not None


def test_weights_are_those_of_the_cache(gemma: Base):
    assert weights.get(gemma.model, gemma.cache).sha256 == gemma.weights.sha256
