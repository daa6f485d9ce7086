"""Artifacts: whole or absent, on a local disk and on another fsspec store."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tunesmith.errors import NotFound
from tunesmith.store.artifacts import ArtifactStore

FILES = {"weights": b"\x00\x01", "config.json": b"{}"}


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path}/artifacts" if request.param == "file" else f"memory:/{tmp_path}")


def test_what_was_published_is_read(store: ArtifactStore) -> None:
    store.publish("models/a/1", FILES, {"kind": "adapter"})
    assert store.read("models/a/1") == FILES
    assert store.manifest("models/a/1")["kind"] == "adapter"
    assert store.children("models/a") == ["1"]


def test_publishing_again_replaces(store: ArtifactStore) -> None:
    store.publish("a", FILES, {"n": 1})
    store.publish("a", {"weights": b"new"}, {"n": 2})
    assert store.read("a") == {"weights": b"new"}
    assert store.manifest("a")["n"] == 2


def test_without_its_manifest_there_is_no_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    store.publish("a", FILES, {})
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(NotFound):
        store.read("a")


def test_damage_is_noticed(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    store.publish("a", FILES, {})
    (tmp_path / "a" / "weights").write_bytes(b"\x00\x02")
    with pytest.raises(NotFound, match="weights of artifact a is damaged"):
        store.read("a")
    (tmp_path / "a" / "weights").unlink()
    with pytest.raises(NotFound, match="lacks its file weights"):
        store.read("a")


def test_deleting(store: ArtifactStore) -> None:
    store.publish("models/a/1", FILES, {})
    store.publish("models/a/2", FILES, {})
    store.delete("models/a/1")
    assert store.children("models/a") == ["2"]
    store.delete("models/a")
    assert store.children("models") == []
    store.delete("models/never-was")
    with pytest.raises(NotFound):
        store.read("models/a/2")


def test_a_folder_is_removed_that_another_process_removes_from(tmp_path: Path) -> None:
    """A worker removes its older checkpoints while the server removes all that its model had."""
    store = ArtifactStore(str(tmp_path))
    names = [f"model/job/checkpoint-{number}" for number in range(500)]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    with ThreadPoolExecutor(1) as worker:
        other = worker.submit(lambda: [store.delete(name) for name in reversed(names)])
        store.delete("model")
        other.result()
    assert not (tmp_path / "model").exists()
