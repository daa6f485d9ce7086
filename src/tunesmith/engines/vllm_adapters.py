"""Adapters on a vLLM server: pushed when they are asked for, checked, least recently used out first."""

import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.base_models.prompts import FORMATS
from tunesmith.base_models.weights import Weights
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.probe import check_base, check_probe, near
from tunesmith.engines.vllm_client import VllmClient
from tunesmith.errors import ApiError, FailedPrecondition, Internal
from tunesmith.store.artifacts import ArtifactStore

FILES = ("adapter_config.json", "adapter_model.safetensors")
LOCK = ".lock"


@dataclass(frozen=True)
class Pushed:
    """An adapter that the server has.

    Attributes:
        name: What requests call it. Each push makes another, so that nothing that the server keeps of an earlier
            one is taken for this one's.
        prompt_format: How it is asked.
    """

    name: str
    prompt_format: str


@dataclass(eq=False)
class _Entry:
    pushed: Future[Pushed] = field(default_factory=Future)
    users: int = 0


class VllmAdapters:
    """The adapters that a server has of us, by artifact path.

    Args:
        artifacts: Where they are published.
        client: The server.
        folder: Where they are written for the server; several processes may share it, each has a part of its own.
        seen_as: The same folder, as the server sees it.
        capacity: How many the server is given; more only while more are in use.
        metrics: What is told of them.
    """

    def __init__(
        self,
        artifacts: ArtifactStore,
        client: VllmClient,
        folder: Path,
        seen_as: str,
        capacity: int,
        metrics: EngineMetrics,
    ) -> None:
        self._artifacts, self._client, self._capacity, self._metrics = artifacts, client, capacity, metrics
        self._folder, self._seen_as = folder, seen_as.rstrip("/")
        self._part = f"tunesmith-{secrets.token_hex(4)}"
        self._held: FileLock | None = None
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Least recently used first."""
        self._forgotten: list[_Entry] = []

    @contextmanager
    def use(self, weights: Weights, base: str, path: str) -> Iterator[Pushed]:
        """Keep an adapter on the server for a while, pushing it on the caller's thread when it is not there.

        Args:
            weights: Those that the adapter must have been trained on.
            base: What the server calls the base model.
            path: The adapter in the artifact store.

        Raises:
            NotFound: There is no such artifact.
            FailedPrecondition: It belongs to other weights, or the server has others.
            Internal: It is damaged, or does not answer as it did when it was trained.
            Unavailable: The server is not there.
        """
        with self._lock:
            entry = self._entries.get(path)
            first = entry is None
            if entry is None:
                entry = self._entries[path] = _Entry()
            self._entries.move_to_end(path)
            entry.users += 1
        try:
            if first:
                self._fill(path, entry, weights, base)
            else:
                self._metrics.adapter_hits.labels(weights.model.id).inc()
            yield entry.pushed.result()  # whoever comes while another pushes waits here
        finally:
            with self._lock:
                entry.users -= 1
                out = self._excess(weights.model.id)
            for pushed in out:
                self._take_away(pushed)

    def forget(self, path: str, pushed: Pushed) -> None:
        """Push an adapter anew when it is next asked for: the server does not have it any more."""
        with self._lock:
            entry = self._entries.get(path)
            if entry is not None and entry.pushed.done() and entry.pushed.result() == pushed:
                self._forgotten.append(self._entries.pop(path))

    def close(self) -> None:
        """Take away what the server was given."""
        with self._lock:
            entries, self._entries = [*self._forgotten, *self._entries.values()], OrderedDict()
        for entry in entries:
            if entry.pushed.done() and entry.pushed.exception() is None:
                self._take_away(entry.pushed.result())
        with self._opening:
            if self._held is not None:
                self._held.release()
                shutil.rmtree(self._folder / self._part, ignore_errors=True)
                self._held = None

    def _fill(self, path: str, entry: _Entry, weights: Weights, base: str) -> None:
        try:
            with self._metrics.adapter_load_seconds.labels(weights.model.id).time():
                entry.pushed.set_result(self._push(path, weights, base))
            self._metrics.adapter_loads.labels(weights.model.id).inc()
        except BaseException as error:  # noqa: BLE001 — raised by whoever waits
            with self._lock:
                if self._entries.get(path) is entry:
                    del self._entries[path]  # the next one tries again
            entry.pushed.set_exception(error)

    def _push(self, path: str, weights: Weights, base: str) -> Pushed:
        manifest = self._artifacts.manifest(path)
        check_base(path, manifest, weights)
        if manifest.get("prompt_format") not in FORMATS:
            raise Internal(f"Adapter {path} names the unknown prompt format {manifest.get('prompt_format')!r}.")
        files = self._artifacts.read(path)
        for name in FILES:
            if name not in files:
                raise Internal(f"Adapter {path} lacks its file {name}.")
        self._open()
        pushed = Pushed(_name(path), manifest["prompt_format"])
        self._write(pushed.name, {name: files[name] for name in FILES})
        try:
            self._client.load(pushed.name, f"{self._seen_as}/{self._part}/{pushed.name}")
            check_probe(path, manifest, lambda *asked: self._client.logprob(pushed.name, *asked))
        except BaseException as error:
            if isinstance(error, Internal):
                self._check_weights(manifest.get("probe"), base, weights)
            self._take_away(pushed)
            raise
        return pushed

    def _check_weights(self, probe: dict[str, object] | None, base: str, weights: Weights) -> None:
        """Raise FailedPrecondition when it is the server's base model that answers otherwise."""
        if probe is None:
            return
        measured = self._client.logprob(base, probe["tokens"], probe["prompt_length"])  # type: ignore[arg-type]
        if not near(measured, probe["base_logprob"]):  # type: ignore[arg-type]
            raise FailedPrecondition(other_weights(self._client.url, base, weights))

    def _open(self) -> None:
        """Make our part of the folder, once; remove those of processes that have ended."""
        with self._opening:
            if self._held is not None:
                return
            ours = self._folder / self._part
            ours.mkdir(parents=True)
            self._held = FileLock(ours / LOCK)
            self._held.acquire()
            left = [part for part in self._folder.glob("tunesmith-*") if part != ours and _abandoned(part)]
            for model in self._client.served() if left else []:
                if any(model.root.startswith(f"{self._seen_as}/{part.name}/") for part in left):
                    self._client.unload(model.name)
            for part in left:
                shutil.rmtree(part, ignore_errors=True)

    def _write(self, name: str, files: dict[str, bytes]) -> None:
        scratch = self._folder / self._part / f".{name}"
        scratch.mkdir()
        for file, content in files.items():
            (scratch / file).write_bytes(content)
        # What the server sees is whole.
        scratch.rename(scratch.with_name(name))

    def _excess(self, model: str) -> list[Pushed]:
        """Take the idle ones out that are too many, or of no more use."""
        idle = [entry for entry in self._forgotten if entry.users == 0]
        self._forgotten = [entry for entry in self._forgotten if entry.users]
        excess = max(len(self._entries) - self._capacity, 0)
        paths = [path for path, entry in self._entries.items() if entry.users == 0 and entry.pushed.done()]
        evicted = [self._entries.pop(path) for path in paths[:excess]]
        self._metrics.adapter_evictions.labels(model).inc(len(evicted))
        self._metrics.adapters.labels(model).set(len(self._entries))
        return [entry.pushed.result() for entry in [*idle, *evicted]]

    def _take_away(self, pushed: Pushed) -> None:
        with suppress(ApiError):  # a server that is not there has forgotten it
            self._client.unload(pushed.name)
        shutil.rmtree(self._folder / self._part / pushed.name, ignore_errors=True)


def other_weights(url: str, base: str, weights: Weights) -> str:
    """Say that a server has other weights than ours, and what to do about it."""
    return (
        f"The vLLM server at {url} has other weights as {base} than those of models/{weights.model.id} here "
        f"({weights.version}): start it with --model {weights.path}, or a copy of that folder."
    )


def _name(path: str) -> str:
    """Return a name that the server has not seen, and that a reader of its log understands."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", path).strip("-")[-60:]
    return f"{readable}-{secrets.token_hex(4)}"


def _abandoned(part: Path) -> bool:
    """Return whether the process that a part of the folder belongs to has ended."""
    lock = FileLock(part / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    lock.release()
    return True
