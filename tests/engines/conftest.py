from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prometheus_client import CollectorRegistry

import tiny
from engines.client import Base, Client
from engines.packed_models import CPU, GEMMA, LLAMA
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.engines import torch_engine
from tunesmith.engines.admission import Admission
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.runner import Runner
from tunesmith.kernels.decoding import DecodingKernels
from tunesmith.store.artifacts import ArtifactStore


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny products are faster alone


def _base(arch: Any, path: Path) -> Base:
    model, cache = tiny.tiny_cache(path, arch)
    base = weights.get(model, cache)
    store = ArtifactStore(f"memory://{path}")
    adapted = {
        "one": tiny.random_adapter(base, seed=1),
        "two": tiny.random_adapter(base, seed=2, rank=8, alpha=4),
        "attention": tiny.random_adapter(base, seed=3, rank=2, targets=("q_proj", "v_proj")),
    }
    for name, adapter in adapted.items():
        tiny.publish_adapter(store, name, base, adapter)
    return Base(model, cache, store, base, tiny.reference_model(base), adapted)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return _base("gemma3", tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return _base("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["gemma", "llama"])
def base(request: pytest.FixtureRequest) -> Base:
    found: Base = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def client(base: Base, float32: None) -> Iterator[Client]:
    client = Client(base)
    yield client
    client.engine.close()


@pytest.fixture
def gemma_client(gemma: Base, float32: None) -> Iterator[Client]:
    client = Client(gemma)
    yield client
    client.engine.close()


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact enough that the answers are the oracle's token by token."""
    monkeypatch.setattr(torch_engine, "compute_dtype", lambda device: torch.float32)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> DecodingKernels:
    found = DecodingKernels.find(CPU, torch.bfloat16, tmp_path_factory.mktemp("kernels"))
    if found is None:
        pytest.skip("this machine has no matrix unit or no compiler")
    return found


@pytest.fixture(scope="session", params=["gemma3", "llama"])
def packed_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a model with random weights lies that is large enough for the matrix unit."""
    torch.manual_seed(0)
    if request.param == "gemma3":
        model: Any = transformers.Gemma3ForCausalLM(GEMMA)
    else:
        model = transformers.LlamaForCausalLM(LLAMA)
    folder = tmp_path_factory.mktemp(request.param) / "models" / "random"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def metrics() -> CollectorRegistry:
    """What Prometheus is told of `runner`."""
    return CollectorRegistry()


@pytest.fixture
def runner(packed_model: Path, kernels: DecodingKernels, metrics: CollectorRegistry) -> Iterator[Runner]:
    model = BaseModel(
        id="random",
        display_name="Random",
        version="1",
        path=packed_model,
        licence="none",
        prompt_format="labelled",
        untuned_prompt_format="plain",
        input_token_limit=512,
        output_token_limit=256,
        tuning_token_limit=256,
    )
    runner = Runner(
        *(
            weights.Weights(model, packed_model, "0"),
            torch.device("cpu"),
            torch.bfloat16,
            16,
            8 << 20,
            Admission(10_000, 60.0),
        ),
        EngineMetrics(metrics),
    )
    assert runner._network.step == 16
    yield runner
    runner.close()
