"""Files that outlive a process: adapters and checkpoints, on any fsspec store.

An artifact is a folder of files and a manifest. The manifest is written last: the artifact exists when its
manifest does, and a half-written one is garbage that nobody reads.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from tunesmith.errors import NotFound

MANIFEST = "manifest.json"


class ArtifactStore:
    """Artifacts below an fsspec URL, by path."""

    def __init__(self, url: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)

    def publish(self, path: str, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
        """Store an artifact: its files, then the manifest with `about` and the files' hashes."""
        folder = self._at(path)
        self._files.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            self._files.pipe_file(f"{folder}/{name}", content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = json.dumps({**about, "files": hashes}, indent=2).encode()
        # A rename is atomic where a write is not.
        self._files.pipe_file(f"{folder}/.{MANIFEST}", manifest)
        self._files.mv(f"{folder}/.{MANIFEST}", f"{folder}/{MANIFEST}")

    def manifest(self, path: str) -> dict[str, Any]:
        """Return an artifact's manifest.

        Raises:
            NotFound: There is no such artifact, or it was never finished.
        """
        try:
            manifest: dict[str, Any] = json.loads(self._files.cat_file(f"{self._at(path)}/{MANIFEST}"))
        except FileNotFoundError:
            raise NotFound(f"There is no artifact {path}.") from None
        return manifest

    def read(self, path: str) -> dict[str, bytes]:
        """Return an artifact's files, each checked against the hash in the manifest.

        Raises:
            NotFound: There is no such artifact, or a file of it is missing or damaged.
        """
        files: dict[str, bytes] = {}
        for name, sha256 in self.manifest(path)["files"].items():
            try:
                files[name] = self._files.cat_file(f"{self._at(path)}/{name}")
            except FileNotFoundError:
                raise NotFound(f"Artifact {path} lacks its file {name}.") from None
            if hashlib.sha256(files[name]).hexdigest() != sha256:
                raise NotFound(f"File {name} of artifact {path} is damaged: its hash differs.")
        return files

    def children(self, path: str = "") -> list[str]:
        """Return the names below a path; none when the path does not exist."""
        try:
            found = self._files.ls(self._at(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(Path(name).name for name in found)

    def delete(self, path: str) -> None:
        """Remove an artifact, or a whole folder of them, the manifest first; absent ones are no error."""
        for manifest in (f"{self._at(path)}/{MANIFEST}", self._at(path)):
            try:
                self._files.rm(manifest, recursive=True)
            except FileNotFoundError:
                continue

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")
