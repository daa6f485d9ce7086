"""Our decoder against transformers' modules, on tiny random models of each architecture."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tiny import SLIDING_WINDOW, reference_model, tiny_cache
from tunesmith import protos
from tunesmith.base_models import decoder, weights
from tunesmith.base_models.prompts import Turn
from tunesmith.base_models.weights import Weights
from tunesmith.engines import torch_engine
from tunesmith.engines.base import Sampling
from tunesmith.engines.kv_cache import KVCache, causal_mask
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.training import loop
from tunesmith.training.examples import Row
from tunesmith.training.loop import TuningRun

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights.get(*tiny_cache(tmp_path_factory.mktemp("cache"), request.param))


def ours(path: Path, dtype: torch.dtype = torch.float32) -> decoder.CausalLM:
    model = decoder.load(path, CPU, dtype)
    assert isinstance(model, decoder.CausalLM)
    return model


def some_tokens(rows: int, width: int) -> torch.Tensor:
    """Ids of the vocabulary, but none of a padding token: transformers gives its embedding no gradient."""
    return torch.randint(3, 96, (rows, width), generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize("width", [1, SLIDING_WINDOW - 1, SLIDING_WINDOW, SLIDING_WINDOW + 1, 3 * SLIDING_WINDOW])
def test_hidden_states_are_those_of_transformers(base: Weights, width: int) -> None:
    tokens = some_tokens(3, width)
    found = ours(base.path).base_model(input_ids=tokens).last_hidden_state
    expected = reference_model(base).base_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_on_the_right_changes_nothing(base: Weights) -> None:
    tokens, lengths = some_tokens(3, 40), [40, 23, 1]
    attention = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    found = ours(base.path).base_model(input_ids=tokens * attention).last_hidden_state
    reference = reference_model(base).base_model
    expected = reference(input_ids=tokens * attention, attention_mask=attention).last_hidden_state
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5)


def test_tokens_one_by_one_are_those_together(base: Weights) -> None:
    """Rows of different lengths in one cache, a prompt each and then a token at a time, past the window."""
    model = ours(base.path)
    lengths, more = [20, 3], 20
    tokens = some_tokens(2, max(lengths) + more)
    cache = KVCache(CPU)
    rows = [cache.take(), cache.take()]
    last = []
    with torch.inference_mode():
        step(model, cache, tokens[:, : max(lengths)])
        cache.advance(rows, lengths)
        for _ in range(more):
            new = torch.stack([tokens[row, length] for row, length in enumerate(cache.lengths)])[:, None]
            last.append(step(model, cache, new)[:, 0])
            cache.advance(rows, [1, 1])
        for row, length in enumerate(lengths):
            whole = reference_model(base).base_model(input_ids=tokens[row : row + 1]).last_hidden_state
            expected = whole[0, length : length + more]
            torch.testing.assert_close(torch.stack(last)[:, row], expected, rtol=1e-5, atol=1e-5)


def step(model: decoder.CausalLM, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
    positions = cache.begin(range(len(tokens)), tokens.shape[1])
    windows = {decoder.FULL: None, decoder.SLIDING: model.config.sliding_window}
    masks = {kind: causal_mask(positions, cache.end, window, torch.float32) for kind, window in windows.items()}
    output = model.base_model(tokens, masks, positions, cache, use_cache=True)
    return output.last_hidden_state


def test_bfloat16_strays_no_farther_than_transformers_does(base: Weights) -> None:
    tokens = some_tokens(4, 40)
    exact = reference_model(base).base_model(input_ids=tokens).last_hidden_state
    theirs = reference_model(base, torch.bfloat16).base_model(input_ids=tokens).last_hidden_state
    found = ours(base.path, torch.bfloat16).base_model(input_ids=tokens).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() < 1.3 * (theirs - exact).square().mean()


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
    "llama with biases": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
    "gemma with a linear rope": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
    ),
}


def saved(path: Path, kind: tuple[Any, Any, dict[str, Any]]) -> Any:
    """Save a random model; return it as transformers runs it."""
    torch.manual_seed(0)
    config, model, given = kind
    made = model(config(**SHAPE | given)).eval()
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:  # they would all be alike
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    made.save_pretrained(path)
    return made


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_kin(kind: tuple[Any, Any, dict[str, Any]], tmp_path: Path) -> None:
    reference = saved(tmp_path, kind)
    tokens = some_tokens(2, 30)
    found = ours(tmp_path)
    hidden = found.base_model(input_ids=tokens).last_hidden_state
    expected = reference.base_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    head = found.get_output_embeddings().weight
    assert torch.equal(head, reference.get_output_embeddings().weight)


def test_the_old_spelling_of_rope_settings(tmp_path: Path) -> None:
    reference = saved(tmp_path, KINDS["gemma with a linear rope"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window_pattern": 2}))
    tokens = some_tokens(2, 30)
    hidden = ours(tmp_path).base_model(input_ids=tokens).last_hidden_state
    expected = reference.base_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"hidden_act": "relu"},
        {"model_type": "granite"},
        {"num_hidden_layers": 2},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_is_not_known_is_left_to_transformers(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}))
    ours(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | given))
    monkeypatch.setattr(decoder, "_of_transformers", lambda path, device, dtype: (path, device, dtype))
    assert decoder.load(tmp_path, CPU, torch.float32) == (tmp_path, CPU, torch.float32)


def test_another_architecture_runs_behind_the_same_interface(tmp_path: Path) -> None:
    saved(tmp_path, (transformers.OlmoConfig, transformers.OlmoForCausalLM, {}))
    model = decoder.load(tmp_path, CPU, torch.float32)
    assert not isinstance(model, decoder.CausalLM)
    hidden = model.base_model(input_ids=some_tokens(1, 4), use_cache=False).last_hidden_state
    assert hidden.shape == (1, 4, 32)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_transformers_runs_is_tuned_and_served_alike(base: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loop, torch_engine):
        monkeypatch.setattr(module, "compute_dtype", lambda _device: torch.float32)
    found = tuned_and_served(base)
    monkeypatch.setattr(decoder, "load", decoder._of_transformers)
    expected = tuned_and_served(base)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[1] == expected[1]


def tuned_and_served(base: Weights) -> tuple[list[float], str]:
    """Losses of a few steps, and an answer of the base model past its window."""
    rows = [Row([3, 4, 5, 6], [7, 8]), Row([9] * 20, [10])]
    hyperparameters = protos.Hyperparameters(epoch_count=3, batch_size=2, learning_rate=0.01)
    with TuningRun(loop.Base.load(base, CPU), rows, hyperparameters, seed=0) as run:
        losses = [step.mean_loss for step in run]
    cache_dir = base.path.parent.parent
    engine = torch_engine.TorchEngine(ArtifactStore(f"{cache_dir}/none"), cache_dir, device="cpu")
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_output_tokens=2 * SLIDING_WINDOW)
    chunks = engine.generate(base.model, None, [Turn("user", "one")], sampling, threading.Event())
    text = "".join(chunk.text for chunk in chunks)
    engine.close()
    return losses, text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_and_not_copied(base: Weights) -> None:
    found = ours(base.path, torch.bfloat16)
    stored = safetensors.torch.load_file(next(base.path.glob("*.safetensors")))
    assert {name: tensor.shape for name, tensor in found.state_dict().items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [line[0].split("-") for line in maps if line[-1].endswith(".safetensors")]
    for parameter in found.parameters():
        assert any(int(start, 16) <= parameter.data_ptr() < int(end, 16) for start, end in mapped)


SCRIPT = """
import sys, threading
from pathlib import Path
import torch
from tunesmith import protos
from tunesmith.base_models import catalog, weights
from tunesmith.base_models.prompts import Turn
from tunesmith.engines.base import Sampling
from tunesmith.engines.torch_engine import TorchEngine
from tunesmith.store.artifacts import ArtifactStore
from tunesmith.training.examples import Row
from tunesmith.training.loop import Base, TuningRun

model, cache = catalog.BaseModel.model_validate_json(sys.argv[1]), Path(sys.argv[2])
base = Base.load(weights.ensure(model, cache), torch.device("cpu"))
hyperparameters = protos.Hyperparameters(epoch_count=1, batch_size=1, learning_rate=0.001)
store = ArtifactStore(sys.argv[2] + "/artifacts")
with TuningRun(base, [Row([1, 2, 3], [4, 5])], hyperparameters, seed=0) as run:
    list(run)
    store.publish("adapter", run.adapter.to_files(model.id), run.manifest())
engine = TorchEngine(store, cache, device="cpu")
sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_output_tokens=4)
list(engine.generate(model, "adapter", [Turn("user", "one")], sampling, threading.Event()))
engine.close()
print([name for name in ("transformers", "torch._dynamo", "sympy") if name in sys.modules])
"""


def test_a_process_that_tunes_and_answers_imports_neither_transformers_nor_a_compiler(base: Weights) -> None:
    """They would be seconds of each start, of the server and of every worker."""
    cache = base.path.parent.parent
    command = [sys.executable, "-c", SCRIPT, base.model.model_dump_json(), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
