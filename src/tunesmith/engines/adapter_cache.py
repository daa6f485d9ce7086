"""Adapters in memory: loaded from their artifacts, checked, least recently used out first."""

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import safetensors.torch
import torch

from tunesmith.base_models.prompts import FORMATS
from tunesmith.base_models.weights import Weights
from tunesmith.engines import drafts
from tunesmith.engines.drafts import OutputTrie
from tunesmith.engines.lora import Adapter
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.probe import check_base, check_probe
from tunesmith.errors import Internal
from tunesmith.store.artifacts import ArtifactStore

PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""

NAMES = ("adapter_config.json", "adapter_model.safetensors")
"""Files that say what it computes."""

PLAIN = {"bias": "none", "peft_type": "LORA"}
"""Values of PEFT's settings that leave the computation as it is."""

CHANGE_THE_COMPUTATION = (
    *("bias", "peft_type", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("lora_bias", "modules_to_save", "layer_replication", "alora_invocation_tokens", "use_qalora"),
    *("trainable_token_indices", "target_parameters", "use_bdlora", "arrow_config", "kasa_config"),
)

LOADS = 2
"""Adapters that are loaded at a time: more would take the cores from those that are answered."""


class Base(Protocol):
    """The base model that an adapter is loaded for."""

    weights: Weights
    device: torch.device
    linears: dict[str, tuple[int, int]]

    def prepare(self, adapter: Adapter) -> Adapter:
        """Bring an adapter into the layout that passes read; return what is to be kept of it."""

    def logprob(self, tokens: Sequence[int], prompt_length: int, adapter: Adapter | None) -> float:
        """Return the mean log-probability of the tokens that follow the prompt."""


@dataclass(eq=False)
class _Entry:
    loaded: Future[Adapter] = field(default_factory=Future)
    users: int = 0


class AdapterCache:
    """The adapters in memory, by base model and artifact path.

    Args:
        artifacts: Where the adapters are published.
        capacity: How many are kept; more only while more are in use.
        metrics: What is told of them.
    """

    def __init__(self, artifacts: ArtifactStore, capacity: int, metrics: EngineMetrics | None = None) -> None:
        self._artifacts, self._metrics = artifacts, metrics or EngineMetrics()
        self._capacity = capacity
        self._loads = threading.Semaphore(LOADS)
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        """Least recently used first."""

    @contextmanager
    def use(self, base: Base, path: str) -> Iterator[Adapter]:
        """Keep an adapter in memory for a while, loading it on the caller's thread when it is not there.

        Raises:
            NotFound: There is no such artifact.
            FailedPrecondition: It belongs to other weights.
            Internal: It is damaged, or does not answer as it did when it was trained.
        """
        key = (base.weights.model.id, path)
        with self._lock:
            entry = self._entries.get(key)
            first = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry()
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            if first:
                self._load(key, entry, base)
            else:
                self._metrics.adapter_hits.labels(key[0]).inc()
            yield entry.loaded.result()  # whoever comes while another loads waits here
        finally:
            with self._lock:
                entry.users -= 1
                self._evict()

    def _load(self, key: tuple[str, str], entry: _Entry, base: Base) -> None:
        try:
            # On a thread that ends: a thread that has computed keeps helpers from OpenMP, and as soon as all have
            # more of them than there are cores, those of the runner sleep between two products.
            with (
                self._loads,
                self._metrics.adapter_load_seconds.labels(key[0]).time(),
                ThreadPoolExecutor(1, "adapter") as once,
            ):
                entry.loaded.set_result(once.submit(load, self._artifacts, key[1], base).result())
            self._metrics.adapter_loads.labels(key[0]).inc()
        except BaseException as error:  # noqa: BLE001 — raised below, here and by whoever waits
            with self._lock:
                del self._entries[key]  # the next one tries again
            entry.loaded.set_exception(error)

    def _evict(self) -> None:
        excess = len(self._entries) - self._capacity
        idle = [key for key, entry in self._entries.items() if entry.users == 0]
        for key in idle[: max(excess, 0)]:
            del self._entries[key]
            self._metrics.adapter_evictions.labels(key[0]).inc()
        for model, count in Counter(model for model, _ in self._entries).items():
            self._metrics.adapters.labels(model).set(count)


def load(artifacts: ArtifactStore, path: str, base: Base) -> Adapter:
    """Read an adapter, check that it belongs to the base model, and that it answers as when it was trained.

    Raises:
        As `AdapterCache.use`.
    """
    manifest = artifacts.manifest(path)
    check_base(path, manifest, base.weights)
    if manifest.get("prompt_format") not in FORMATS:
        raise Internal(f"Adapter {path} names the unknown prompt format {manifest.get('prompt_format')!r}.")
    files = artifacts.read(path)
    for name in NAMES:
        if name not in files:
            raise Internal(f"Adapter {path} lacks its file {name}.")
    config = json.loads(files["adapter_config.json"])
    outputs = files.get(drafts.FILE)
    tensors = safetensors.torch.load(files["adapter_model.safetensors"])
    read = Adapter(
        factors=_factors(path, config, tensors, base),
        rank=config["r"],
        prompt_format=manifest["prompt_format"],
        content="".join(manifest["files"][name] for name in NAMES),
        outputs=OutputTrie.read(outputs) if outputs else None,
    )
    adapter = base.prepare(read)
    check_probe(path, manifest, lambda tokens, length: base.logprob(tokens, length, adapter))
    return adapter


def _factors(
    path: str, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], base: Base
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the factors by module path, refusing whatever would not be applied as it was trained."""
    for setting in CHANGE_THE_COMPUTATION:
        if config.get(setting) and config[setting] != PLAIN.get(setting):
            raise Internal(f"Adapter {path} uses {setting} = {config[setting]!r}, which is not served.")
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    left = dict(tensors)
    factors = {}
    for module in _targets(config["target_modules"], base.linears):
        inputs, outputs = base.linears[module]
        pair = []
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            key = f"{PREFIX}{module}.lora_{letter}.weight"
            tensor = left.pop(key, None)
            if tensor is None:
                raise Internal(f"Adapter {path} lacks {key}, though its target_modules name the module.")
            if tensor.shape != shape:
                raise Internal(f"Adapter {path}: {key} is {list(tensor.shape)} where {list(shape)} fits.")
            pair.append(tensor.to(base.device, torch.float32))
        factors[module] = (pair[0], pair[1] * scale)
    if left:
        raise Internal(f"Adapter {path} holds {min(left)}, which is no part of models/{base.weights.model.id}.")
    return factors


def _targets(names: Sequence[str], linears: Mapping[str, object]) -> list[str]:
    """Return the modules that PEFT's target_modules name: those whose path ends so."""
    return [path for path in linears if any(f".{path}".endswith(f".{name}") for name in names)]
